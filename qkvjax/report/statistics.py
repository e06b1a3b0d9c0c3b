"""What a handful of runs allows to say: paired differences, corrected intervals, verdicts.

Lower scores are better throughout. Runs of one seed share the order of the data and the initial
draws, so that variants are compared by differences within seeds. What is independent is a seed or,
where a study has several settings, a setting: the differences of a setting are averaged over its
seeds first, and its mean is one observation (clustered by setting).

The model is d[i, u] = delta_i + noise for variant i and unit u (a seed or a setting):

  - Below POOLED_BELOW units the standard error of variant i is the larger of two: that of its own
    differences, and the one pooled over all variants (the residual of a two-way table, variants by
    units). Pooling makes three seeds worth more than two degrees of freedom; the larger of both
    keeps a variant that varies more than the others honest. From POOLED_BELOW units on each variant
    has its own standard error.
  - Several variants are compared with one baseline. Intervals are widened by the critical value of
    Dunnett (1955) where the variance is pooled, else of Holm (1979), step by step: the clearest
    difference is corrected for all comparisons, the next for those that remain, as long as each
    excludes zero. So no more than 5 % of studies without any difference name one; simulations in
    the tests hold it to that.
  - Power follows the noncentral t distribution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

BETTER, WORSE, NOT_SHOWN = "better", "worse", "no difference shown"
LEVEL = 0.95
POWER = 0.8
POOLED_BELOW = 16  # units; from here on a variant's own variance is known well enough
CEILING = 0.5  # from this part of exactly equal pairs on, a comparison is at a ceiling
COLUMNS = [
    "difference",
    "low",
    "high",
    "standard_error",
    "degrees",
    "pooled",
    "detectable",
    "units",
    "pairs",
    "ties",
    "ceiling",
    "equivalent",
    "verdict",
]
MOST_UNITS = 1000  # more seeds than this are not asked for: nobody trains them


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """Returns (mean, low, high) of independent values: Student's t; no interval (nan) of one."""
    from scipy import stats

    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    error = values.std(ddof=1) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * error)
    return mean, mean - half, mean + half


@functools.cache
def dunnett(comparisons: int, degrees: float, level: float = LEVEL) -> float:
    """Returns Dunnett's two-sided critical value for comparisons with one baseline.

    P(max_i |T_i| <= c) = level, where T_i = (Z_i - Z_0) / (sqrt(2) S): Z standard normal, S^2 a
    chi-square over its degrees of freedom. Integrated over Z_0 (Gauss-Hermite) and S (equally
    likely quantiles).

    Args:
      comparisons: variants beside the baseline, at least 1.
      degrees: of freedom of the pooled variance, above 0.
    """
    from scipy import optimize, stats

    if comparisons == 1:
        return bonferroni(1, degrees, level)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    parts = (np.arange(400) + 0.5) / 400
    spread = np.sqrt(stats.chi2.ppf(parts, degrees) / degrees)[:, None]

    def excess(value: float) -> float:
        reach = math.sqrt(2) * value * spread
        inside = stats.norm.cdf(nodes + reach) - stats.norm.cdf(nodes - reach)
        return float((inside**comparisons @ weights).mean()) - level

    low = bonferroni(1, degrees, level) * 0.99
    high = bonferroni(comparisons, degrees, level) * 1.01
    return optimize.brentq(excess, low, high)


@functools.cache
def bonferroni(comparisons: int, degrees: float, level: float = LEVEL) -> float:
    """Returns the two-sided critical value of Student's t for one of several comparisons."""
    from scipy import stats

    return float(stats.t.isf((1 - level) / 2 / comparisons, degrees))


@functools.cache
def detectable(critical: float, degrees: float) -> float:
    """Returns how many standard errors a true difference must measure to be found at POWER."""
    from scipy import optimize, stats

    def missed(effect: float) -> float:
        return stats.nct.cdf(critical, degrees, effect) - (1 - POWER)

    return optimize.brentq(missed, 0.0, 3 * critical + 20)


def _by_run(scores: pd.DataFrame) -> pd.DataFrame:
    """Returns scores by run: a row a setting and seed, a column a variant; nan where one lacks."""
    return scores.set_index(["setting", "seed", "label"])["score"].astype(float).unstack("label")


def differences(scores: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Returns paired differences from the baseline: a row a unit, a column a variant.

    Args:
      scores: columns label, setting, seed, score: a row a finished run.

    Returns:
      Index: seeds, or settings where there are several, whose differences are averaged over
      seeds. A value is nan where a variant and the baseline have no seed in common.
    """
    runs = _by_run(scores)
    if baseline not in runs:
        return pd.DataFrame(index=runs.index)
    paired = runs.sub(runs[baseline], axis=0).drop(columns=baseline)
    if paired.index.get_level_values("setting").nunique() > 1:
        return paired.groupby(level="setting").mean()
    return paired.droplevel("setting")


def compare(
    scores: pd.DataFrame, baseline: str, margin: float = math.nan, level: float = LEVEL
) -> pd.DataFrame:
    """Compares every variant with the baseline.

    Args:
      scores: columns label, setting, seed, score: a row a finished run.
      baseline: a label.
      margin: a difference within which variants count as equivalent, in the score's unit.
      level: of all intervals together.

    Returns:
      Index: labels of the variants that have a seed in common with the baseline. Columns:
        difference, low, high: mean and corrected 95 % interval, in the score's unit; no interval
          (nan) of one unit, or of differences that are equal to the last bit and not zero, which
          independent runs do not give.
        standard_error, degrees, pooled: of the difference; whether its variance is pooled.
        detectable: the smallest true difference that is found four times in five.
        units: seeds or settings that the interval stands on.
        pairs, ties: runs compared, and how many of them are exactly equal.
        ceiling: at least half of the pairs are exactly equal.
        equivalent: the interval lies within the margin.
        verdict: BETTER or WORSE where the interval excludes zero, else NOT_SHOWN.
    """
    paired = differences(scores, baseline)
    runs = _by_run(scores)
    paired = paired.dropna(axis="columns", how="all")
    varying = [label for label in paired if not (paired[label].dropna() == 0).all()]
    pooled, degrees = _pooled_variance(paired[varying].dropna().to_numpy())
    rows = {}
    for label in paired:
        gaps = (runs[label] - runs[baseline]).dropna()
        ties = int((gaps == 0).sum())
        row = _difference(paired[label].dropna().to_numpy(), pooled, degrees)
        row |= {"pairs": len(gaps), "ties": ties, "ceiling": ties >= CEILING * len(gaps)}
        rows[label] = row
    _step_down(rows, len(varying), level)
    for row in rows.values():
        row["equivalent"] = max(abs(row["low"]), abs(row["high"])) <= margin
    table = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS)
    table.index.name = "label"
    return table


def _pooled_variance(paired: np.ndarray) -> tuple[float, float]:
    """Returns (variance of one unit's difference, its degrees of freedom) of differences
    [units, variants], from the residual of a two-way table; (nan, 0) of fewer than two units."""
    units, variants = paired.shape
    if units < 2 or not variants:
        return math.nan, 0
    table = np.column_stack([np.zeros(units), paired])
    residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    degrees = variants * (units - 1)
    return 2 * float((residual**2).sum()) / degrees, degrees


def _difference(values: np.ndarray, pooled: float, degrees: float) -> dict:
    """Returns mean and standard error of one variant's differences; without an interval yet."""
    units = len(values)
    row = {
        "difference": float(values.mean()),
        "low": math.nan,
        "high": math.nan,
        "standard_error": math.nan,
        "degrees": 0,
        "pooled": False,
        "detectable": math.nan,
        "units": units,
        "verdict": NOT_SHOWN,
    }
    if units > 1 and not values.any():  # the same computation, or a ceiling: exactly 0
        return row | {"low": 0.0, "high": 0.0, "standard_error": 0.0, "detectable": 0.0}
    if units < 2 or (np.ptp(values) == 0 and not pooled > 0):
        return row
    own = float(values.var(ddof=1))
    if degrees and units < POOLED_BELOW:
        error = math.sqrt(max(own, pooled) / units)
        return row | {"standard_error": error, "degrees": degrees, "pooled": True}
    if own == 0:
        return row
    return row | {"standard_error": math.sqrt(own / units), "degrees": units - 1}


def _step_down(rows: dict[str, dict], comparisons: int, level: float) -> None:
    """Gives differences their corrected intervals and verdicts, the clearest first."""
    judged = [row for row in rows.values() if row["degrees"] > 0]
    judged.sort(key=lambda row: -abs(row["difference"]) / row["standard_error"])
    remaining = comparisons
    for row in judged:
        degrees = row["degrees"]
        find_critical = dunnett if row["pooled"] else bonferroni
        half = find_critical(remaining, degrees, level) * row["standard_error"]
        effect = detectable(find_critical(comparisons, degrees, level), degrees)
        row["low"] = row["difference"] - half
        row["high"] = row["difference"] + half
        row["detectable"] = effect * row["standard_error"]
        if row["low"] <= 0 <= row["high"]:
            continue
        row["verdict"] = BETTER if row["high"] < 0 else WORSE
        remaining -= 1


def units_needed(row: pd.Series, comparisons: int, margin: float = 0.0) -> int | None:
    """Returns about how many seeds (or settings) would tell a difference from `margin`.

    Args:
      row: of `compare`.
      comparisons: variants beside the baseline.

    Returns:
      None above MOST_UNITS, or where the spread is unknown.
    """
    distance = abs(row["difference"] - margin)
    if not row["standard_error"] > 0 or distance == 0:
        return None
    spread = row["standard_error"] * math.sqrt(row["units"])

    def enough(units: int) -> bool:
        pooled = units < POOLED_BELOW
        degrees = comparisons * (units - 1) if pooled else units - 1
        critical = (dunnett if pooled else bonferroni)(comparisons, degrees)
        return detectable(critical, degrees) * spread <= distance * math.sqrt(units)

    if not enough(MOST_UNITS):
        return None
    low, high = 1, MOST_UNITS  # not enough, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def bootstrap_items(
    values: np.ndarray, weights: np.ndarray, comparisons: int = 1, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Returns (difference, low, high) of two models' scores over the items of a test set.

    The score is a ratio, sum(value) / sum(weight); items (documents, questions) are drawn with
    replacement, the same for both models. The interval is corrected for several comparisons
    (Bonferroni).

    Args:
      values: [2, items], summed over the seeds of the baseline and of the variant.
      weights: [items], of one run, times the number of seeds.
    """
    generator = np.random.default_rng(seed)
    gap = values[1] - values[0]
    mean = float(gap.sum() / weights.sum())
    items = len(weights)
    if items < 2:
        return mean, math.nan, math.nan
    found = np.empty(draws)
    for i in range(draws):
        drawn = generator.integers(0, items, items)
        found[i] = gap[drawn].sum() / weights[drawn].sum()
    tail = (1 - LEVEL) / 2 / comparisons
    low, high = np.quantile(found, [tail, 1 - tail])
    return mean, float(low), float(high)
