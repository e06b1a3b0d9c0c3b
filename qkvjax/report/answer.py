"""The answer of a study in plain words, computed from its intervals and never stronger than they
are."""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd

from qkvjax import formats
from qkvjax.report import literature
from qkvjax.report.statistics import BETTER, NOT_SHOWN, WORSE
from qkvjax.report.summary import MARGIN, Summary

_SMALL_MODEL = 100e6  # parameters; studies below it do not stand for the sizes that people deploy
_FRACTIONS = {1 / 2: "half", 1 / 4: "a quarter", 1 / 8: "an eighth", 1 / 16: "a sixteenth"}


class Answer(NamedTuple):
    """A paragraph of the answer.

    Attributes:
      lead: its first sentence, set in bold; may be empty.
      text: the rest.
    """

    lead: str
    text: str


def answer(summary: Summary) -> list[Answer]:
    """Returns the finding, the other variants, the test set, and the limits of the study."""
    if math.isnan(summary.base["score"]):
        return [_without_baseline(summary)]
    if not len(summary.compared):
        return [_without_comparison(summary), *_missing_runs(summary)]
    paragraphs = [
        *_equal_cache(summary),
        *_against_baseline(summary),
        *_ceiling(summary),
        *_test_set(summary),
        *_missing_runs(summary),
        _limits(summary),
    ]
    first = paragraphs[0]
    if not first.lead:  # the whole first paragraph is the finding: set it in bold
        paragraphs[0] = Answer(first.text, "")
    return paragraphs


def measured_difference(summary: Summary, row: pd.Series) -> str:
    """Returns "+1.3 % (+0.7 % to +1.9 %)", or "+1.3 % (no interval)" where there is none."""
    if row["difference"] == row["low"] == row["high"] == 0:
        return "exactly 0"
    middle = summary.relative(row["difference"])
    low = summary.relative(row["low"])
    high = summary.relative(row["high"])
    interval = "no interval" if math.isnan(low) else formats.percent_span(middle, low, high)
    return f"{formats.percent(middle)} ({interval})"


def count_units(summary: Summary, count: float) -> str:
    """Returns how many independent observations a figure has: "3 seeds", or "12 settings"."""
    count = int(count)
    plural = "" if count == 1 else "s"
    return f"{count:,} {summary.unit}{plural}"


def _without_baseline(summary: Summary) -> Answer:
    if not len(summary.done):
        return Answer("No run has finished, so there is no answer yet.", "")
    lead = f"The baseline {summary.baseline} has no finished run, so nothing can be compared."
    return Answer(lead, "The table below has the scores of the other variants.")


def _without_comparison(summary: Summary) -> Answer:
    """Returns the baseline's score where no other variant can be compared with it."""
    baseline = summary.baseline
    metric = summary.metric
    reason = "it is the only variant"
    if len(summary.variants) > 1:
        reason = f"no other variant finished a seed that {baseline} finished"
    text = f"Its {metric.name}: {metric.text(summary.base['score'])}"
    low = summary.base["score_low"]
    high = summary.base["score_high"]
    if not math.isnan(low):
        text += f" ({formats.span(low, high, metric.text)})"
    text += f", over {formats.seeds(int(summary.base['num_runs']))}."
    return Answer(f"Nothing is compared with {baseline}: {reason}.", text)


def _equal_cache(summary: Summary) -> list[Answer]:
    """Returns a paragraph for each cache size: which of its variants uses the bytes best."""
    return [_best_use(summary, group) for group in summary.equal_cache()]


def _best_use(summary: Summary, group: pd.DataFrame) -> Answer:
    """Returns the best of the variants with one cache size.

    Args:
      group: one of `Summary.equal_cache`, the best variant first.
    """
    size = group["cache_bytes_per_token"].iloc[0]
    fraction = _fraction(size / summary.base["cache_bytes_per_token"])
    bytes_text = formats.num_bytes(size)
    start = f"With {bytes_text} of cache per token ({fraction} of {summary.baseline}’s),"

    best = group.index[0]
    others = group.iloc[1:]
    worse = others[others["verdict"] == WORSE]
    undecided = list(others.index[others["verdict"] != WORSE])
    if not len(worse):
        names = formats.listed([best, *undecided])
        lead = f"{start} this study does not separate {names}."
        return Answer(lead, f"{best} has the best mean score.")

    gaps = formats.listed([f"{label} by {_gap(summary, row)}" for label, row in worse.iterrows()])
    if undecided:
        lead = f"{start} {best} has the best mean score and is better than {gaps}."
        names = formats.listed(undecided)
        return Answer(lead, f"This study does not separate {best} from {names}.")
    lead = f"{start} {best} is the best use of these bytes among the variants tried:"
    return Answer(f"{lead} it is better than {gaps}.", "")


def _fraction(part: float) -> str:
    """Returns "a quarter", or a percentage where there is no such word."""
    return _FRACTIONS.get(part) or formats.percent(part, sign=False)


def _gap(summary: Summary, row: pd.Series) -> str:
    """Returns "0.120 bits per byte (0.056 to 0.183)"."""
    metric = summary.metric
    interval = formats.span(row["low"], row["high"], metric.text)
    return f"{metric.text(row['difference'])} {metric.name} ({interval})"


def _against_baseline(summary: Summary) -> list[Answer]:
    """Returns a sentence for each verdict against the baseline."""
    baseline = summary.baseline
    rows = summary.compared
    identical = rows["ties"] == rows["pairs"]
    if identical.all():
        names = formats.listed(list(rows.index))
        lead = f"{names} and {baseline} have exactly the same score in every run."
        text = (
            "Two copies of one computation give this, and so does a task that all of them solve:"
            " there is no difference, and there is no noise between paired runs."
        )
        return [Answer(lead, text)]

    judged = rows[rows["low"].notna()]
    unjudged = rows[rows["low"].isna()]
    sentences = []
    if not len(judged):
        reason = f"one {summary.unit} does not show how much scores vary"
        if rows["units"].max() > 1:
            reason = "the differences do not vary"
        sentences.append(f"This study cannot separate any variant from {baseline}: {reason}.")
    for verdict, start in (
        (BETTER, f"Better than {baseline}: "),
        (WORSE, f"Worse than {baseline}: "),
        (NOT_SHOWN, f"No difference from {baseline} shown: "),
    ):
        group = judged[judged["verdict"] == verdict]
        if len(group):
            parts = [_difference_and_cache(summary, label, row) for label, row in group.iterrows()]
            sentences.append(f"{start}{'; '.join(parts)}.")
    if len(unjudged):
        parts = [
            f"{label} {formats.percent(summary.relative(row['difference']))}"
            for label, row in unjudged.iterrows()
        ]
        sentences.append(f"No interval, and therefore no verdict: {formats.listed(parts)}.")
    return [Answer("", " ".join(sentences))]


def _difference_and_cache(summary: Summary, label: str, row: pd.Series) -> str:
    """Returns the difference of a variant and what its cache saves."""
    text = f"{label} {measured_difference(summary, row)}"
    if row["equivalent"]:
        text += f", within ±{100 * MARGIN:g} %"
    saved = summary.cache_saved(label)
    if saved > 0:
        text += f", with {formats.saved(saved)} less cache"
    return text


def _ceiling(summary: Summary) -> list[Answer]:
    """Returns a warning where so many scores are equal that the task says little."""
    rows = summary.compared[summary.compared["ceiling"].astype(bool)]
    if not len(rows):
        return []
    parts = [
        f"{label} in {row['ties']:.0f} of {row['pairs']:.0f}" for label, row in rows.iterrows()
    ]
    text = (
        "In at least half of the compared runs, these variants have exactly the same score as"
        f" {summary.baseline}: {formats.listed(parts)}. There the task is too easy or too hard to"
        " tell them apart, so “no difference shown” does not mean that they are equal."
    )
    return [Answer("The task has a ceiling.", text)]


def _test_set(summary: Summary) -> list[Answer]:
    """Returns what resampling the items of the test set adds to the verdicts."""
    items = summary.items
    if not len(items):
        return []
    verdicts = summary.compared["verdict"]
    uncertain = [
        label
        for label, row in items.iterrows()
        if verdicts[label] != NOT_SHOWN and row["low"] <= 0 <= row["high"]
    ]
    count = int(items["num_items"].iloc[0])
    kind = "documents" if summary.metric.relative else "examples"
    text = f"The verdicts are about {summary.unit}s, on this test set."
    text += f" When its {count:,} {kind} are drawn again at random (bootstrap),"
    if (verdicts == NOT_SHOWN).all():
        text += " each difference has a second interval, which is in a table below."
    elif uncertain:
        names = formats.listed(uncertain)
        text += f" the difference of {names} may vanish: another test set may not show it."
    else:
        text += " every difference with a verdict keeps its sign."
    return [Answer("", text)]


def _missing_runs(summary: Summary) -> list[Answer]:
    """Returns which variants failed, wholly or in part."""
    finished = summary.variants["num_runs"]
    absent = list(finished.index[finished == 0])
    incomplete = [
        f"{label} ({count:.0f} of {summary.planned} finished)"
        for label, count in finished.items()
        if 0 < count < summary.planned
    ]
    sentences = []
    if absent:
        verb, pronoun = ("has", "it") if len(absent) == 1 else ("have", "them")
        names = formats.listed(absent)
        sentences.append(f"{names} {verb} no finished run, so the answer leaves {pronoun} out.")
    if incomplete:
        sentences.append(f"Some runs are missing: {formats.listed(incomplete)}.")
    return [Answer("", " ".join(sentences))] if sentences else []


def _limits(summary: Summary) -> Answer:
    """Returns what the study is too small to tell."""
    sentences = [
        _detection_limit(summary),
        *_model_size(summary),
        *_without_peer(summary),
        *_literature(summary),
    ]
    return Answer("What this study is too small to tell.", " ".join(sentences))


def _detection_limit(summary: Summary) -> str:
    """Returns the sentence about differences that are too small for this number of runs."""
    rows = summary.compared
    counts = sorted(set(rows["units"]))
    observations = count_units(summary, counts[-1])
    if len(counts) > 1:
        observations = f"{counts[0]:.0f} to {observations}"
    effects = [summary.relative(effect) for effect in rows["detectable"] if effect > 0]
    if effects:
        low = formats.percent(min(effects), sign=False)
        high = formats.percent(max(effects), sign=False)
        limit = low if low == high else f"{low} to {high} (by variant)"
        return (
            f"With {observations}, the study misses true differences below about {limit}"
            f" {summary.metric.of} at least one time in five."
        )
    if rows["detectable"].isna().any():
        return (
            f"With {observations}, the study cannot tell whether any difference is more than luck:"
            f" run at least three {summary.unit}s."
        )
    return "All scores are equal, so it does not show how variants with different scores compare."


def _model_size(summary: Summary) -> list[str]:
    """Returns the sentence that limits the results to this size of model and length of training."""
    params = summary.base["num_params"]
    done = summary.done
    tokens = done.loc[done["label"] == summary.baseline, "tokens"].max()
    if not (tokens > 0 and params > 0) or summary.settings:
        return []
    return [
        f"Models of {formats.count(params)} parameters that read {formats.count(tokens)} tokens"
        f" ({tokens / params:.2g} per parameter) do not speak for larger models or longer training."
    ]


def _without_peer(summary: Summary) -> list[str]:
    """Returns the sentence about variants whose smaller cache no other variant has."""
    sizes = summary.variants["cache_bytes_per_token"].dropna()
    sizes = sizes[sizes < summary.base["cache_bytes_per_token"]]
    alone = [label for label, size in sizes.items() if (sizes == size).sum() == 1]
    if not alone:
        return []
    return [
        f"No other variant has the cache size of {formats.listed(alone)}, so this study does not"
        " tell whether these bytes have a better use (qkvjax.sweep.equal_cache adds such a"
        " variant)."
    ]


def _literature(summary: Summary) -> list[str]:
    """Returns what the paper reports for Q-K=V, in a study of text that has this variant."""
    label = literature.pure(summary, "q-k=v")
    if label is None or not summary.metric.relative:
        return []
    paper = literature.paper_bits("Q-K=V")
    difference = summary.variants.loc[label, "difference"]
    low = summary.variants.loc[label, "low"]
    sentences = []
    if summary.base["num_params"] < _SMALL_MODEL and not math.isnan(difference):
        if summary.relative(low) > paper:
            sentences.append("Small, short runs overstate what tying costs.")
        else:
            sentences.append(
                "The gap changes during training, so a small, short run may show too much or too"
                " little of it."
            )
    sentences.append(
        "For comparison, the paper reports +3.1 % perplexity for Q-K=V at 300M parameters"
        f" ({formats.percent(paper)} of its bits, padding scored)."
    )
    sentences.append(
        "Its authors’ rerun with padding masked gives +2.2 % perplexity"
        f" ({formats.percent(literature.masked_bits())} of the bits)."
    )
    return sentences
