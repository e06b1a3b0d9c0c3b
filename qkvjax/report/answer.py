"""The answer in plain words, computed from the intervals and never stronger than they are."""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd

from qkvjax import formats
from qkvjax.report import literature
from qkvjax.report.statistics import BETTER, NOT_SHOWN, WORSE
from qkvjax.report.summary import MARGIN, Summary

_SMALL = 100e6  # parameters below which a study does not stand for the sizes that people deploy


class Answer(NamedTuple):
    """A paragraph: what stands out, and the rest."""

    lead: str
    text: str


def answer(summary: Summary) -> list[Answer]:
    """Returns the finding, the other variants, the test set, and the limits of the study."""
    if math.isnan(summary.base["score"]):
        return [_without_baseline(summary)]
    if not len(summary.compared):
        return [_alone(summary), *_missing(summary)]
    paragraphs = [
        *_equal_cache(summary),
        *_against_baseline(summary),
        *_ceiling(summary),
        *_test_set(summary),
        *_missing(summary),
        *_limits(summary),
    ]
    first = paragraphs[0]
    if not first.lead:  # the first sentence answers
        paragraphs[0] = Answer(first.text, "")
    return paragraphs


def measured_difference(summary: Summary, row: pd.Series) -> str:
    """Returns "+1.3 % (+0.7 % to +1.9 %)", or without the interval where there is none."""
    if row["difference"] == row["low"] == row["high"] == 0:
        return "exactly 0"
    middle, low, high = (summary.relative(row[name]) for name in ("difference", "low", "high"))
    span = "no interval" if math.isnan(low) else formats.percent_span(middle, low, high)
    return f"{formats.percent(middle)} ({span})"


def runs(summary: Summary, count: float) -> str:
    """Returns what a figure stands on: "3 seeds", or "12 settings"."""
    count = int(count)
    return f"{count:,} {summary.unit}{'s' * (count != 1)}"


def _without_baseline(summary: Summary) -> Answer:
    if not len(summary.done):
        return Answer("No run has finished, so there is no answer yet.", "")
    lead = f"The baseline {summary.baseline} has no finished run, so nothing can be compared."
    return Answer(lead, "The scores of the other variants stand in the table below.")


def _alone(summary: Summary) -> Answer:
    base = summary.base
    metric = summary.metric
    several = len(summary.variants) > 1
    why = "no other variant finished a seed that it finished" if several else "it ran alone"
    text = f"Its {metric.name}: {metric.text(base['score'])}"
    if not math.isnan(base["score_low"]):
        text += f" ({formats.span(base['score_low'], base['score_high'], metric.text)})"
    text += f", over {formats.seeds(int(base['num_runs']))}."
    return Answer(f"Nothing is compared with {summary.baseline}: {why}.", text)


def _equal_cache(summary: Summary) -> list[Answer]:
    """What is the best use of so many bytes: the variants of one cache size among themselves."""
    found = []
    for group in summary.equal_cache():
        size = group["cache_bytes_per_token"].iloc[0]
        part = size / summary.base["cache_bytes_per_token"]
        where = f"With {formats.num_bytes(size)} of cache a token ({_fraction(part)} of"
        where += f" {summary.baseline}’s)"
        best = group.index[0]
        others = group.iloc[1:]
        worse = others[others["verdict"] == WORSE]
        alike = others[others["verdict"] != WORSE]
        gaps = [f"{label}, by {_gap(summary, row)}" for label, row in worse.iterrows()]
        if not len(worse):
            names = formats.listed([best, *alike.index])
            lead = f"{where}, {names} are not told apart by this study."
            found.append(Answer(lead, f"The best mean is that of {best}."))
            continue
        lead = f"{where}, {best} is the best use of these bytes among the variants tried:"
        lead += f" better than {formats.listed(gaps)}."
        text = ""
        if len(alike):
            lead = f"{where}, {best} has the best mean and is better than {formats.listed(gaps)}."
            text = f"{formats.listed(list(alike.index))}: not told apart from {best}."
        found.append(Answer(lead, text))
    return found


def _fraction(part: float) -> str:
    names = {1 / 2: "half", 1 / 4: "a quarter", 1 / 8: "an eighth", 1 / 16: "a sixteenth"}
    return names.get(part, formats.percent(part, sign=False))


def _gap(summary: Summary, row: pd.Series) -> str:
    """Returns "0.120 bits per byte (0.056 to 0.183)"."""
    text = summary.metric.text
    span = formats.span(row["low"], row["high"], text)
    return f"{text(row['difference'])} {summary.metric.name} ({span})"


def _against_baseline(summary: Summary) -> list[Answer]:
    """A sentence for each verdict against the baseline."""
    base = summary.baseline
    rows = summary.compared
    zero = rows[rows["ties"] == rows["pairs"]]
    if len(zero) == len(rows):
        names = formats.listed(list(rows.index))
        lead = f"Exactly the same scores: {names} and {base} agree in every run."
        text = "That is what two copies of one computation give, or a task that all of them solve:"
        return [Answer(lead, f"{text} no difference, and no noise between paired runs.")]
    judged = rows[rows["low"].notna()]
    unjudged = rows[rows["low"].isna()]
    sentences = []
    if not len(judged):
        why = "one seed shows no spread"
        if rows["units"].max() > 1:
            why = "the differences show no spread"
        sentences.append(f"This run cannot tell any variant from {base}: {why}.")
    for verdict, words in (
        (BETTER, f"Better than {base}: "),
        (WORSE, f"Worse than {base}: "),
        (NOT_SHOWN, f"No difference from {base} shown: "),
    ):
        same = judged[judged["verdict"] == verdict]
        if len(same):
            each = [_with_cache(summary, label, row) for label, row in same.iterrows()]
            sentences.append(f"{words}{'; '.join(each)}.")
    if len(unjudged):
        each = [
            f"{label} {formats.percent(summary.relative(row['difference']))}"
            for label, row in unjudged.iterrows()
        ]
        sentences.append(f"Without an interval, so without a verdict: {formats.listed(each)}.")
    return [Answer("", " ".join(sentences))]


def _with_cache(summary: Summary, label: str, row: pd.Series) -> str:
    """Returns the difference of a variant, what its cache saves, and its time of decoding."""
    text = f"{label} {measured_difference(summary, row)}"
    if row["equivalent"]:
        text += f", within ±{100 * MARGIN:g} %"
    saved = summary.cache_saved(label)
    if saved > 0:
        text += f", with {formats.saved(saved)} less cache"
    return text


def _ceiling(summary: Summary) -> list[Answer]:
    rows = summary.compared[summary.compared["ceiling"].astype(bool)]
    if not len(rows):
        return []
    each = [f"{label} in {row['ties']:.0f} of {row['pairs']:.0f}" for label, row in rows.iterrows()]
    text = f"In at least half of the pairs a variant and {summary.baseline} have exactly the same"
    text += f" score ({formats.listed(each)}): the task is too easy or too hard there to tell them"
    text += " apart, and “no difference shown” is not a sign of equality."
    return [Answer("A ceiling.", text)]


def _test_set(summary: Summary) -> list[Answer]:
    """What the sampling of the test set adds."""
    items = summary.items
    if not len(items):
        return []
    count = int(items["num_items"].iloc[0])
    unsure = [
        label
        for label, row in items.iterrows()
        if summary.compared.loc[label, "verdict"] != NOT_SHOWN and row["low"] <= 0 <= row["high"]
    ]
    about = f"{summary.unit}s"
    items_word = "documents" if summary.metric.relative else "examples"
    text = f"Verdicts are about {about}, on this test set. Over its {count:,} {items_word}, drawn"
    text += " anew (bootstrap), "
    if (summary.compared["verdict"] == NOT_SHOWN).all():
        text += "each has an interval of its own in the table below."
    elif unsure:
        text += f"the difference of {formats.listed(unsure)} may vanish: another test set may not"
        text += " show it."
    else:
        text += "every difference with a verdict keeps its sign."
    return [Answer("", text)]


def _missing(summary: Summary) -> list[Answer]:
    """Variants that failed wholly or in part."""
    variants = summary.variants
    without = [label for label in variants.index if not variants.loc[label, "num_runs"]]
    partly = [
        f"{label} ({count:.0f} of {summary.planned})"
        for label, count in variants["num_runs"].items()
        if 0 < count < summary.planned
    ]
    text = ""
    if without:
        verb = "has" if len(without) == 1 else "have"
        text += f"{formats.listed(without)} {verb} no finished run and no place in the answer. "
    if partly:
        text += f"Runs are missing: {formats.listed(partly)}."
    return [Answer("", text.strip())] if text else []


def _limits(summary: Summary) -> list[Answer]:
    """What the study is too small to tell."""
    base = summary.base
    rows = summary.compared
    counts = sorted(set(rows["units"]))
    stands_on = runs(summary, counts[0])
    if len(counts) > 1:
        stands_on = f"{counts[0]:.0f} to {runs(summary, counts[-1])}"
    sizes = [summary.relative(effect) for effect in rows["detectable"] if effect > 0]
    text = "What this study is too small to tell: "
    if sizes:
        low, high = (formats.percent(size, sign=False) for size in (min(sizes), max(sizes)))
        span = low if low == high else f"{low} to {high} (by variant)"
        text += f"with {stands_on}, true differences below about {span} {summary.metric.of} are"
        text += " missed at least one time in five"
    elif rows["detectable"].isna().any():
        text += f"with {stands_on}, whether any difference is more than luck (run at least three)"
    else:
        text += "how variants compare that do not compute the same"
    tokens = summary.done.loc[summary.done["label"] == summary.baseline, "tokens"].max()
    if tokens > 0 and base["num_params"] > 0 and not summary.settings:
        each = tokens / base["num_params"]
        text += f"; and models of {formats.count(base['num_params'])} parameters that read"
        text += (
            f" {formats.count(tokens)} tokens ({each:.2g} a parameter) do not speak for larger or"
        )
        text += " longer ones"
    text += "."
    lonely = _without_peer(summary)
    if lonely:
        text += f" No other variant has the cache size of {formats.listed(lonely)}: whether these"
        text += " bytes have a better use is not answered here (qkvjax.sweep.equal_cache adds one)."
    return [Answer("", text + _literature(summary))]


def _without_peer(summary: Summary) -> list[str]:
    """The variants whose smaller cache no other variant shares."""
    sizes = summary.variants["cache_bytes_per_token"].dropna()
    sizes = sizes[sizes < summary.base["cache_bytes_per_token"]]
    return [label for label, size in sizes.items() if (sizes == size).sum() == 1]


def _literature(summary: Summary) -> str:
    label = literature.pure(summary, "q-k=v")
    if label is None or not summary.metric.relative:
        return ""
    ours = summary.variants.loc[label, "difference"]
    start = " For comparison, the paper reports"
    if summary.base["num_params"] < _SMALL and not math.isnan(ours):
        start = " The gap moves with training, so a small, short run may tell too much or too"
        start += " little of it: the paper reports"
        low = summary.variants.loc[label, "low"]
        if summary.relative(low) > literature.paper_bits("Q-K=V"):
            start = " Small, short runs overstate what tying costs: the paper reports"
    return (
        f"{start} +3.1 % perplexity for Q-K=V at 300M parameters"
        f" ({formats.percent(literature.paper_bits('Q-K=V'))} of its bits, padding scored), and its"
        " authors’ rerun with padding masked +2.2 % perplexity"
        f" ({formats.percent(literature.masked_bits())} of the bits)."
    )
