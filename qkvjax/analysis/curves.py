"""Validation curves of a variant over its seeds, the gap to a baseline, and common losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Curve(NamedTuple):
    """The evaluations that all seeds of a variant share.

    Attributes:
      seeds: of the rows of `values`.
      steps, tokens: [points].
      seconds: [points], mean over seeds of the training wall-clock.
      values: [seeds, points], scores.
    """

    seeds: tuple[int, ...]
    steps: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Mean over seeds, [points]."""
        return self.values.mean(axis=0)


def curve(results: Mapping[int, Mapping], key: str) -> Curve | None:
    """Aligns the curves of one variant's results (seed -> result line) by their tokens.

    Args:
      key: the score's name in the curves.

    Returns:
      None when no evaluation is common to all seeds.
    """
    by_seed = {}
    for seed, result in sorted(results.items()):
        points = result.get("curve") or []
        by_seed[seed] = {p["tokens"]: p for p in points if _finite(p.get(key))}
    if not by_seed:
        return None
    common = sorted(set.intersection(*(set(points) for points in by_seed.values())))
    if not common:
        return None
    table = [[points[tokens] for tokens in common] for points in by_seed.values()]

    def column(name):
        return np.array([[float(p.get(name) or 0) for p in row] for row in table])

    return Curve(
        tuple(by_seed), column("step").mean(axis=0), np.array(common, np.float64),
        column("seconds").mean(axis=0), column(key),
    )  # fmt: skip


def gap(
    baseline: Curve | None, other: Curve | None, relative: bool = True
) -> tuple[np.ndarray, np.ndarray] | None:
    """The paired gap to the baseline after each common number of tokens.

    Returns:
      tokens [points] and the gap [seeds, points], as a part of the baseline's mean score if
      `relative`; None without a common seed or evaluation.
    """
    if baseline is None or other is None:
        return None
    seeds = [seed for seed in baseline.seeds if seed in other.seeds]
    tokens, left, right = np.intersect1d(baseline.tokens, other.tokens, return_indices=True)
    keep = tokens > 0  # before the first step there is nothing to compare
    tokens, left, right = tokens[keep], left[keep], right[keep]
    if not seeds or not len(tokens):
        return None
    a = baseline.values[[baseline.seeds.index(seed) for seed in seeds]][:, left]
    b = other.values[[other.seeds.index(seed) for seed in seeds]][:, right]
    return tokens, (b - a) / (a.mean(axis=0) if relative else 1)


def reach(axis: np.ndarray, values: np.ndarray, mark: float) -> float | None:
    """Where a curve first gets down to `mark`, between evaluations by straight lines.

    Args:
      axis, values: [points].

    Returns:
      None when it never does; the first point when it starts there.
    """
    below = np.flatnonzero(values <= mark)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(axis[0])
    part = (values[i - 1] - mark) / (values[i - 1] - values[i])
    return float(axis[i - 1] + part * (axis[i] - axis[i - 1]))


def common_losses(curves: list[Curve]) -> tuple[float, ...]:
    """The scores to race to: what the worst variant had halfway, and what it ended with.

    Every variant reaches both (rounded up to three decimals), so that the table has no holes.
    Halfway is half of the worst variant's steps; it is left out where that curve is no lower
    at its end than there.
    """
    if not curves:
        return ()
    worst = max(curves, key=lambda c: c.mean[-1])
    final = float(worst.mean[-1])
    halfway = float(np.interp(worst.steps[-1] / 2, worst.steps, worst.mean))
    marks = [halfway, final] if len(worst.steps) > 2 and halfway > final else [final]
    return tuple(math.ceil(mark * 1000 - 1e-9) / 1000 for mark in marks)


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
