"""Which rows a batch has: an endless shuffled stream to train on, an even choice to score."""

from __future__ import annotations

import functools

import numpy as np

from qkvjax.errors import UserError


def training_rows(start: int, stop: int, count: int, seed: int) -> list[int]:
    """Rows start..stop-1 of an endless stream that visits all `count` rows in each epoch, in an
    order that follows from (seed, epoch). Each in constant time.
    """
    from grain.experimental import index_shuffle

    return [
        index_shuffle(i % count, max_index=count - 1, seed=_epoch_seed(seed, i // count), rounds=4)
        for i in range(start, stop)
    ]


def scored_rows(count: int, labels: int, max_labels: int | None) -> np.ndarray:
    """Rows spaced evenly over `count`, so many that they hold about `max_labels` of all
    `labels`; None takes all rows.
    """
    some = count
    if max_labels is not None and max_labels < labels:
        some = max(1, round(count * max_labels / labels))
    return (np.arange(some) * 2 + 1) * count // (2 * some)


def check_accumulation(batch_size: int, accumulation: int) -> None:
    """Raises UserError unless a batch divides into micro-batches."""
    if batch_size % accumulation:
        raise UserError(f"accumulation={accumulation} does not divide batch_size={batch_size}")


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed % 2**64, epoch]).generate_state(1)[0])
