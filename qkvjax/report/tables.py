"""The tables of a report: cells of text, made from the frames of a study."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

from qkvjax import formats
from qkvjax.report import literature
from qkvjax.report.answer import count_units
from qkvjax.report.statistics import BETTER, WORSE
from qkvjax.report.summary import MARGIN, Summary

# Measures of the evaluator `inside` that follow the ranks, in order. A sharing may lack some.
INSIDE = {
    "rank_scores": "rank W_q W_kᵀ",
    "cka_k_v": "CKA k, v",
    "cosine_k_v": "cos W_k, W_v",
    "angles_k_v": "cos of angles k, v",
    "score_asymmetry": "Asymmetry",
    "diagonal_mass": "To oneself",
    "entropy": "Entropy",
    "max_logit": "Max logit",
}


class Cell(NamedTuple):
    """An entry of a table.

    Attributes:
      text: of normal size.
      below: a smaller text below it; may be empty.
      tone: "good", "bad", "quiet" or "".
    """

    text: str
    below: str = ""
    tone: str = ""


class Table(NamedTuple):
    """Rows of cells under columns.

    Attributes:
      columns: their titles.
      rows: as many cells as columns.
      left: titles of the columns that are aligned to the left.
      caption: what stands above the table.
    """

    columns: list[str]
    rows: list[list[Cell]]
    left: tuple[str, ...]
    caption: str


def table(columns: list[str], rows, left: tuple[str, ...] = (), caption: str = "") -> Table:
    """Returns a table; texts become cells, and the first column is aligned to the left."""
    cells = [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in rows]
    return Table(columns, cells, (columns[0], *left), caption)


def verdict(row: pd.Series) -> Cell:
    """Returns a verdict as a symbol and a word, so that it does not depend on colour."""
    if math.isnan(row["low"]):
        return Cell("○ no interval", tone="quiet")
    notes = []
    if row.get("equivalent"):
        notes.append(f"within ±{100 * MARGIN:g} %")
    if row["ceiling"]:
        notes.append(f"ceiling: {row['ties']:.0f} of {row['pairs']:.0f} equal")
    word = row["verdict"]
    symbol = {BETTER: "▲", WORSE: "▼"}.get(word, "○")
    tone = {BETTER: "good", WORSE: "bad"}.get(word, "quiet")
    return Cell(f"{symbol} {word}", ", ".join(notes), tone)


def quality(summary: Summary) -> Table:
    """Returns score, difference from the baseline and verdict of each variant."""
    rows = [_quality_row(summary, label, row) for label, row in summary.variants.iterrows()]
    caption = "Lower is better. The small figures are 95 % intervals"
    count = len(summary.compared)
    if count:
        comparisons = "1 comparison" if count == 1 else f"{count} comparisons"
        observations = count_units(summary, summary.compared["units"].max())
        caption += (
            f"; those of differences are corrected for {comparisons} with {summary.baseline}."
            " “Detectable” is about the smallest true difference that a study with"
            f" {observations} finds four times in five"
        )
    score = summary.metric.name.capitalize()
    columns = ["Variant", score, "Difference", "Verdict", "Detectable", "Val. − train"]
    return table(columns, rows, ("Verdict",), f"{caption}.")


def _quality_row(summary: Summary, label: str, row: pd.Series) -> list:
    none = formats.NONE
    if not row["num_runs"]:
        return [label, none, none, Cell("✗ no finished run", tone="bad"), none, none]
    incomplete = row["num_runs"] < summary.planned
    runs = f"{row['num_runs']:.0f} of {summary.planned} runs" if incomplete else ""
    interval = _interval(row["score_low"], row["score_high"], summary.metric.text)
    score = Cell(summary.metric.text(row["score"]), interval)
    gap = none if math.isnan(row["gap"]) else formats.difference(row["gap"])
    if label == summary.baseline:
        middle = [none, Cell("baseline", tone="quiet"), none]
    elif math.isnan(row["difference"]):
        middle = [none, Cell("○ no common seed", tone="quiet"), none]
    else:
        middle = _difference_cells(summary, row)
    return [Cell(label, runs), score, *middle, gap]


def _difference_cells(summary: Summary, row: pd.Series) -> list[Cell]:
    """Returns the difference from the baseline, its verdict, and what could be detected."""
    middle, low, high = _relative_interval(summary, row)
    interval = "no interval" if math.isnan(low) else formats.percent_span(middle, low, high)
    detectable = formats.NONE
    if row["detectable"] > 0:
        detectable = formats.percent(summary.relative(row["detectable"]), sign=False)
    return [Cell(formats.percent(middle), interval), verdict(row), Cell(detectable)]


def _relative_interval(summary: Summary, row: pd.Series) -> tuple[float, float, float]:
    """Returns (difference, low, high) as parts of the baseline's score."""
    return tuple(summary.relative(row[name]) for name in ("difference", "low", "high"))


def equal_cache(summary: Summary) -> Table | None:
    """Returns the variants of one cache size beside the best of them; None without such a size."""
    metric = summary.metric
    rows = []
    for group in summary.equal_cache():
        best = group.index[0]
        size = formats.num_bytes(group["cache_bytes_per_token"].iloc[0])
        for label, row in group.iterrows():
            score = metric.text(row["score"])
            params = formats.count(row["num_params"])
            if label == best:
                rows.append([size, label, params, score, "–", Cell("best mean", tone="quiet")])
                continue
            interval = formats.signed(_interval(row["low"], row["high"], metric.text))
            gap = Cell(formats.signed(f"+{metric.text(row['difference'])}"), interval)
            rows.append(["", label, params, score, gap, verdict(row)])
    if not rows:
        return None
    score = metric.name.capitalize()
    columns = ["Cache / token", "Variant", "Parameters", score, "From the best", "Verdict"]
    caption = (
        "Variants with the same cache size, each compared with the best mean of that size. The"
        " 95 % intervals are corrected for all comparisons of this table."
    )
    return table(columns, rows, ("Variant", "Verdict"), caption)


def costs(summary: Summary) -> Table:
    """Returns parameters, FLOPs, cache, and times and memory where they were measured."""
    columns = [
        "Variant",
        "Parameters",
        "FLOPs / token",
        "Cache / token",
        "Step time",
        "Peak memory",
        "Decode time",
    ]
    rows = [_cost_row(summary, label, row) for label, row in summary.variants.iterrows()]
    return table(columns, rows, caption=_cost_caption(summary))


def _cost_row(summary: Summary, label: str, row: pd.Series) -> list:
    is_baseline = label == summary.baseline
    saved = summary.cache_saved(label)
    saved_text = "" if is_baseline or math.isnan(saved) else f"{formats.saved(saved)} saved"
    cache = formats.num_bytes(_known(row["cache_bytes_per_token"]))
    return [
        label,
        formats.count(_known(row["num_params"])),
        formats.count(_known(row["train_flops_per_token"])),
        Cell(cache, saved_text),
        _time(row["step_ratio"], row["step_seconds"], is_baseline),
        _peak_memory(summary, row, is_baseline),
        _time(row["decode_ratio"], row["decode_seconds"], is_baseline),
    ]


def _known(value: float | None) -> float | None:
    """Returns None for an unknown value."""
    return None if value is None or math.isnan(value) else float(value)


def _time(ratio: list[float] | None, seconds: float | None, is_baseline: bool) -> Cell:
    """Returns a time as a ratio to the baseline with its interval; the baseline's in seconds."""
    if not ratio and _known(seconds) is None:
        return Cell(formats.NOT_MEASURED, tone="quiet")
    if is_baseline or not ratio:
        return Cell(formats.duration(seconds))
    middle, low, high = ratio
    return Cell(formats.ratio(middle), formats.span(low, high, lambda value: f"{value:.2f}"))


def _peak_memory(summary: Summary, row: pd.Series, is_baseline: bool) -> Cell:
    peak = row["peak_bytes"]
    baseline = summary.base["peak_bytes"]
    if _known(peak) is None:
        return Cell(formats.NOT_MEASURED, tone="quiet")
    change = "" if not baseline or is_baseline else formats.percent(peak / baseline - 1)
    return Cell(formats.num_bytes(peak), change)


def _cost_caption(summary: Summary) -> str:
    measured = summary.files.measured
    exact = "Parameters, FLOPs (forward and backward) and decode cache are exact."
    if not measured.get("rows"):
        return f"{exact} Times and memory were not measured."
    times = "Times are ratios to the baseline, with 95 % intervals"
    if measured.get("rounds"):
        device = f" on {measured['device']}" if measured.get("device") else ""
        times += f"; the variants took turns in one process ({measured['rounds']} rounds{device})"
    memory = "Memory is the peak that the compiler plans for a training step"
    if measured.get("tokens_per_step"):
        memory += f" of {measured['tokens_per_step']:,} tokens"
    sentences = [exact, f"{times}.", f"{memory}."]
    decode = measured.get("decode") or {}
    if decode.get("length"):
        batch = decode.get("batch", "?")
        dtype = decode.get("cache_dtype", "unknown")
        sentences.append(
            f"Decoding is timed per token at {decode['length']:,} cached tokens, batch {batch},"
            f" {dtype} cache."
        )
    return " ".join(sentences)


def items(summary: Summary) -> Table | None:
    """Returns the intervals over the items of the test set; None where runs did not keep them."""
    if not len(summary.items):
        return None
    rows = []
    for label, row in summary.items.iterrows():
        middle, low, high = _relative_interval(summary, row)
        _, seeds_low, seeds_high = _relative_interval(summary, summary.compared.loc[label])
        over_seeds = "no interval"
        if not math.isnan(seeds_low):
            over_seeds = formats.percent_span(middle, seeds_low, seeds_high)
        over_items = formats.percent_span(middle, low, high)
        outcome = "keeps its sign" if low > 0 or high < 0 else "may vanish"
        difference = formats.percent(middle)
        rows.append([label, difference, over_seeds, over_items, Cell(outcome, tone="quiet")])
    count = int(summary.items["num_items"].iloc[0])
    kind = "documents" if summary.metric.relative else "examples"
    columns = ["Variant", "Difference", "Over seeds", f"Over {count:,} {kind}", "Another test set"]
    caption = (
        "Two intervals for two questions. Over seeds (or settings): would other runs show the same"
        " on this test set? Over documents (or examples), by a paired bootstrap: would these runs"
        " show the same on another test set of this size? Both are corrected for all variants."
    )
    return table(columns, rows, ("Another test set",), caption)


def paper(summary: Summary) -> Table | None:
    """Returns the paper's differences beside ours; None without a sharing of the paper."""
    rows = [
        [row["label"], formats.percent(row["ours"]), formats.percent(row["theirs"]), row["name"]]
        for row in literature.beside(summary)
    ]
    if not rows:
        return None
    caption = (
        "Differences from QKV in percent of its bits. The paper (arXiv 2606.04032) has models of"
        " 300M parameters, one run each, with padding scored. In it GQA-4 keeps a quarter of the"
        f" cache and loses {_paper_loss('GQA-4')}, MQA keeps a sixteenth and loses"
        f" {_paper_loss('MQA')}, and Q-K=V keeps half and loses {_paper_loss('Q-K=V')}."
    )
    last = "Name in the paper"
    return table(["Variant", "Here", "Paper", last], rows, (last,), caption)


def _paper_loss(name: str) -> str:
    return formats.percent(literature.paper_bits(name), sign=False)


def tuned(summary: Summary) -> Table | None:
    """Returns the value that each variant was tuned to; None for a study that tunes nothing."""
    tuning = summary.study.get("tuned")
    frame = tuning_scores(summary)
    if not tuning or not len(frame):
        return None
    metric = summary.metric
    values = sorted(frame["value"].unique())
    edges = {values[-1]: "the largest tried", values[0]: "the smallest tried"}
    rows = []
    for label in summary.variants.index:
        means = frame[frame["label"] == label].groupby("value")["score"].mean()
        if not len(means):
            continue
        best = means.idxmin()
        edge = edges.get(best, "") if len(values) > 1 else ""
        cells = {value: Cell(metric.text(means.get(value))) for value in values}
        cells[best] = Cell(metric.text(means[best]), edge, "good")
        rows.append([label, *cells.values()])
    seeds = formats.listed([str(seed) for seed in tuning["seeds"]])
    caption = (
        f"Mean {metric.name} for each value of {tuning['field']}, on the tuning seeds {seeds}. Each"
        " variant is compared at its best value, on other seeds."
    )
    return table(["Variant", *(f"{value:g}" for value in values)], rows, caption=caption)


def tuning_scores(summary: Summary) -> pd.DataFrame:
    """Returns the tuning runs: label, setting, seed, value (of the tuned field) and score."""
    columns = ["label", "setting", "seed", "value", "score"]
    runs = summary.runs
    runs = runs[(runs["phase"] == "tune") & (runs["status"] == "done")]
    if not len(runs):
        return pd.DataFrame(columns=columns)
    return runs.rename(columns={"tuned": "value"})[columns]


def inside(summary: Summary) -> Table | None:
    """Returns what the evaluator `inside` measured; None without it."""
    done = summary.done
    names = [name for name in done.columns if name.startswith("inside/")]
    names = [name for name in names if done[name].notna().any()]
    if not names:
        return None
    shown = [name for name in INSIDE if f"inside/{name}" in names]
    rows = []
    for label in summary.variants.index:
        runs = done[done["label"] == label]
        if len(runs) and runs[names].notna().any(axis=None):
            cells = [_mean_and_range(runs[f"inside/{name}"].dropna()) for name in shown]
            rows.append([label, _ranks(runs, names), *cells])
    caption = (
        "After training. Figures are means over layers and heads, except the largest logit; the"
        " small ones are the range over seeds. Effective ranks (Roy & Vetterli 2007) are those of"
        " the projections, with those of their outputs below, and by head of W_q W_kᵀ. CKA is the"
        " linear CKA of keys and values. “cos W_k, W_v” is the cosine of their weights; it is near"
        " 0 for maps that differ by a rotation, whatever they carry. “cos of angles” is the mean"
        " cosine of the principal angles between a head’s spaces. “Asymmetry” is that of the"
        " scores, “To oneself” the attention of a token to itself. Entropy is in nats."
    )
    columns = ["Variant", "Effective ranks", *(INSIDE[name] for name in shown)]
    return table(columns, rows, caption=caption)


def _ranks(runs: pd.DataFrame, names: list[str]) -> Cell:
    """Returns "q 101, kv 102" of the weights and, below, of the projections' outputs."""

    def text(suffix: str) -> str:
        parts = []
        for name in names:
            role = name.removeprefix("inside/rank_").removesuffix(suffix)
            is_rank = name == f"inside/rank_{role}{suffix}" and role.isalpha() and role != "scores"
            if is_rank and runs[name].notna().any():
                parts.append(f"{role}{formats.NBSP}{runs[name].mean():.0f}")
        return ", ".join(parts)

    return Cell(text(""), text("_activations"))


def _mean_and_range(values: pd.Series) -> Cell:
    if not len(values):
        return Cell(formats.NONE)
    low = f"{values.min():.2g}"
    high = f"{values.max():.2g}"
    span = "" if low == high else f"{low}{formats.NBSP}to{formats.NBSP}{high}"
    return Cell(formats.signed(f"{np.mean(values):.3g}"), formats.signed(span))


def _interval(low: float, high: float, write: Callable[[float], str]) -> str:
    """Returns an interval, or "" where there is none."""
    return "" if math.isnan(low) else formats.span(low, high, write)
