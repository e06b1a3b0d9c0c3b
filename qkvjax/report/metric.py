"""The scores by which the variants of a study are compared, and their names."""

from __future__ import annotations

import math
from typing import NamedTuple

from qkvjax import formats


class Metric(NamedTuple):
    """A score; lower is better.

    Attributes:
      key: its name in results.jsonl.
      name: its name in sentences.
      of: follows a difference in percent: "+1 % of the bits".
      relative: whether percent are parts of the baseline's score; else they are percentage points.
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
        """Returns a score as text; a dash where there is none."""
        if value is None or math.isnan(value):
            return formats.NONE
        return f"{value:.{self.decimals}f}"


METRICS = {
    "bits_per_byte": Metric(
        key="bits_per_byte",
        name="bits per byte",
        of="of the bits",
        relative=True,
        decimals=3,
        definition="minus log2 of the probability that the model gives to the held-out text, over"
        " its UTF-8 bytes; it does not depend on the tokenizer. Lower is better.",
    ),
    "error": Metric(
        key="error",
        name="error",
        of="of the labels",
        relative=False,
        decimals=4,
        definition="the part of the held-out labels that the model gets wrong, 1 − accuracy. Lower"
        " is better; differences in percent are percentage points, that is, percent of the labels.",
    ),
}
