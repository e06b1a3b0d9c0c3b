"""What a handful of seeds allows to say: intervals, paired differences, verdicts.

Lower scores are better throughout (bits per byte). Intervals are Student's t over seeds: the
runs of a variant differ only in their seed, and seed i starts from the same random numbers and
sees the same batches in every variant, so differences are taken within seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

BETTER, WORSE, NOT_SHOWN = "better", "worse", "no difference shown"
_MANY = 1000  # more seeds than this are reported as None: nobody trains them


class Interval(NamedTuple):
    """A mean over n values with its interval; low and high are None when n is 1."""

    mean: float
    low: float | None
    high: float | None
    n: int


class Paired(NamedTuple):
    """A difference other - baseline over the seeds that both have.

    Attributes:
      mean: of the differences, in the score's unit.
      low, high: the 95 % interval; None when the seeds do not give one.
      n: how many seeds are common.
      standard_error: of the mean; None without an interval.
      smallest_detectable_effect: the true difference that a study with this spread and this
        many seeds finds four times in five; None without an interval.
      verdict: BETTER or WORSE when the interval excludes zero, else NOT_SHOWN.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    standard_error: float | None
    smallest_detectable_effect: float | None
    verdict: str


def t_quantile(probability: float, df) -> float:
    """The quantile of Student's t with `df` degrees of freedom (an array is welcome)."""
    from scipy.special import stdtrit  # jax depends on scipy; scipy.stats is slow to import

    return stdtrit(df, probability)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of `values` with its t interval at `level`."""
    values = np.asarray(values, np.float64)
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Interval(mean, None, None, n)
    half = float(t_quantile((1 + level) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def detectable(n) -> float:
    """How many standard errors a true effect must measure to be found at 80 % power, 5 % level."""
    return t_quantile(0.975, n - 1) + t_quantile(0.80, n - 1)


def paired(baseline: Mapping[int, float], other: Mapping[int, float]) -> Paired | None:
    """Compares two variants over the seeds that both finished.

    Args:
      baseline, other: seed -> score.

    Returns:
      None without a common seed. Without an interval (one seed; or differences that are equal
      to the last bit and not zero, which independent seeds do not give) nothing is claimed.
      Differences that are all zero give exactly 0 [0, 0].
    """
    seeds = sorted(baseline.keys() & other.keys())
    if not seeds:
        return None
    differences = np.array([other[seed] - baseline[seed] for seed in seeds], np.float64)
    n, mean = len(seeds), float(differences.mean())
    if n > 1 and not differences.any():
        return Paired(0.0, 0.0, 0.0, n, 0.0, 0.0, NOT_SHOWN)
    if n < 2 or np.ptp(differences) == 0:
        return Paired(mean, None, None, n, None, None, NOT_SHOWN)
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    half = float(t_quantile(0.975, n - 1)) * error
    low, high = mean - half, mean + half
    verdict = BETTER if high < 0 else WORSE if low > 0 else NOT_SHOWN
    return Paired(mean, low, high, n, error, float(detectable(n)) * error, verdict)


def seeds_needed(result: Paired, margin: float = 0.0) -> int | None:
    """About how many seeds would tell the observed difference from `margin` (80 % power).

    Returns:
      The number of seeds in all, or None when it exceeds 1000 or the spread is unknown.
    """
    distance = abs(result.mean - margin)
    if not result.standard_error or distance == 0:
        return None
    spread = result.standard_error * math.sqrt(result.n)
    counts = np.arange(2, _MANY + 1)
    enough = np.flatnonzero(detectable(counts) * spread / np.sqrt(counts) <= distance)
    return int(counts[enough[0]]) if len(enough) else None
