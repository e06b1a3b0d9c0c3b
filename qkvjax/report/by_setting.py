"""The settings of a study one by one, beside the figures of a reference where it has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from qkvjax import formats
from qkvjax.evaluation import SOLVED
from qkvjax.report.summary import Summary
from qkvjax.report.tables import Cell, Table, table

_INDEX = ["setting", "label", "seed"]


class Tolerance(NamedTuple):
    """How far apart two figures may be and still count as equal: single runs differ by as much.

    Attributes:
      size: in points of the metric, or as a part of it.
      relative: whether it is a part.
      text: for people.
    """

    size: float
    relative: bool
    text: str


TOLERANCES = {
    "accuracy": Tolerance(0.005, relative=False, text="0.005"),
    "perplexity": Tolerance(0.01, relative=True, text="1 %"),
}


def by_setting(summary: Summary) -> dict | None:
    """Returns what a report says about settings.

    Returns:
      `agreement`: a sentence that compares the study with its reference, or "".
      `tables`: of groups of settings.
      `folds`: title and table of each group, with a row for every setting.
      None for a study of text without settings and without a reference.
    """
    reference = summary.study.get("reference") or {}
    default = "score" if summary.metric.relative else "accuracy"
    if not (summary.settings or reference or default == "accuracy"):
        return None
    metric = reference.get("metric") or default
    name = metric.replace("_", " ")
    ours = _study_values(summary, metric)
    theirs = _reference_values(reference)
    source = "; the small figures are the reference’s" if len(theirs) else ""
    groups = _groups(summary)
    all_groups = dict(groups)
    if len(groups) > 1:
        all_groups["all"] = _setting_names(summary)

    caption = f"Mean {name} over settings and seeds{source}."
    tables = [_table(summary, all_groups, ours, theirs, _mean, caption)]

    by_class = _study_values(summary, "class_accuracy")
    change = by_class.groupby("label").mean() - ours.groupby("label").mean()
    if change.abs().max() > 0.005:
        caption = "The same, with every class weighted equally (class accuracy)."
        tables.append(_table(summary, all_groups, by_class, theirs.head(0), _mean, caption))

    if metric == "accuracy":
        caption = (
            "The percentage of runs that learned the task, that is, reached an accuracy of at"
            f" least {SOLVED:g}. Where a run either learns a task or does not, the mean above"
            " measures how many did."
        )
        tables.append(_table(summary, groups, ours, theirs, _fraction_solved, caption))

    folds: list[tuple[str, Table]] = []
    if summary.settings:
        caption = f"{name.capitalize()}, from the lowest to the highest seed{source}."
        for group, settings in groups.items():
            rows = {setting: [setting] for setting in settings}
            title = f"{group}: each of {len(settings)} settings"
            folds.append((title, _table(summary, rows, ours, theirs, _range, caption)))
    return {
        "agreement": _agreement(summary, ours, theirs, metric),
        "tables": tables,
        "folds": folds,
    }


def _setting_names(summary: Summary) -> list[str]:
    """Returns the settings; of a study with one setting its name in the recipe, or else "all"."""
    return summary.settings or [summary.study.get("setting") or "all"]


def _groups(summary: Summary) -> dict[str, list[str]]:
    """Returns group -> settings; the group is the first word of a setting."""
    groups: dict[str, list[str]] = {}
    for name in _setting_names(summary):
        groups.setdefault(name.split()[0], []).append(name)
    return groups


def _study_values(summary: Summary, metric: str) -> pd.Series:
    """Returns the study's figures, indexed by setting, label and seed."""
    if metric not in summary.done:
        return pd.Series(dtype=float, index=pd.MultiIndex.from_arrays([[], [], []], names=_INDEX))
    frame = summary.done[["setting", "label", "seed", metric]].dropna()
    frame = frame.assign(setting=frame["setting"].replace("", _setting_names(summary)[0]))
    return frame.set_index(_INDEX)[metric].astype(float)


def _reference_values(reference: dict) -> pd.Series:
    """Returns the reference's figures, indexed by setting, label and seed."""
    rows = [
        (setting, label, seed, value)
        for setting, labels in (reference.get("values") or {}).items()
        for label, values in labels.items()
        for seed, value in enumerate(values)
    ]
    frame = pd.DataFrame(rows, columns=[*_INDEX, "value"])
    return frame.set_index(_INDEX)["value"].astype(float)


def _table(
    summary: Summary,
    groups: dict[str, list[str]],
    ours: pd.Series,
    theirs: pd.Series,
    write: Callable[[pd.Series], str],
    caption: str,
) -> Table:
    """Returns a table with a row for each group of settings and a column for each variant.

    Args:
      groups: title of the row -> settings.
      ours, theirs: figures of the study and of the reference.
      write: turns the figures of a cell into its text.
    """
    rows = [_row(summary, title, names, ours, theirs, write) for title, names in groups.items()]
    return table(["Settings", *summary.variants.index], rows, caption=caption)


def _row(summary, title: str, settings: list[str], ours, theirs, write) -> list:
    """Returns a row: our figure in each cell, and the reference's below it.

    The reference counts only in those settings that we have as well.
    """
    cells = []
    for label in summary.variants.index:
        our_values = _select(ours, settings, label)
        finished = list(our_values.index.get_level_values("setting").unique())
        their_values = _select(theirs, finished, label)
        text = write(our_values) if len(our_values) else formats.NONE
        cells.append(Cell(text, write(their_values) if len(their_values) else ""))
    if len(settings) > 1:
        finished = ours.index.get_level_values("setting").unique().intersection(settings)
        part = f"{len(finished)} of " if len(finished) < len(settings) else ""
        title = f"{title} ({part}{len(settings)} settings)"
    return [title, *cells]


def _select(values: pd.Series, settings: list[str], label: str) -> pd.Series:
    labels = values.index.get_level_values("label")
    return values[(labels == label) & values.index.get_level_values("setting").isin(settings)]


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.3f}"


def _fraction_solved(values: pd.Series) -> str:
    return f"{(values >= SOLVED).mean():.0%}".replace("%", f"{formats.NBSP}%")


def _range(values: pd.Series) -> str:
    low = values.min()
    high = values.max()
    return f"{low:.3f}" if low == high else f"{low:.3f}{formats.NBSP}to{formats.NBSP}{high:.3f}"


def _agreement(summary: Summary, ours: pd.Series, theirs: pd.Series, metric: str) -> str:
    """Returns in how many cells our range meets the reference's; "" without a common cell."""
    cell = ["setting", "label"]
    our_ranges = ours.groupby(cell).agg(["min", "max"])
    their_ranges = theirs.groupby(cell).agg(["min", "max", "mean"])
    both = our_ranges.join(their_ranges, how="inner", lsuffix="", rsuffix="_theirs")
    if not len(both):
        return ""
    reference = summary.study["reference"]
    source = f"The reference is {reference.get('source')}."
    done = summary.done
    pads = bool(done["score_pads"].any()) if "score_pads" in done else False
    if reference.get("score_pads", pads) != pads:
        ours_text = "scored" if pads else "not scored"
        theirs_text = "not scored" if pads else "scored"
        return (
            f"{source} Padding is {ours_text} here and {theirs_text} there: the figures do not"
            " compare."
        )

    tolerance = TOLERANCES.get(metric)
    allowed = 0.0
    explanation = ""
    if tolerance is not None:
        allowed = tolerance.size * (both["mean"] if tolerance.relative else 1)
        explanation = f"; a distance of {tolerance.text} counts as equal"
    higher = both["min"] > both["max_theirs"] + allowed
    lower = both["max"] < both["min_theirs"] - allowed
    overlap = ~(higher | lower)
    return (
        f"{source} The ranges over seeds of our runs and of the reference overlap in"
        f" {overlap.sum()} of {len(both)} cells (a cell is a variant in a setting{explanation})."
        f" Ours lie above in {higher.sum()} and below in {lower.sum()}. Both draw their own random"
        " numbers."
    )
