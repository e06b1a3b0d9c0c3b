"""Which variant to take for what one wants, or how many seeds would separate the candidates."""

from __future__ import annotations

from typing import NamedTuple

from qkvjax.analysis import formats
from qkvjax.analysis.metric import Metric
from qkvjax.analysis.statistics import Paired, paired, seeds_needed
from qkvjax.analysis.summary import Row, Summary

MARGIN = 0.01  # of the baseline's bits: "at most 1 % loss"


class Decision(NamedTuple):
    """A wish, the variant that meets it (or why none is named), and the reason."""

    wish: str
    choice: str
    reason: str
    decided: bool


def decisions(summary: Summary) -> list[Decision]:
    """The decision table of a study; empty when nothing is compared."""
    if not summary.compared:
        return []
    rows = [summary.baseline, *summary.compared]
    caches = {row.cache_bytes_per_token for row in rows}
    return [
        _best("Best quality", rows, summary.metric),
        *([_cheap(summary), _half(summary, rows)] if len(caches) > 1 else []),
        *(
            _fastest(f"Fastest {what} here", rows, summary, key)
            for what, key in (("training step", "step_ratio"), ("decoding", "decode_ratio"))
            if summary.records.measurements or summary.metric.relative
        ),
    ]


def _best(wish: str, rows: list[Row], metric: Metric) -> Decision:
    """The best mean score, if its paired interval to every rival excludes zero."""
    best = min(rows, key=lambda row: row.score.mean)
    score = f"{metric.text(best.score.mean)} {metric.name}"
    rivals = []
    for row in rows:
        pair = None if row is best else paired(best.scores, row.scores)
        if row is not best and (pair is None or pair.low is None or pair.low <= 0):
            rivals.append((row, pair))
    if not rivals:
        more = ", better than every other" if len(rows) > 1 else ", the only one that finished"
        return Decision(wish, best.label, score + more, True)
    names = formats.listed([row.label for row, _ in rivals])
    needed = _more([(pair, 0.0) for _, pair in rivals])
    why = f"{best.label} leads, and is not shown to be better than {names}"
    return Decision(wish, f"not separable: {needed}", why, False)


def _cheap(summary: Summary) -> Decision:
    """The smallest cache among variants whose whole interval stays within the margin.

    A variant with a smaller cache whose interval straddles the margin leaves it open.
    """
    wish = f"At most {100 * MARGIN:g} % loss, smallest cache"
    margin = MARGIN * summary.baseline.score.mean
    if summary.baseline.cache_bytes_per_token is None:
        return Decision(wish, formats.NOT_MEASURED, "the cache sizes are unknown", False)
    shown, unsure = [summary.baseline], []
    for row in summary.compared:
        pair = row.paired
        if row.cache_bytes_per_token is None:
            continue
        if pair.high is not None and pair.high <= margin:
            shown.append(row)
        elif pair.low is None or pair.low <= margin:
            unsure.append(row)
    choice = min(shown, key=lambda row: (row.cache_bytes_per_token, row.score.mean))
    smaller = [r for r in unsure if r.cache_bytes_per_token < choice.cache_bytes_per_token]
    if smaller:
        names = formats.listed([row.label for row in smaller])
        needed = _more([(row.paired, margin) for row in smaller])
        reason = f"{names} may or may not stay within it; {choice.label} does"
        return Decision(wish, f"not separable: {needed}", reason, False)
    reason = f"{formats.num_bytes(choice.cache_bytes_per_token)} a token"
    if choice is summary.baseline:
        reason += "; no smaller cache is shown to lose so little"
    return Decision(wish, choice.label, reason, True)


def _half(summary: Summary, rows: list[Row]) -> Decision:
    """The best score within half of the baseline's cache."""
    whole = summary.baseline.cache_bytes_per_token
    if not whole:
        wish = "At most half the cache, best score"
        return Decision(wish, formats.NOT_MEASURED, "the cache sizes are unknown", False)
    wish = f"At most {formats.num_bytes(whole / 2)} of cache a token, best score"
    small = [r for r in rows if (r.cache_bytes_per_token or whole) <= whole / 2]
    if not small:
        return Decision(wish, "no variant", "none that finished has so small a cache", False)
    return _best(wish, small, summary.metric)


def _fastest(wish: str, rows: list[Row], summary: Summary, key: str) -> Decision:
    """The smallest time ratio, if its interval stays below those of all others."""
    times = {row.label: row.measured[key] for row in rows if row.measured.get(key)}
    times.pop(summary.baseline.label, None)
    if not times:
        return Decision(wish, formats.NOT_MEASURED, "no measurements.json has it", False)
    times[summary.baseline.label] = [1.0, 1.0, 1.0]
    label = min(times, key=lambda name: times[name][0])
    rivals = [name for name, t in times.items() if name != label and t[1] <= times[label][2]]
    reason = f"{formats.ratio(times[label][0])} the time of {summary.baseline.label}"
    if label == summary.baseline.label:
        reason = "each other variant takes longer"
    if rivals:
        names = formats.listed([label, *rivals])
        return Decision(wish, "not separable: measure more rounds", f"{names} overlap", False)
    return Decision(wish, label, reason, True)


def _more(pairs: list[tuple[Paired | None, float]]) -> str:
    """How many more seeds would tell each pair's difference from its margin."""
    if any(pair is None or pair.low is None for pair, _ in pairs):
        return "run at least three seeds"
    if any(pair.mean == pair.low == pair.high == margin for pair, margin in pairs):
        return "identical scores"
    needed = [seeds_needed(pair, margin) for pair, margin in pairs]
    if None in needed:
        return "more than 1,000 seeds would be needed"
    more = max(1, max(n - pair.n for n, (pair, _) in zip(needed, pairs)))
    return f"about {more:,} more {'seed' if more == 1 else 'seeds'}"
