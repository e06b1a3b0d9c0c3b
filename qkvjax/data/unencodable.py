"""The error about bytes that a tokenizer cannot encode."""

from __future__ import annotations

from qkvjax.errors import UserError


class Unencodable(Exception):
    """Bytes that a tokenizer cannot encode.

    Attributes:
      reason: why they are not UTF-8; "" if they are UTF-8 and the tokenizer loses some of them.
      position: the first such byte.
    """

    def __init__(self, reason: str, position: int):
        super().__init__(reason, position)
        self.reason = reason
        self.position = position

    def as_user_error(self, tokenizer: str, document: str) -> UserError:
        """Returns the error for the user.

        Args:
          tokenizer: `data.tokenizer`.
          document: how the message calls the document.
        """
        if self.reason:
            return UserError(
                f"{document} is not UTF-8 ({self.reason} at byte {self.position:,}), which"
                f" data.tokenizer={tokenizer!r} needs: convert it, or use"
                " --config.data.tokenizer=bytes"
            )
        return UserError(
            f"data.tokenizer={tokenizer!r} does not give back {document}, so bits per byte would be"
            " wrong: use a byte-level BPE without normalizer and prefix space, or"
            " --config.data.tokenizer=bytes"
        )
