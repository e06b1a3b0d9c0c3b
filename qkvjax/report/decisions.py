"""The decision table: which variant to choose for a goal, or how many seeds would separate the
candidates."""

from __future__ import annotations

import pandas as pd

from qkvjax import formats
from qkvjax.report import statistics
from qkvjax.report.summary import MARGIN, Summary
from qkvjax.report.tables import Cell, Table, table

_SIZE = "cache_bytes_per_token"
_MARGIN_TEXT = f"{100 * MARGIN:g} %"


def decisions(summary: Summary) -> Table | None:
    """Returns the decision table of a study; None when nothing is compared."""
    if not len(summary.compared):
        return None
    rows = [_best_score(summary, "Best quality", summary.variants)]
    sizes = summary.variants[_SIZE].dropna()
    if sizes.nunique() > 1 and summary.base[_SIZE] > 0:
        rows.append(_smallest_cache(summary))
        rows.append(_half_cache(summary))
    if summary.variants["step_ratio"].notna().any():
        rows.append(_fastest(summary, "Fastest training step here", "step_ratio"))
    if summary.variants["decode_ratio"].notna().any():
        rows.append(_fastest(summary, "Fastest decoding here", "decode_ratio"))
    caption = (
        "For this model, on this data and device. A variant is named only where its intervals"
        " separate it from the other candidates. Elsewhere the table says how many seeds (or"
        " settings) would separate them with 80 % power."
    )
    return table(["If you want", "choose", "because"], rows, ("choose", "because"), caption)


def _decided(goal: str, choice: str, reason: str) -> list:
    return [goal, Cell(choice, tone="good"), reason]


def _undecided(goal: str, choice: str, reason: str) -> list:
    return [goal, Cell(choice, tone="quiet"), reason]


def _best_score(summary: Summary, goal: str, candidates: pd.DataFrame) -> list:
    """Returns the best mean score, if its corrected interval to every rival excludes zero."""
    candidates = candidates[candidates["score"].notna()]
    scores = summary.done[summary.done["label"].isin(candidates.index)]
    compared = statistics.compare_best(scores)
    if compared is None:
        return _undecided(goal, "not comparable", "the candidates have no finished run in common")
    best = compared.index[0]
    others = compared.iloc[1:]
    rivals = others[others["verdict"] != statistics.WORSE]
    if len(rivals):
        names = formats.listed(list(rivals.index))
        needed = _units_to_separate(rivals, len(others), 0.0, summary.unit)
        reason = f"{best} has the best mean score, but is not shown to be better than {names}"
        return _undecided(goal, f"not separable: {needed}", reason)
    score = summary.metric.text(candidates.loc[best, "score"])
    rank = "better than every other candidate" if len(others) else "the only candidate"
    return _decided(goal, best, f"{score} {summary.metric.name}, {rank}")


def _smallest_cache(summary: Summary) -> list:
    """Returns the smallest cache among variants whose whole interval stays within the margin.

    A variant with a smaller cache whose interval straddles the margin leaves it undecided.
    """
    goal = f"At most {_MARGIN_TEXT} loss, smallest cache"
    margin = MARGIN * (summary.base["score"] if summary.metric.relative else 1)
    rows = summary.compared[summary.compared[_SIZE].notna()]
    informative = ~rows["ceiling"].astype(bool)
    within = rows[(rows["high"] <= margin) & informative & (rows[_SIZE] < summary.base[_SIZE])]
    choice = summary.baseline
    size = summary.base[_SIZE]
    if len(within):
        smallest = within[within[_SIZE] == within[_SIZE].min()]
        choice = " or ".join(smallest.index)
        size = smallest[_SIZE].iloc[0]

    excluded = rows["low"] > margin
    uncertain = rows[~rows.index.isin(within.index) & ~excluded & (rows[_SIZE] < size)]
    if len(uncertain):
        names = formats.listed(list(uncertain.index))
        needed = _units_to_separate(uncertain, len(summary.compared), margin, summary.unit)
        reason = f"{names} may or may not stay within {_MARGIN_TEXT}; {choice} does"
        return _undecided(goal, f"not separable: {needed}", reason)
    reason = f"{formats.num_bytes(size)} per token"
    if choice == summary.baseline:
        reason += f"; no smaller cache is shown to lose at most {_MARGIN_TEXT}"
    return _decided(goal, choice, reason)


def _half_cache(summary: Summary) -> list:
    """Returns the best score within half of the baseline's cache."""
    limit = summary.base[_SIZE] / 2
    goal = f"At most {formats.num_bytes(limit)} of cache per token, best score"
    variants = summary.variants
    candidates = variants[(variants[_SIZE] <= limit) & variants["score"].notna()]
    if not len(candidates):
        return _undecided(goal, "no variant", "no finished variant has such a small cache")
    return _best_score(summary, goal, candidates)


def _fastest(summary: Summary, goal: str, column: str) -> list:
    """Returns the smallest time ratio, if its interval stays below those of all others."""
    measured = summary.variants[column]
    times = {label: ratio for label, ratio in measured.items() if ratio}
    scope = "" if len(times) == len(measured) else " (of those measured)"
    times[summary.baseline] = [1.0, 1.0, 1.0]
    best = min(times, key=lambda label: times[label][0])
    ratio, _, high = times[best]
    rivals = [label for label, (_, low, _) in times.items() if label != best and low <= high]
    if rivals:
        names = formats.listed([best, *rivals])
        reason = f"the times of {names} overlap{scope}"
        return _undecided(goal, "not separable: measure more rounds", reason)
    reason = f"{formats.ratio(ratio)} the time of {summary.baseline}"
    if best == summary.baseline:
        reason = "every other variant takes longer"
    return _decided(goal, best, f"{reason}{scope}")


def _units_to_separate(rows: pd.DataFrame, comparisons: int, margin: float, unit: str) -> str:
    """Returns how many seeds (or settings) would separate each difference from the margin."""
    if rows["low"].isna().any():
        return f"run at least three {unit}s"
    rows = rows[rows["ties"] < rows["pairs"]]
    if not len(rows):
        return "identical scores"
    needed = [statistics.units_needed(row, comparisons, margin) for _, row in rows.iterrows()]
    if None in needed:
        return f"needs more than {statistics.MOST_UNITS:,} {unit}s"
    return f"needs about {max(needed):,} {unit}s"
