"""Which rows a batch has: an endless shuffled stream to train on, an even choice to score."""

from __future__ import annotations

import functools

import numpy as np

from qkvjax.errors import UserError


def batch_rows(step: int, batch_size: int, accumulation: int, part: slice) -> list[int]:
    """Numbers, in the endless stream of rows, of `part` of each micro-batch of a step.

    Raises:
      UserError: a batch does not divide into micro-batches.
    """
    if batch_size % accumulation:
        raise UserError(f"accumulation={accumulation} does not divide batch_size={batch_size}")
    size = batch_size // accumulation
    starts = range(step * batch_size, (step + 1) * batch_size, size)
    return [start + i for start in starts for i in range(size)[part]]


def training_rows(numbers: list[int], count: int, seed: int) -> list[int]:
    """Rows of these numbers in an endless stream that visits all `count` rows in each epoch, in an
    order that follows from (seed, epoch). Each in constant time.
    """
    from grain.experimental import index_shuffle

    return [
        index_shuffle(i % count, max_index=count - 1, seed=_epoch_seed(seed, i // count), rounds=4)
        for i in numbers
    ]


def scored_rows(count: int, labels: int, max_labels: int | None) -> np.ndarray:
    """Rows to score, int64 [n]: all `count` rows, or rows spaced evenly over them.

    Args:
      labels: that all rows have together.
      max_labels: about so many labels are scored; None scores all.
    """
    some = count
    if max_labels is not None and max_labels < labels:
        some = max(1, round(count * max_labels / labels))
    return (np.arange(some) * 2 + 1) * count // (2 * some)


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed % 2**64, epoch]).generate_state(1)[0])
