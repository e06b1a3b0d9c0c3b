"""Bytes that a tokenizer does not take."""

from __future__ import annotations

from qkvjax.errors import UserError


class Unfit(Exception):
    """Bytes that a tokenizer does not take.

    Attributes:
      reason: why they are not UTF-8; "" where the tokenizer loses some of them.
      at: the first such byte.
    """

    def __init__(self, reason: str, at: int):
        super().__init__(reason, at)
        self.reason = reason
        self.at = at

    def refusal(self, spec: str, where: str) -> UserError:
        """The message for `where`, a document, of a tokenizer called `spec`."""
        if self.reason:
            return UserError(
                f"{where} is not UTF-8 ({self.reason} at byte {self.at:,}), which"
                f" data.tokenizer={spec!r} needs: convert it, or use"
                " --config.data.tokenizer=bytes"
            )
        return UserError(
            f"data.tokenizer={spec!r} does not give back {where}, so bits per byte would be wrong:"
            " use a byte-level BPE without normalizer and prefix space, or"
            " --config.data.tokenizer=bytes"
        )
