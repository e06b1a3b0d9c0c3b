"""The tables of a report: cells of text, made from the frames of a study."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from qkvjax import formats
from qkvjax.report import literature
from qkvjax.report.answer import runs
from qkvjax.report.statistics import BETTER, WORSE
from qkvjax.report.summary import MARGIN, Summary

# Measures of the evaluator `inside` behind the ranks, in order; a sharing may lack a pair.
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
    """An entry of a table: its text, a smaller one below, and a tone (good, bad, quiet)."""

    text: str
    below: str = ""
    tone: str = ""


class Table(NamedTuple):
    """Rows of cells under columns; `left` names the columns that are set to the left."""

    columns: list[str]
    rows: list[list[Cell]]
    left: tuple[str, ...]
    caption: str


def table(columns: list[str], rows, left: tuple[str, ...] = (), caption: str = "") -> Table:
    """Returns a table; texts become cells, and the first column is set to the left."""
    cells = [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in rows]
    return Table(columns, cells, (columns[0], *left), caption)


def verdict(row: pd.Series) -> Cell:
    """Returns a verdict as symbol and word, so that it does not hang on colour."""
    word = row["verdict"]
    if math.isnan(row["low"]):
        return Cell("○ no interval", tone="quiet")
    notes = [f"within ±{100 * MARGIN:g} %"] if row.get("equivalent") else []
    notes += [f"ceiling: {row['ties']:.0f} of {row['pairs']:.0f} equal"] if row["ceiling"] else []
    symbol = {BETTER: "▲", WORSE: "▼"}.get(word, "○")
    tone = {BETTER: "good", WORSE: "bad"}.get(word, "quiet")
    return Cell(f"{symbol} {word}", ", ".join(notes), tone)


def quality(summary: Summary) -> Table:
    """Score, difference from the baseline and verdict of each variant."""
    metric = summary.metric
    rows = []
    for label, row in summary.variants.iterrows():
        short = 0 < row["num_runs"] < summary.planned
        name = Cell(label, f"{row['num_runs']:.0f} of {summary.planned} runs" if short else "")
        if not row["num_runs"]:
            rows.append([name, *["–"] * 2, Cell("✗ no finished run", tone="bad"), *["–"] * 2])
            continue
        score = Cell(
            metric.text(row["score"]),
            _span(row["score_low"], row["score_high"], metric.text),
        )
        gap = formats.NONE if math.isnan(row["gap"]) else formats.difference(row["gap"])
        if label == summary.baseline:
            rows.append([name, score, "–", Cell("baseline", tone="quiet"), "–", gap])
        elif math.isnan(row["difference"]):
            rows.append([name, score, "–", Cell("○ no common seed", tone="quiet"), "–", gap])
        else:
            rows.append([name, score, *_difference(summary, row), gap])
    caption = "Lower is better; the small figures are 95 % intervals"
    if len(summary.compared):
        stands_on = runs(summary, summary.compared["units"].max())
        caption += (
            f", those of differences corrected for {len(summary.compared)} comparisons with"
            f" {summary.baseline}. “Detectable”: the true difference that {stands_on} find four"
            " times in five"
        )
    columns = ["Variant", metric.name.capitalize(), "Difference", "Verdict", "Detectable"]
    return table([*columns, "Val. − train"], rows, ("Verdict",), f"{caption}.")


def _difference(summary: Summary, row: pd.Series) -> list[Cell]:
    middle, low, high = (summary.relative(row[name]) for name in ("difference", "low", "high"))
    below = "no interval" if math.isnan(low) else formats.percent_span(middle, low, high)
    effect = row["detectable"]
    detectable = formats.NONE
    if effect > 0:
        detectable = formats.percent(summary.relative(effect), sign=False)
    return [Cell(formats.percent(middle), below), verdict(row), Cell(detectable)]


def equal_cache(summary: Summary) -> Table | None:
    """The variants of one cache size beside the best of them; None without such a size."""
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
            span = formats.signed(_span(row["low"], row["high"], metric.text))
            gap = Cell(formats.signed(f"+{metric.text(row['difference'])}"), span)
            rows.append(["", label, params, score, gap, verdict(row)])
    if not rows:
        return None
    columns = ["Cache a token", "Variant", "Parameters", metric.name.capitalize()]
    caption = (
        "Variants with the same cache among themselves: the difference from the best mean of that"
        " size, with 95 % intervals that are corrected for all comparisons of this table."
    )
    return table([*columns, "From the best", "Verdict"], rows, ("Variant", "Verdict"), caption)


def costs(summary: Summary) -> Table:
    """Parameters, FLOPs, cache, and times and memory where they were measured."""
    rows = []
    for label, row in summary.variants.iterrows():
        is_base = label == summary.baseline
        saved = summary.cache_saved(label)
        below = "" if is_base or math.isnan(saved) else f"{formats.saved(saved)} saved"
        rows.append(
            [
                label,
                formats.count(_number(row["num_params"])),
                formats.count(_number(row["train_flops_per_token"])),
                Cell(formats.num_bytes(_number(row["cache_bytes_per_token"])), below),
                _ratio(row["step_ratio"], row["step_seconds"], is_base),
                _peak(summary, row, is_base),
                _ratio(row["decode_ratio"], row["decode_seconds"], is_base),
            ]
        )
    columns = ["Variant", "Parameters", "FLOPs / token", "Cache / token", "Step time"]
    return table([*columns, "Peak memory", "Decode time"], rows, caption=_cost_caption(summary))


def _number(value: float) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _ratio(ratio, seconds: float | None, is_baseline: bool) -> Cell:
    """A time ratio with its interval; the baseline shows its seconds."""
    if not ratio and (seconds is None or math.isnan(seconds)):
        return Cell(formats.NOT_MEASURED, tone="quiet")
    if is_baseline or not ratio:
        return Cell(formats.duration(seconds))
    middle, low, high = ratio
    return Cell(formats.ratio(middle), formats.span(low, high, lambda value: f"{value:.2f}"))


def _peak(summary: Summary, row: pd.Series, is_baseline: bool) -> Cell:
    peak, base = row["peak_bytes"], summary.base["peak_bytes"]
    if peak is None or math.isnan(peak):
        return Cell(formats.NOT_MEASURED, tone="quiet")
    below = "" if not base or is_baseline else formats.percent(peak / base - 1)
    return Cell(formats.num_bytes(peak), below)


def _cost_caption(summary: Summary) -> str:
    measured = summary.files.measured
    text = "Parameters, FLOPs (forward and backward) and decode cache are exact."
    if not measured.get("rows"):
        return f"{text} Times and memory were not measured."
    decode = measured.get("decode") or {}
    text += " Times are ratios to the baseline"
    if measured.get("rounds"):
        text += f", measured in turns in one process ({measured['rounds']} rounds"
        text += f", {measured['device']})" if measured.get("device") else ")"
    text += ", with 95 % intervals; memory is the peak that the compiler plans for a training step"
    if measured.get("tokens_per_step"):
        text += f" of {measured['tokens_per_step']:,} tokens"
    if decode.get("length"):
        text += f"; decoding is timed per token at {decode['length']:,} cached tokens, batch"
        text += f" {decode.get('batch', '?')}, {decode.get('cache_dtype', 'unknown')} cache"
    return text + "."


def items(summary: Summary) -> Table | None:
    """The interval over the items of the test set; None where the runs did not keep them."""
    if not len(summary.items):
        return None
    rows = []
    for label, row in summary.items.iterrows():
        middle, low, high = (summary.relative(row[name]) for name in ("difference", "low", "high"))
        seeds = summary.compared.loc[label]
        sure = "keeps its sign" if low > 0 or high < 0 else "may vanish"
        about = formats.percent_span(middle, *(summary.relative(seeds[n]) for n in ("low", "high")))
        if math.isnan(seeds["low"]):
            about = "no interval"
        span = formats.percent_span(middle, low, high)
        rows.append([label, formats.percent(middle), about, span, Cell(sure, tone="quiet")])
    count = int(summary.items["num_items"].iloc[0])
    what = "documents" if summary.metric.relative else "examples"
    columns = ["Variant", "Difference", "Over seeds", f"Over {count:,} {what}", "Another test set"]
    caption = (
        "Two intervals about two questions. Over seeds (or settings): would other runs say the same"
        " on this test set? Over documents (or examples), by a paired bootstrap: would these"
        " runs say the same on another test set of this size? Both are corrected for all variants."
    )
    return table(columns, rows, ("Another test set",), caption)


def paper(summary: Summary) -> Table | None:
    """The paper's differences beside ours; None for a study without a sharing of the paper."""
    rows = [
        [row["label"], formats.percent(row["ours"]), formats.percent(row["theirs"]), row["name"]]
        for row in literature.beside(summary)
    ]
    if not rows:
        return None
    caption = (
        "Differences from QKV as parts of its bits. The paper’s are of 300M parameters, padding"
        " scored, one run each (arXiv 2606.04032). There GQA-4 keeps a quarter of the cache and"
        f" loses {_lost('GQA-4')}, MQA a sixteenth and loses {_lost('MQA')}; Q-K=V keeps half and"
        f" loses {_lost('Q-K=V')}."
    )
    return table(["Variant", "Here", "Paper", "Its name there"], rows, ("Its name there",), caption)


def _lost(name: str) -> str:
    return formats.percent(literature.paper_bits(name), sign=False)


def tuned(summary: Summary) -> Table | None:
    """The value that each variant was tuned to; None for a study that tunes nothing."""
    tuning = summary.study.get("tuned")
    frame = tuning_scores(summary)
    if not tuning or not len(frame):
        return None
    metric = summary.metric
    values = sorted(frame["value"].unique())
    rows = []
    for label in summary.variants.index:
        mine = frame[frame["label"] == label].groupby("value")["score"].mean()
        if not len(mine):
            continue
        best = mine.idxmin()
        edge = {values[-1]: "the largest tried", values[0]: "the smallest tried"}.get(best, "")
        cells = {value: Cell(metric.text(mine.get(value))) for value in values}
        cells[best] = Cell(metric.text(mine[best]), edge if len(values) > 1 else "", "good")
        rows.append([label, *cells.values()])
    field = tuning["field"]
    seeds = formats.listed([str(seed) for seed in tuning["seeds"]])
    caption = (
        f"Mean {metric.name} by {field}, on the tuning seeds {seeds}. Each variant is compared at"
        " its best value, on other seeds."
    )
    return table(["Variant", *(f"{value:g}" for value in values)], rows, caption=caption)


def tuning_scores(summary: Summary) -> pd.DataFrame:
    """Returns the tuning runs: label, setting, seed, value (of the tuned field) and score."""
    frame = summary.runs
    frame = frame[(frame["phase"] == "tune") & (frame["status"] == "done")]
    if not len(frame):
        return pd.DataFrame(columns=["label", "setting", "seed", "value", "score"])
    frame = frame.rename(columns={"tuned": "value"})
    return frame[["label", "setting", "seed", "value", "score"]]


def inside(summary: Summary) -> Table | None:
    """What the evaluator `inside` measured; None without it."""
    done = summary.done
    names = [name for name in done.columns if name.startswith("inside/")]
    names = [name for name in names if done[name].notna().any()]
    if not names:
        return None
    shown = [name for name in INSIDE if f"inside/{name}" in names]
    rows = []
    for label in summary.variants.index:
        mine = done[done["label"] == label]
        if len(mine) and mine[names].notna().any(axis=None):
            cells = [_mean_and_range(mine[f"inside/{name}"].dropna()) for name in shown]
            rows.append([label, _ranks(mine, names), *cells])
    caption = (
        "After training: means over layers and heads, of logits the largest; below, the range over"
        " seeds. Effective ranks (Roy & Vetterli 2007) of the projections (and of what they put"
        " out), and by head of W_q W_kᵀ; linear CKA of what keys and values carry, and cosine of"
        " their weights (near 0 for maps that differ by a rotation, whatever they carry); mean"
        " cosine of the principal angles between a head’s spaces; asymmetry of the scores;"
        " attention to oneself; entropy in nats."
    )
    columns = ["Variant", "Effective ranks", *(INSIDE[name] for name in shown)]
    return table(columns, rows, caption=caption)


def _ranks(mine: pd.DataFrame, names: list[str]) -> Cell:
    """ "q 101, kv 102" of the weights; below, of what they put out."""

    def text(suffix: str) -> str:
        found = []
        for name in names:
            role = name.removeprefix("inside/rank_").removesuffix(suffix)
            whole = name == f"inside/rank_{role}{suffix}" and role.isalpha() and role != "scores"
            if whole and mine[name].notna().any():
                found.append(f"{role}{formats.NBSP}{mine[name].mean():.0f}")
        return ", ".join(found)

    return Cell(text(""), text("_activations"))


def _mean_and_range(values: pd.Series) -> Cell:
    if not len(values):
        return Cell(formats.NONE)
    low, high = (f"{value:.2g}" for value in (values.min(), values.max()))
    below = "" if low == high else f"{low}{formats.NBSP}to{formats.NBSP}{high}"
    return Cell(formats.signed(f"{np.mean(values):.3g}"), formats.signed(below))


def _span(low: float, high: float, write) -> str:
    return "" if math.isnan(low) else formats.span(low, high, write)
