"""What the variants of a study are compared by, and how it is said."""

from __future__ import annotations

from typing import NamedTuple

from qkvjax.analysis import formats


class Metric(NamedTuple):
    """A score of which less is better.

    Attributes:
      key: in results.jsonl and its curves.
      name: in sentences.
      of: what a difference in percent is a part of.
      relative: whether that is the baseline's score; else percent are points of the score.
      decimals: of a score in tables.
      definition: for the report's list of words.
    """

    key: str
    name: str
    of: str
    relative: bool
    decimals: int
    definition: str

    def text(self, value: float | None) -> str:
        """A score for people."""
        return formats.NONE if value is None else f"{value:.{self.decimals}f}"


METRICS = {
    "bits_per_byte": Metric(
        "bits_per_byte", "bits per byte", "of the bits", True, 3,
        "minus log2 of the probability that the model gives to the held-out text, over its UTF-8"
        " bytes; it does not depend on the tokenizer. Lower is better.",
    ),
    "error": Metric(
        "error", "error", "of the labels", False, 4,
        "the part of the held-out labels that the model gets wrong, 1 − accuracy. Lower is better;"
        " differences in percent are percentage points, that is, percent of the labels.",
    ),
}  # fmt: skip
