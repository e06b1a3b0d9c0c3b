"""What a handful of runs allows to say: paired differences, corrected intervals, verdicts.

Lower scores are better throughout. Runs of one seed share the order of the data and the initial
draws, so that variants are compared by differences within seeds. What is independent is a seed or,
where a study has several settings, a setting: the differences of a setting are averaged over its
seeds first, and its mean is one observation (clustered by setting).

The model is d[i, u] = delta_i + noise for variant i and unit u (a seed or a setting):

  - Below POOLED_BELOW units an interval is the wider of two. One has the larger of the variant's
    own standard error and the one pooled over all variants (the residual of a two-way table,
    variants by units), with the degrees of freedom of the table. The other has the variant's own
    error and its own degrees of freedom. So a variant, a baseline or a setting that varies more
    than the others raises no false alarm, nor does one that happens to vary little. From
    POOLED_BELOW units on each variant stands on its own error.
  - Several variants are compared with one baseline: intervals are widened by the critical value of
    Dunnett (1955) below POOLED_BELOW units, else of Holm (1979), step by step: the clearest
    difference is corrected for all comparisons, the next for those that remain, as long as each
    excludes zero. So no more than 5 % of studies without any difference name one; simulations in
    the tests hold it to that. Equivalence is judged by intervals that are corrected for all.
  - Where the best of several is chosen by the same runs (`compare_best`), all pairs are corrected
    for, by Tukey's studentized range or Bonferroni's bound.
  - Power follows the noncentral t distribution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

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
    "detectable",
    "unit",
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
def tukey(variants: int, degrees: float, level: float = LEVEL) -> float:
    """Returns the two-sided critical value for all pairs of variants: the studentized range."""
    from scipy import stats

    return float(stats.studentized_range.ppf(level, variants, degrees)) / math.sqrt(2)


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


def compare(scores: pd.DataFrame, baseline: str, margin: float = math.nan) -> pd.DataFrame:
    """Compares every variant with the baseline.

    Args:
      scores: columns label, setting, seed, score: a row a finished run.
      baseline: a label.
      margin: a difference within which variants count as equivalent, in the score's unit.

    Returns:
      Index: labels of the variants that have a seed in common with the baseline. Columns:
        difference, low, high: mean and corrected 95 % interval, in the score's unit; no interval
          (nan) of one unit, or of differences that are equal to the last bit and not zero, which
          independent runs do not give.
        standard_error: of the difference; the larger one, where two are looked at.
        detectable: about the smallest true difference that is found four times in five.
        unit, units: "seed" or "setting", and how many of them the interval stands on.
        pairs, ties: runs compared, and how many of them are exactly equal.
        ceiling: at least half of the pairs are exactly equal.
        equivalent: the interval, corrected for all comparisons, lies within the margin, and the
          comparison is not at a ceiling.
        verdict: BETTER or WORSE where the interval excludes zero, else NOT_SHOWN.
    """
    rows, comparisons = _rows(scores, baseline)

    def critical(row: dict) -> Callable[..., float]:
        return dunnett if row["degrees"] else bonferroni

    def half_width(row: dict, remaining: int) -> float:
        own = critical(row)(remaining, row["units"] - 1)
        shared = dunnett(remaining, row["degrees"]) if row["degrees"] else 0.0
        return _wider(row, own, shared)

    judged = [row for row in rows.values() if row["standard_error"] > 0]
    for row in judged:
        row["whole"] = half_width(row, comparisons)
    judged.sort(key=lambda row: -abs(row["difference"]) / row["whole"])
    remaining = comparisons
    for row in judged:
        _judge(row, half_width(row, remaining))
        inside = abs(row["difference"]) + row["whole"] <= margin
        row["equivalent"] = inside and not row["ceiling"]
        # By the variant's own degrees of freedom, which limit where there are few units.
        effect = detectable(critical(row)(comparisons, row["units"] - 1), row["units"] - 1)
        row["detectable"] = effect * row["standard_error"]
        if row["verdict"] != NOT_SHOWN:
            remaining -= 1
    return _table(rows)


def compare_best(scores: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame | None:
    """Compares variants with the best of them, which the same runs choose.

    Only the seeds and settings that every variant finished are looked at.

    Args:
      scores: as in `compare`.
      level: of all intervals together.

    Returns:
      The columns of `compare`, the best variant first, whose difference is missing; None where the
      variants have no run in common.
    """
    runs = _by_run(scores).dropna()
    if not len(runs):
        return None
    means = runs.groupby(level="setting").mean().mean()
    best = means.idxmin()
    common = runs.stack().rename("score").reset_index()
    rows, _ = _rows(common, best)
    variants = runs.shape[1]
    pairs = variants * (variants - 1) // 2
    for row in rows.values():
        if row["standard_error"] > 0:
            own = bonferroni(pairs, row["units"] - 1, level)
            shared = tukey(variants, row["degrees"], level) if row["degrees"] else 0.0
            _judge(row, _wider(row, own, shared))
    table = _table(rows).sort_values("difference")
    return table.reindex([best, *table.index])


def _rows(scores: pd.DataFrame, baseline: str) -> tuple[dict[str, dict], int]:
    """Returns (label -> differences from the baseline without intervals, how many are compared)."""
    paired = differences(scores, baseline).dropna(axis="columns", how="all")
    runs = _by_run(scores)
    unit = "setting" if paired.index.name == "setting" else "seed"
    gaps = {label: (runs[label] - runs[baseline]).dropna() for label in paired}
    varying = [label for label in paired if (gaps[label] != 0).any()]
    pooled, degrees = _pooled_variance(paired[varying].dropna().to_numpy())
    rows = {}
    for label in paired:
        row = _difference(paired[label].dropna().to_numpy(), pooled, degrees, label in varying)
        ties = int((gaps[label] == 0).sum())
        row |= {"pairs": len(gaps[label]), "ties": ties, "unit": unit}
        rows[label] = row | {"ceiling": ties >= CEILING * len(gaps[label])}
    return rows, len(varying)


def _wider(row: dict, own: float, shared: float) -> float:
    """Returns the half-width of the wider of two intervals.

    Args:
      row: of `_rows`.
      own: critical value for the variant's own standard error.
      shared: for the larger of its own and the pooled one; 0 where nothing is pooled.
    """
    return max(own * row["own_error"], shared * row["standard_error"])


def _judge(row: dict, half: float) -> None:
    """Gives a difference its interval and its verdict."""
    row["low"] = row["difference"] - half
    row["high"] = row["difference"] + half
    if row["high"] < 0:
        row["verdict"] = BETTER
    elif row["low"] > 0:
        row["verdict"] = WORSE


def _table(rows: dict[str, dict]) -> pd.DataFrame:
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


def _difference(values: np.ndarray, pooled: float, degrees: float, varies: bool) -> dict:
    """Returns mean and standard errors of one variant's differences; without an interval yet.

    Args:
      values: [units], averaged over seeds where the unit is a setting.
      pooled, degrees: of `_pooled_variance`.
      varies: some run differs from the baseline's.
    """
    units = len(values)
    row = {
        "difference": float(values.mean()),
        "low": math.nan,
        "high": math.nan,
        "standard_error": math.nan,
        "own_error": math.nan,
        "degrees": 0,
        "detectable": math.nan,
        "units": units,
        "equivalent": False,
        "verdict": NOT_SHOWN,
    }
    if units > 1 and not varies:  # the same computation, or a ceiling: exactly 0
        return row | {"low": 0.0, "high": 0.0, "standard_error": 0.0, "detectable": 0.0}
    if units < 2 or (np.ptp(values) == 0 and not pooled > 0):
        return row
    own = float(values.var(ddof=1))
    row["own_error"] = math.sqrt(own / units)
    if degrees and units < POOLED_BELOW:
        return row | {"standard_error": math.sqrt(max(own, pooled) / units), "degrees": degrees}
    return row | {"standard_error": row["own_error"] or math.nan}


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
        critical = (dunnett if units < POOLED_BELOW else bonferroni)(comparisons, units - 1)
        return detectable(critical, units - 1) * spread <= distance * math.sqrt(units)

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
    means = np.empty(draws)
    for i in range(draws):
        drawn = generator.integers(0, items, items)
        means[i] = gap[drawn].sum() / weights[drawn].sum()
    tail = (1 - LEVEL) / 2 / comparisons
    low, high = np.quantile(means, [tail, 1 - tail])
    return mean, float(low), float(high)
