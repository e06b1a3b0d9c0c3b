"""Which variant to take for what one wants, or how many seeds would separate the candidates."""

from __future__ import annotations

import pandas as pd

from qkvjax import formats
from qkvjax.report import statistics
from qkvjax.report.summary import MARGIN, Summary
from qkvjax.report.tables import Cell, Table, table


def decisions(summary: Summary) -> Table | None:
    """Returns the decision table of a study; None when nothing is compared."""
    if not len(summary.compared):
        return None
    rows = [_best(summary, "Best quality", summary.variants)]
    caches = summary.variants["cache_bytes_per_token"].dropna()
    if caches.nunique() > 1 and summary.base["cache_bytes_per_token"] > 0:
        rows += [_smallest(summary), _half(summary)]
    for what, key in (("training step", "step_ratio"), ("decoding", "decode_ratio")):
        if summary.variants[key].notna().any():
            rows.append(_fastest(summary, f"Fastest {what} here", key))
    caption = (
        "For this model, on this data and device. A variant is named only where its intervals"
        " separate it from the other candidates; the seeds that would are for 80 % power."
    )
    return table(["If you want", "take", "because"], rows, ("take", "because"), caption)


def _decided(wish: str, choice: str, reason: str) -> list:
    return [wish, Cell(choice, tone="good"), reason]


def _open(wish: str, choice: str, reason: str) -> list:
    return [wish, Cell(choice, tone="quiet"), reason]


def _best(summary: Summary, wish: str, candidates: pd.DataFrame) -> list:
    """The best mean score, if its corrected interval to every rival excludes zero."""
    candidates = candidates[candidates["score"].notna()]
    scores = summary.done[summary.done["label"].isin(candidates.index)]
    against = statistics.compare_best(scores)
    if against is None:
        return _open(wish, "not comparable", "the candidates have no run in common")
    best = against.index[0]
    score = f"{summary.metric.text(candidates.loc[best, 'score'])} {summary.metric.name}"
    against = against.iloc[1:]
    rivals = against[against["verdict"] != statistics.WORSE]
    if not len(rivals):
        more = ", better than every other" if len(against) else ", the only one of this kind"
        return _decided(wish, best, score + more)
    names = formats.listed(list(rivals.index))
    needed = _more(rivals, len(against), 0.0, summary.unit)
    reason = f"{best} leads, and is not shown to be better than {names}"
    return _open(wish, f"not separable: {needed}", reason)


def _smallest(summary: Summary) -> list:
    """The smallest cache among variants whose whole interval stays within the margin.

    A variant with a smaller cache whose interval straddles the margin leaves it open.
    """
    wish = f"At most {100 * MARGIN:g} % loss, smallest cache"
    margin = MARGIN * (summary.base["score"] if summary.metric.relative else 1)
    size = "cache_bytes_per_token"
    rows = summary.compared[summary.compared[size].notna()]
    informative = ~rows["ceiling"].astype(bool)
    shown = rows[(rows["high"] <= margin) & informative & (rows[size] < summary.base[size])]
    choice, cache = summary.baseline, summary.base[size]
    if len(shown):
        smallest = shown[shown[size] == shown[size].min()]
        choice, cache = " or ".join(smallest.index), smallest[size].iloc[0]
    unsure = rows[~rows.index.isin(shown.index) & ~(rows["low"] > margin) & (rows[size] < cache)]
    if len(unsure):
        names = formats.listed(list(unsure.index))
        reason = f"{names} may or may not stay within it; {choice} does"
        needed = _more(unsure, len(summary.compared), margin, summary.unit)
        return _open(wish, f"not separable: {needed}", reason)
    reason = f"{formats.num_bytes(cache)} a token"
    if choice == summary.baseline:
        reason += "; no smaller cache is shown to lose so little"
    return _decided(wish, choice, reason)


def _half(summary: Summary) -> list:
    """The best score within half of the baseline's cache."""
    size = "cache_bytes_per_token"
    limit = summary.base[size] / 2
    wish = f"At most {formats.num_bytes(limit)} of cache a token, best score"
    small = summary.variants[(summary.variants[size] <= limit) & summary.variants["score"].notna()]
    if not len(small):
        return _open(wish, "no variant", "none that finished has so small a cache")
    return _best(summary, wish, small)


def _fastest(summary: Summary, wish: str, key: str) -> list:
    """The smallest time ratio, if its interval stays below those of all others."""
    times = {label: ratio for label, ratio in summary.variants[key].items() if ratio}
    measured = "" if len(times) == len(summary.variants) else ", of those measured"
    times[summary.baseline] = [1.0, 1.0, 1.0]
    best = min(times, key=lambda label: times[label][0])
    rivals = [name for name, t in times.items() if name != best and t[1] <= times[best][2]]
    if rivals:
        names = formats.listed([best, *rivals])
        return _open(wish, "not separable: measure more rounds", f"{names} overlap{measured}")
    reason = f"{formats.ratio(times[best][0])} the time of {summary.baseline}"
    if best == summary.baseline:
        reason = "each other variant takes longer"
    return _decided(wish, best, reason + measured)


def _more(rows: pd.DataFrame, comparisons: int, margin: float, unit: str) -> str:
    """Returns how many seeds (or settings) would tell each difference from the margin."""
    if rows["low"].isna().any():
        return f"run at least three {unit}s"
    rows = rows[rows["ties"] < rows["pairs"]]
    if not len(rows):
        return "identical scores"
    needed = [statistics.units_needed(row, comparisons, margin) for _, row in rows.iterrows()]
    if None in needed:
        return f"more than {statistics.MOST_UNITS:,} {unit}s"
    return f"about {max(needed):,} {unit}s"
