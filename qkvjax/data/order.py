"""Which rows a batch has: in training of an endless shuffled stream, in scoring evenly spaced."""

from __future__ import annotations

import functools

import numpy as np

from qkvjax.errors import UserError


def batch_rows(step: int, batch_size: int, accumulation: int, part: slice) -> list[int]:
    """Returns the positions in the endless stream of the rows of a step.

    Args:
      part: which rows of each micro-batch.

    Raises:
      UserError: accumulation does not divide batch_size.
    """
    if batch_size % accumulation:
        raise UserError(f"accumulation={accumulation} does not divide batch_size={batch_size}")
    size = batch_size // accumulation
    starts = range(step * batch_size, (step + 1) * batch_size, size)
    return [start + i for start in starts for i in range(size)[part]]


def training_rows(numbers: list[int], count: int, seed: int) -> list[int]:
    """Returns the rows at these positions of an endless stream, each in constant time.

    The stream visits all `count` rows in each epoch, in an order that follows from (seed, epoch).
    """
    from grain.experimental import index_shuffle

    return [
        index_shuffle(
            number % count,
            max_index=count - 1,
            seed=_epoch_seed(seed, number // count),
            rounds=4,
        )
        for number in numbers
    ]


def scored_rows(count: int, labels: int, max_labels: int | None) -> np.ndarray:
    """Returns the rows to score, int64 [n]: all `count` rows, or rows spaced evenly over them.

    Args:
      labels: number of labels that all rows have together.
      max_labels: about this many labels are scored; None scores all.
    """
    num_rows = count
    if max_labels is not None and max_labels < labels:
        num_rows = max(1, round(count * max_labels / labels))
    return (np.arange(num_rows) * 2 + 1) * count // (2 * num_rows)


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed % 2**64, epoch]).generate_state(1)[0])
