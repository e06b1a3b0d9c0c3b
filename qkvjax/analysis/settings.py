"""The settings of a study one by one, and beside the figures of a paper where it has them."""

from __future__ import annotations

import numpy as np

from qkvjax.analysis import formats
from qkvjax.analysis.document import Cell, Fold, Heading, Paragraph, Table
from qkvjax.analysis.summary import Summary
from qkvjax.evaluation import SOLVED

ALIKE = 0.005  # accuracies this close count as equal: single runs differ by as much

Values = dict[tuple[str, str], list[float]]  # (setting, label) -> runs


def by_setting(summary: Summary) -> list:
    """A section with the mean of each group of settings (the first word of their names), and
    every setting in a fold; empty for a study of one setting without reference.
    """
    reference = summary.study.get("reference") or {}
    names = summary.settings or (["all"] if reference else [])
    if not names:
        return []
    labels = [row.label for row in summary.rows]
    default = "score" if summary.metric.relative else "accuracy"
    key = reference.get("metric") or default
    ours: Values = {}
    for row in summary.rows:
        for line in row.results.values():
            if line.get(key) is not None:
                ours.setdefault((line.get("setting") or "all", row.label), []).append(line[key])
    given = reference.get("values") or {}
    theirs: Values = {(name, label): runs for name in given for label, runs in given[name].items()}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split()[0], []).append(name)
    what = key.replace("_", " ")
    columns = ["Settings", *labels]

    def rows_of(write) -> list:
        return [_row(_many(g, s, ours), s, labels, ours, theirs, write) for g, s in groups.items()]

    means = rows_of(_mean)
    if len(groups) > 1:
        means.append(_row(_many("all", names, ours), names, labels, ours, theirs, _mean))
    parts = [
        Heading("Setting by setting"),
        *_agreement(ours, theirs, key, reference.get("source")),
        Table(columns, means, left=("Settings",),
              caption=f"Mean {what} over settings and seeds" + _beside(theirs) + "."),
    ]  # fmt: skip
    if key == "accuracy":
        parts.append(
            Table(columns, rows_of(_solved), left=("Settings",),
                  caption=f"Runs that learned the task: {what} of at least {SOLVED:g}. Where runs"
                  " either learn a task or do not, the mean above measures how many did.")
        )  # fmt: skip
    if summary.settings:
        for group, some in groups.items():
            rows = [_row(name, [name], labels, ours, theirs, _span) for name in some]
            caption = f"{what.capitalize()}, from the lowest to the highest seed" + _beside(theirs)
            title = f"{group}: each of {len(some)} settings"
            table = Table(columns, rows, left=("Settings",), caption=caption + ".")
            parts.append(Fold(title, [table]))
    return parts


def _many(name: str, settings: list[str], ours: Values) -> str:
    """ "sort (12 settings)", or "sort (8 of 12 settings)" where some have no run yet."""
    there = {setting for setting, _ in ours} & set(settings)
    part = f"{len(there)} of " if len(there) < len(settings) else ""
    return name if len(settings) == 1 else f"{name} ({part}{len(settings)} settings)"


def _beside(theirs: Values) -> str:
    return "; the small figures are the reference’s" if theirs else ""


def _row(title: str, settings: list[str], labels, ours: Values, theirs: Values, write) -> list:
    """A cell a variant: what `write` makes of our runs in these settings, and of theirs in those
    of them that we have."""
    cells = []
    for label in labels:
        here = [name for name in settings if (name, label) in ours]
        there = [name for name in here if (name, label) in theirs]
        text = write([v for name in here for v in ours[name, label]]) if here else formats.NONE
        below = write([v for name in there for v in theirs[name, label]]) if there else ""
        cells.append(Cell(text, below))
    return [title, *cells]


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.3f}"


def _solved(values: list[float]) -> str:
    return f"{np.mean(np.array(values) >= SOLVED):.0%}".replace("%", f"{formats.NBSP}%")


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3f}" if low == high else f"{low:.3f}{formats.NBSP}to{formats.NBSP}{high:.3f}"


def _agreement(ours: Values, theirs: Values, key: str, source: str | None) -> list:
    """How often the reference's figures are met."""
    both = [place for place in ours if place in theirs]
    if not both:
        return []
    room = ALIKE if key == "accuracy" else 0.0
    met, higher = 0, 0
    for place in both:
        low, high = min(theirs[place]) - room, max(theirs[place]) + room
        met += min(ours[place]) <= high and max(ours[place]) >= low
        higher += min(ours[place]) > high
    text = (
        f"The reference is {source}. Our runs and its overlap in {met} of {len(both)} cells"
        f" (variant and setting; ranges over seeds, {ALIKE:g} counted as equal); ours lie above in"
        f" {higher} and below in {len(both) - met - higher}. Both draw their own random numbers."
    )
    return [Paragraph(text)]
