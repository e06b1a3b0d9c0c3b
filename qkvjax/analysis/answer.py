"""The answer in plain words, computed from the intervals and never stronger than they are."""

from __future__ import annotations

from qkvjax.analysis import formats
from qkvjax.analysis.document import Strong
from qkvjax.analysis.sharings import is_sharing_study, masked_bits, paper_bits, pure
from qkvjax.analysis.statistics import BETTER, NOT_SHOWN, WORSE, Paired
from qkvjax.analysis.summary import Row, Summary

_SMALL = 100e6  # parameters below which a study cannot stand for the sizes people deploy


def answer(summary: Summary) -> list[list[str]]:
    """Two or three paragraphs (lists of text runs): the finding, the others, the limits."""
    base = summary.baseline
    if base.score is None:
        return [_no_baseline(summary)]
    if not summary.compared:
        return [_alone(summary), _missing(summary)] if _missing(summary) else [_alone(summary)]
    if len(summary.compared) == len([r for r in summary.compared if _is_zero(r.paired)]):
        return [_identical(summary), _missing(summary) + _limits(summary)]
    head = None
    if is_sharing_study(summary):
        row = pure(summary, "q-k=v")
        head = row if row and row.paired else None
    first = _tied(summary, head) if head else _counted(summary)
    rest = [row for row in summary.compared if row is not head]
    paragraphs = [first, _others(summary, rest), _missing(summary) + _limits(summary)]
    return [paragraph for paragraph in paragraphs if paragraph]


def measured_difference(summary: Summary, row: Row) -> str:
    """ "+1.3 % (+0.7 % to +1.9 %)", or without the interval where there is none."""
    pair = row.paired
    if _is_zero(pair):
        return "exactly 0"
    middle, low, high = map(summary.relative, (pair.mean, pair.low, pair.high))
    span = "no interval" if low is None else formats.percent_span(middle, low, high)
    return f"{formats.percent(middle)} ({span})"


def _is_zero(pair: Paired) -> bool:
    return pair.mean == 0 and pair.low == 0 and pair.high == 0


def _no_baseline(summary: Summary) -> list[str]:
    label = summary.baseline.label
    if not summary.results:
        return [Strong("No run has finished, so there is no answer yet.")]
    return [
        Strong(f"The baseline {label} has no finished run, so nothing can be compared."),
        " The scores of the other variants stand in the table below.",
    ]


def _alone(summary: Summary) -> list[str]:
    base = summary.baseline
    metric = summary.metric
    text = f" Its {metric.name}: {metric.text(base.score.mean)}"
    if base.score.low is not None:
        text += f" ({formats.span(base.score.low, base.score.high, metric.text)})"
    why = "no other variant finished a seed that it finished" if summary.others else "it ran alone"
    return [
        Strong(f"Nothing is compared with {base.label}: {why}."),
        f"{text}, over {summary.runs(base.score.n)}.",
    ]


def _identical(summary: Summary) -> list[str]:
    labels = formats.listed([row.label for row in summary.compared])
    base = summary.baseline.label
    return [
        Strong(f"Exactly the same scores: {labels} and {base} agree in every seed."),
        " That is what two copies of one computation give (an A/A study): no difference, and no"
        " noise between paired runs.",
    ]


def _tied(summary: Summary, row: Row) -> list[str]:
    """The headline: keys and values from one projection."""
    pair, base = row.paired, summary.baseline.label
    saved = summary.cache_saved(row)
    cache = ""
    if saved is not None:
        was, now = summary.baseline.cache_bytes_per_token, row.cache_bytes_per_token
        cache = (
            f" Its decode cache is {formats.saved(saved)} smaller: {formats.num_bytes(now)} a token"
            f" instead of {formats.num_bytes(was)}."
        )
        cache += _decoding(row)
    bits = f"{formats.difference(pair.mean)} {summary.metric.name}"
    if pair.low is None:
        return [
            Strong("This run cannot say whether three projections are needed: one seed shows no"
                   " spread."),
            f" With one projection for keys and values, {row.label} differed from {base} by {bits}"
            f" ({formats.percent(summary.relative(pair.mean))}), and nothing here tells that from"
            f" luck.{cache}",
        ]  # fmt: skip
    if _is_zero(pair):
        lead = "Keys and values from one projection scored exactly as from two."
        return [Strong(lead), f" {row.label} and {base} agree in every seed.{cache}"]
    lead = {
        WORSE: "Keys and values that share a projection cost quality here.",
        BETTER: "Keys and values that share a projection score better here.",
        NOT_SHOWN: "No cost of one projection for keys and values is shown here, which is not to"
        " say that there is none.",
    }[pair.verdict]
    interval = f"95 % interval {formats.span(pair.low, pair.high)}, {summary.runs(pair.n)}"
    text = (
        f" {row.label} differs from {base} by {bits} ({interval}), which is"
        f" {measured_difference(summary, row)} {summary.metric.of}."
    )
    return [Strong(lead), text + cache]


def _decoding(row: Row) -> str:
    """What a smaller cache did to the time of decoding, where that was measured."""
    ratio, low, high = row.measured.get("decode_ratio") or (None,) * 3
    if ratio is None:
        return ""
    if low <= 1 <= high:
        return " No difference in decoding time was measured."
    return f" Decoding a token took {ratio:.2f} × the time here ({low:.2f} to {high:.2f})."


def _counted(summary: Summary) -> list[str]:
    """The headline of a study about something else: how many variants came out how."""
    rows, base = summary.compared, summary.baseline.label
    if all(row.paired.low is None for row in rows):
        lead = f"This run cannot tell any variant from {base}: one seed shows no spread."
        return [Strong(lead)]
    worse, better = ([r for r in rows if r.paired.verdict == v] for v in (WORSE, BETTER))
    if not worse and not better:
        lead = f"No variant is shown to differ from {base}, which does not make them equal."
    else:
        parts = [f"{len(found)} {word}" for found, word in ((better, "better"), (worse, "worse"))
                 if found]  # fmt: skip
        open_ = len(rows) - len(worse) - len(better)
        parts += [f"{open_} with no difference shown"] if open_ else []
        noun = "variant" if len(rows) == 1 else "variants"
        lead = f"Of {len(rows)} {noun} compared with {base}: {formats.listed(parts)}."
    return [Strong(lead)]


def _others(summary: Summary, rows: list[Row]) -> list[str]:
    """A sentence for each verdict, with the rows that have it."""
    text, base = "", summary.baseline.label
    unjudged = [row for row in rows if row.paired.low is None]
    for verdict, words in (
        (BETTER, f"Better than {base}: "),
        (WORSE, f"Worse than {base}: "),
        (NOT_SHOWN, f"No difference from {base} shown: "),
    ):
        found = [row for row in rows if row.paired.verdict == verdict and row not in unjudged]
        if found:
            each = [f"{r.label} {measured_difference(summary, r)}" for r in found]
            text += f" {words}{formats.listed(each)}."
    if unjudged:
        each = [f"{r.label} {formats.percent(summary.relative(r.paired.mean))}" for r in unjudged]
        text += f" Without an interval, so without a verdict: {formats.listed(each)}."
    return [text.strip()] if text else []


def _missing(summary: Summary) -> list[str]:
    """Sentences about variants that failed wholly or in part."""
    planned = summary.planned
    without = [row.label for row in summary.others if not row.results]
    partly = [
        f"{row.label} ({len(row.results)} of {planned})"
        for row in summary.rows
        if 0 < len(row.results) < planned
    ]
    text = ""
    if without:
        verb = "has" if len(without) == 1 else "have"
        text += f"{formats.listed(without)} {verb} no finished run and no place in the answer. "
    if partly:
        text += f"Seeds are missing: {formats.listed(partly)}. "
    return [text] if text else []


def _limits(summary: Summary) -> list[str]:
    """What the run is too small to tell."""
    base, rows = summary.baseline, summary.compared
    counts = sorted({row.paired.n for row in rows})
    seeds = summary.runs(counts[0])
    if len(counts) > 1:
        seeds = f"{counts[0]} to {summary.runs(counts[-1])}"
    effects = [row.paired.smallest_detectable_effect for row in rows]
    sizes = [summary.relative(effect) for effect in effects if effect]
    if sizes:
        low, high = (formats.percent(size, sign=False) for size in (min(sizes), max(sizes)))
        span = low if low == high else f"{low} to {high} (by variant)"
        text = (
            f"What this run is too small to tell: with {seeds}, true differences below {span}"
            f" {summary.metric.of} are missed at least one time in five"
        )
    elif None in effects:
        text = (
            f"What this run is too small to tell: with {seeds}, whether any difference is more"
            " than luck (run at least three)"
        )
    else:
        text = "What this run cannot tell: how variants compare that do not compute the same"
    tokens = base.results[min(base.results)].get("tokens")
    if tokens and base.num_params and not summary.settings:
        text += (
            f"; and models of {formats.count(base.num_params)} parameters that read"
            f" {formats.count(tokens)} tokens ({tokens / base.num_params:.2g} a parameter) do not"
            " speak for larger or longer ones"
        )
    text += "."
    if is_sharing_study(summary) and summary.metric.relative:
        text += _literature(summary)
    return [text]


def _literature(summary: Summary) -> str:
    start = " For comparison, the paper reports"
    row = pure(summary, "q-k=v")
    found = summary.relative(row.paired.mean) if row and row.paired else None
    if found is not None and (summary.baseline.num_params or 0) < _SMALL:
        start = " Small, short runs overstate what tying costs: the paper reports"
        if found <= paper_bits("q-k=v"):
            start = " The gap moves with training, so that a small, short run may tell too much or"
            start += " too little of it: the paper reports"
    return (
        f"{start} +3.1 % perplexity for Q-K=V at 300M parameters"
        f" ({formats.percent(paper_bits('q-k=v'))} of its bits, padding scored), and its authors’"
        f" rerun with padding masked +2.2 % perplexity ({formats.percent(masked_bits())} of the"
        " bits)."
    )
