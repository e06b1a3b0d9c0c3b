"""Sizes of the models that are timed: small ones for a CPU, GPT-2's for a GPU."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """A decoder and its batch.

    Attributes:
      layers: L.
      width: D.
      heads: N.
      length: T, tokens per sequence.
      batch: B, sequences per step.
      vocab: V, number of ids.
    """

    layers: int
    width: int
    heads: int
    length: int
    batch: int
    vocab: int


SIZES = {
    "tiny": Size(2, 32, 2, 16, 4, 65),  # for tests of the scripts themselves
    "shakespeare": Size(4, 128, 4, 64, 12, 65),  # nanoGPT's small run on a CPU
    "cpu": Size(4, 256, 4, 256, 16, 4096),
    "124m": Size(12, 768, 12, 1024, 32, 50304),
    "350m": Size(24, 1024, 16, 1024, 16, 50304),
}
