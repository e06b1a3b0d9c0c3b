"""The settings of a study one by one, and beside the figures of a paper where it has them."""

from __future__ import annotations

import pandas as pd

from qkvjax import formats
from qkvjax.evaluation import SOLVED
from qkvjax.report.summary import Summary
from qkvjax.report.tables import Cell, Table, table

_INDEX = ["setting", "label", "seed"]
# Metric -> how close two figures count as equal, and as a part of what: single runs differ by as
# much.
ALIKE = {"accuracy": (0.005, "0.005"), "perplexity": (0.01, "1 %")}


def by_setting(summary: Summary) -> dict | None:
    """Returns what a report says about settings: `agreement` with the reference (a sentence or
    ""), `tables`, and `folds` (title and table of each group of settings). None for a study of
    text without settings and reference.
    """
    reference = summary.study.get("reference") or {}
    default = "score" if summary.metric.relative else "accuracy"
    if not (summary.settings or reference or default == "accuracy"):
        return None
    key = reference.get("metric") or default
    ours = _ours(summary, key)
    theirs = _theirs(reference)
    names = _names(summary)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split()[0], []).append(name)
    whole = groups | ({"all": names} if len(groups) > 1 else {})
    what = key.replace("_", " ")
    beside = "; the small figures are the reference’s" if len(theirs) else ""

    def rows(groups, write, ours=ours, theirs=theirs):
        return [_row(summary, name, some, ours, theirs, write) for name, some in groups.items()]

    columns = ["Settings", *summary.variants.index]
    caption = f"Mean {what} over settings and seeds{beside}."
    tables = [table(columns, rows(whole, _mean), caption=caption)]
    by_class = _ours(summary, "class_accuracy")
    differ = by_class.groupby("label").mean() - ours.groupby("label").mean()
    if differ.abs().max() > 0.005:
        caption = "The same with each class counting as much as any other (class accuracy)."
        tables.append(table(columns, rows(whole, _mean, by_class, theirs.head(0)), caption=caption))
    if key == "accuracy":
        caption = (
            f"Runs that learned the task: {what} of at least {SOLVED:g}. Where runs either learn a"
            " task or do not, the mean above measures how many did."
        )
        tables.append(table(columns, rows(groups, _solved), caption=caption))
    folds: list[tuple[str, Table]] = []
    if summary.settings:
        caption = f"{what.capitalize()}, from the lowest to the highest seed{beside}."
        for group, some in groups.items():
            each = rows({name: [name] for name in some}, _range)
            title = f"{group}: each of {len(some)} settings"
            folds.append((title, table(columns, each, caption=caption)))
    agreement = _agreement(summary, ours, theirs, key, reference)
    return {"agreement": agreement, "tables": tables, "folds": folds}


def _names(summary: Summary) -> list[str]:
    """Returns the settings; of a study that has one, as its recipe or, failing that, we call it."""
    return summary.settings or [summary.study.get("setting") or "all"]


def _ours(summary: Summary, key: str) -> pd.Series:
    """Returns figures by setting, label and seed."""
    if key not in summary.done:
        return pd.Series(dtype=float, index=pd.MultiIndex.from_arrays([[], [], []], names=_INDEX))
    alone = _names(summary)[0]
    frame = summary.done[["setting", "label", "seed", key]].dropna()
    frame = frame.assign(setting=frame["setting"].replace("", alone))
    return frame.set_index(_INDEX)[key].astype(float)


def _theirs(reference: dict) -> pd.Series:
    rows = [
        (setting, label, number, value)
        for setting, labels in (reference.get("values") or {}).items()
        for label, values in labels.items()
        for number, value in enumerate(values)
    ]
    frame = pd.DataFrame(rows, columns=[*_INDEX, "value"])
    return frame.set_index(_INDEX)["value"].astype(float)


def _row(summary, title: str, settings: list[str], ours, theirs, write) -> list:
    """Returns a cell a variant: what `write` makes of our runs in these settings, and of the
    reference's in those of them that we have."""
    cells = []
    for label in summary.variants.index:
        mine = _of(ours, settings, label)
        had = list(mine.index.get_level_values("setting").unique())
        other = _of(theirs, had, label)
        text = write(mine) if len(mine) else formats.NONE
        cells.append(Cell(text, write(other) if len(other) else ""))
    if len(settings) > 1:
        had = ours.index.get_level_values("setting").unique().intersection(settings)
        part = f"{len(had)} of " if len(had) < len(settings) else ""
        title = f"{title} ({part}{len(settings)} settings)"
    return [title, *cells]


def _of(values: pd.Series, settings: list[str], label: str) -> pd.Series:
    index = values.index
    keep = index.get_level_values("label") == label
    return values[keep & index.get_level_values("setting").isin(settings)]


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.3f}"


def _solved(values: pd.Series) -> str:
    return f"{(values >= SOLVED).mean():.0%}".replace("%", f"{formats.NBSP}%")


def _range(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:.3f}" if low == high else f"{low:.3f}{formats.NBSP}to{formats.NBSP}{high:.3f}"


def _agreement(summary: Summary, ours, theirs, key: str, reference: dict) -> str:
    """Returns how often the reference's figures are met; "" without a common cell."""
    cells = ["setting", "label"]
    mine = ours.groupby(cells).agg(["min", "max"])
    other = theirs.groupby(cells).agg(["min", "max", "mean"])
    both = mine.join(other, how="inner", lsuffix="", rsuffix="_theirs")
    if not len(both):
        return ""
    source = f"The reference is {reference.get('source')}."
    pads = bool(summary.done["score_pads"].any()) if "score_pads" in summary.done else False
    if reference.get("score_pads", pads) != pads:
        said = "scored" if pads else "not scored"
        return f"{source} Padding is {said} here, unlike there: figures do not compare."
    room, alike = ALIKE.get(key, (0.0, "nothing more"))
    allowed = room * (both["mean"] if key == "perplexity" else 1)
    higher = both["min"] > both["max_theirs"] + allowed
    lower = both["max"] < both["min_theirs"] - allowed
    met = ~(higher | lower)
    return (
        f"{source} Our runs and its overlap in {met.sum()} of {len(both)} cells (variant and"
        f" setting; ranges over seeds, {alike} counted as equal); ours lie above in {higher.sum()}"
        f" and below in {lower.sum()}. Both draw their own random numbers."
    )
