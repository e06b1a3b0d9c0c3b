"""What few runs can show: paired differences, corrected intervals, verdicts.

Lower scores are better throughout. Runs of one seed share the order of the data and the initial
draws, so variants are compared by differences within seeds. A unit is what is independent: a seed
or, where a study has several settings, a setting. The differences of a setting are averaged over
its seeds first, and this mean is one observation (clustered by setting).

The model is d[i, u] = delta_i + noise for variant i and unit u:

  - Standard errors. Below POOLED_BELOW units an interval is the wider of two. The first uses the
    larger of the variant's standard error and the one pooled over all variants (the residual of a
    two-way table, variants by units), with the degrees of freedom of the table. The second uses the
    variant's standard error with the variant's degrees of freedom. So there is no false alarm from
    a variant, a baseline or a setting that varies more than the others, nor from one that happens
    to vary little. From POOLED_BELOW units on, each variant uses its own standard error.
  - Several comparisons with one baseline. Intervals are widened by the critical value of Dunnett
    (1955) below POOLED_BELOW units, and of Holm (1979) from there on. Both go step by step: the
    clearest difference is corrected for all comparisons, the next one for those that remain, as
    long as each excludes zero. So at most 5 % of studies without any difference name one;
    simulations in the tests check this. Equivalence uses intervals that are corrected for all
    comparisons.
  - Comparisons with the best variant, which the same runs choose (`compare_best`), are corrected
    for all pairs, by Tukey's studentized range or Bonferroni's bound.
  - Power follows the noncentral t distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from qkvjax.report.critical_values import LEVEL, bonferroni, detectable, dunnett, tukey

BETTER = "better"
WORSE = "worse"
NOT_SHOWN = "no difference shown"
POOLED_BELOW = 16  # units; from here on the variance of a single variant is known well enough
CEILING = 0.5  # a comparison is at a ceiling if at least this part of its pairs is exactly equal
MOST_UNITS = 1000  # the report does not ask for more seeds than this: nobody would train them
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


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """Returns (mean, low, high) of independent values by Student's t; low and high are nan for one
    value."""
    from scipy import stats

    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    error = values.std(ddof=1) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * error)
    return mean, mean - half, mean + half


def _by_run(scores: pd.DataFrame) -> pd.DataFrame:
    """Returns scores with a row for each setting and seed and a column for each variant."""
    return scores.set_index(["setting", "seed", "label"])["score"].astype(float).unstack("label")


def differences(scores: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Returns paired differences from the baseline, a row for each unit, a column for each variant.

    Args:
      scores: a row for each finished run, with columns label, setting, seed, score.
      baseline: a label.

    Returns:
      A frame indexed by seeds or, where there are several settings, by settings, whose differences
      are averaged over seeds. A value is nan where a variant and the baseline have no seed in
      common.
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
      scores: a row for each finished run, with columns label, setting, seed, score.
      baseline: a label.
      margin: a difference within which variants count as equivalent, in the score's unit.

    Returns:
      A frame indexed by the labels of the variants that have a seed in common with the baseline.
      Columns:
        difference, low, high: mean and corrected 95 % interval, in the score's unit. low and high
          are nan for one unit, and for differences that are equal to the last bit but not zero,
          because independent runs do not give such differences.
        standard_error: of the difference; where there are two, the larger one.
        detectable: about the smallest true difference that is found four times in five.
        unit: "seed" or "setting".
        units: number of units behind the interval.
        pairs: number of runs compared with a run of the baseline.
        ties: how many of the pairs are exactly equal.
        ceiling: at least half of the pairs are exactly equal.
        equivalent: the interval, corrected for all comparisons, lies within the margin, and the
          comparison is not at a ceiling.
        verdict: BETTER or WORSE where the interval excludes zero, else NOT_SHOWN.
    """
    rows, comparisons = _rows_without_intervals(scores, baseline)
    judged = [row for row in rows.values() if row["standard_error"] > 0]
    for row in judged:
        row["full_width"] = _half_width(row, comparisons)  # corrected for all comparisons
    judged.sort(key=lambda row: -abs(row["difference"]) / row["full_width"])
    remaining = comparisons
    for row in judged:
        _set_verdict(row, _half_width(row, remaining))
        if row["verdict"] != NOT_SHOWN:
            remaining -= 1
        within_margin = abs(row["difference"]) + row["full_width"] <= margin
        row["equivalent"] = within_margin and not row["ceiling"]
        row["detectable"] = _detectable_difference(row, comparisons)
    return _table(rows)


def _half_width(row: dict, comparisons: int) -> float:
    """Returns half the width of a variant's interval, corrected for several comparisons."""
    critical = _critical_value(row, comparisons)
    pooled_critical = dunnett(comparisons, row["degrees"]) if row["degrees"] else 0.0
    return _wider(row, critical, pooled_critical)


def _critical_value(row: dict, comparisons: int) -> float:
    """Returns the critical value for the variant's own degrees of freedom."""
    correction = dunnett if row["degrees"] else bonferroni
    return correction(comparisons, row["units"] - 1)


def _detectable_difference(row: dict, comparisons: int) -> float:
    """Returns the true difference that is found with POWER, in the score's unit.

    It uses the variant's own degrees of freedom: with few units these are the limit.
    """
    critical = _critical_value(row, comparisons)
    return detectable(critical, row["units"] - 1) * row["standard_error"]


def compare_best(scores: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame | None:
    """Compares variants with the best of them, which the same runs choose.

    It uses only the seeds and settings that every variant finished.

    Args:
      scores: as in `compare`.
      level: probability that all intervals together cover the true differences.

    Returns:
      The columns of `compare`, the best variant first; its difference is missing. None where the
      variants have no run in common.
    """
    runs = _by_run(scores).dropna()
    if not len(runs):
        return None
    means = runs.groupby(level="setting").mean().mean()
    best = means.idxmin()
    common = runs.stack().rename("score").reset_index()
    rows, _ = _rows_without_intervals(common, best)
    variants = runs.shape[1]
    pairs = variants * (variants - 1) // 2
    for row in rows.values():
        if row["standard_error"] > 0:
            critical = bonferroni(pairs, row["units"] - 1, level)
            pooled_critical = tukey(variants, row["degrees"], level) if row["degrees"] else 0.0
            _set_verdict(row, _wider(row, critical, pooled_critical))
    table = _table(rows).sort_values("difference")
    return table.reindex([best, *table.index])


def _rows_without_intervals(scores: pd.DataFrame, baseline: str) -> tuple[dict[str, dict], int]:
    """Returns (label -> row of `compare` without interval and verdict, number of comparisons).

    A variant whose every run is exactly equal to the baseline's is not counted as a comparison.
    """
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


def _wider(row: dict, critical: float, pooled_critical: float) -> float:
    """Returns half the width of the wider of two intervals.

    Args:
      row: of `_rows_without_intervals`.
      critical: critical value for the variant's own standard error.
      pooled_critical: critical value for the larger of this error and the pooled one; 0 where
        nothing is pooled.
    """
    return max(critical * row["own_error"], pooled_critical * row["standard_error"])


def _set_verdict(row: dict, half_width: float) -> None:
    """Gives a row its interval and its verdict."""
    row["low"] = row["difference"] - half_width
    row["high"] = row["difference"] + half_width
    if row["high"] < 0:
        row["verdict"] = BETTER
    elif row["low"] > 0:
        row["verdict"] = WORSE


def _table(rows: dict[str, dict]) -> pd.DataFrame:
    table = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS)
    table.index.name = "label"
    return table


def _pooled_variance(paired: np.ndarray) -> tuple[float, float]:
    """Returns (variance of one unit's difference, its degrees of freedom).

    It comes from the residual of a two-way table, units by variants; (nan, 0) for fewer than two
    units.

    Args:
      paired: differences from the baseline [units, variants].
    """
    units, variants = paired.shape
    if units < 2 or not variants:
        return math.nan, 0
    table = np.column_stack([np.zeros(units), paired])
    residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    degrees = variants * (units - 1)
    return 2 * float((residual**2).sum()) / degrees, degrees


def _difference(values: np.ndarray, pooled: float, degrees: float, varies: bool) -> dict:
    """Returns mean and standard errors of one variant's differences, without an interval.

    Args:
      values: [units], averaged over seeds where the unit is a setting.
      pooled, degrees: of `_pooled_variance`.
      varies: whether some run differs from the baseline's.
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
    if units > 1 and not varies:  # the same computation, or a ceiling: the difference is exactly 0
        return row | {"low": 0.0, "high": 0.0, "standard_error": 0.0, "detectable": 0.0}
    if units < 2 or (np.ptp(values) == 0 and not pooled > 0):
        return row
    variance = float(values.var(ddof=1))
    row["own_error"] = math.sqrt(variance / units)
    if degrees and units < POOLED_BELOW:
        error = math.sqrt(max(variance, pooled) / units)
        return row | {"standard_error": error, "degrees": degrees}
    return row | {"standard_error": row["own_error"] or math.nan}


def units_needed(row: pd.Series, comparisons: int, margin: float = 0.0) -> int | None:
    """Returns about how many seeds (or settings) would separate a difference from `margin`.

    Args:
      row: of `compare`.
      comparisons: number of variants beside the baseline.
      margin: in the score's unit.

    Returns:
      None above MOST_UNITS, or where the spread is unknown.
    """
    distance = abs(row["difference"] - margin)
    if not row["standard_error"] > 0 or distance == 0:
        return None
    spread = row["standard_error"] * math.sqrt(row["units"])

    def enough(units: int) -> bool:
        correction = dunnett if units < POOLED_BELOW else bonferroni
        critical = correction(comparisons, units - 1)
        return detectable(critical, units - 1) * spread <= distance * math.sqrt(units)

    if not enough(MOST_UNITS):
        return None
    too_few = 1
    sufficient = MOST_UNITS
    while sufficient - too_few > 1:
        middle = (too_few + sufficient) // 2
        if enough(middle):
            sufficient = middle
        else:
            too_few = middle
    return sufficient


def bootstrap_items(
    values: np.ndarray, weights: np.ndarray, comparisons: int = 1, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Returns (difference, low, high) of two models' scores, by a bootstrap over the test set.

    The score is a ratio, sum(value) / sum(weight). Items (documents, questions) are drawn with
    replacement, the same items for both models.

    Args:
      values: [2, items], of the baseline and of the variant, each summed over seeds.
      weights: [items], summed over the same seeds.
      comparisons: number of intervals that are corrected for (Bonferroni).
      draws: number of resampled test sets.
      seed: of the draws.
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
