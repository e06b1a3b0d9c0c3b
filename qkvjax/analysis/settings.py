"""The settings of a study one by one, and beside the figures of a paper where it has them."""

from __future__ import annotations

import numpy as np

from qkvjax.analysis import formats
from qkvjax.analysis.document import Cell, Fold, Heading, Paragraph, Table
from qkvjax.analysis.summary import Summary
from qkvjax.evaluation import SOLVED

# Metric -> how close two figures count as equal, and as a part of what: single runs differ by as
# much.
ALIKE = {"accuracy": (0.005, "0.005"), "perplexity": (0.01, "1 %")}

Values = dict[tuple[str, str], list[float]]  # (setting, label) -> runs


def by_setting(summary: Summary) -> list:
    """A section with the mean of each group of settings (the first word of their names), and
    every setting in a fold; empty for a study of text without settings and reference.
    """
    reference = summary.study.get("reference") or {}
    default = "score" if summary.metric.relative else "accuracy"
    if not (summary.settings or reference or default == "accuracy"):
        return []
    names = _names(summary)
    labels = [row.label for row in summary.rows]
    key = reference.get("metric") or default
    ours, by_class = _values(summary, key), _values(summary, "class_accuracy")
    given = reference.get("values") or {}
    theirs: Values = {(name, label): runs for name in given for label, runs in given[name].items()}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split()[0], []).append(name)
    what = key.replace("_", " ")
    columns = ["Settings", *labels]

    def rows_of(write, ours=ours, theirs=theirs) -> list:
        rows = [_row(_many(g, s, ours), s, labels, ours, theirs, write) for g, s in groups.items()]
        if len(groups) > 1 and write is _mean:
            rows.append(_row(_many("all", names, ours), names, labels, ours, theirs, write))
        return rows

    parts = [
        Heading("Setting by setting"),
        *_agreement(summary, ours, theirs, key, reference),
        Table(columns, rows_of(_mean), left=("Settings",),
              caption=f"Mean {what} over settings and seeds" + _beside(theirs) + "."),
    ]  # fmt: skip
    if any(abs(np.mean(by_class[p]) - np.mean(ours[p])) > 0.005 for p in by_class if p in ours):
        caption = "The same with each class counting as much as any other (class accuracy)."
        parts.append(
            Table(columns, rows_of(_mean, by_class, {}), left=("Settings",), caption=caption)
        )
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


def _names(summary: Summary) -> list[str]:
    """The settings; of a study that has one, as its recipe or, failing that, we call it."""
    return summary.settings or [summary.study.get("setting") or "all"]


def _values(summary: Summary, key: str) -> Values:
    alone, found = _names(summary)[0], {}
    for row in summary.rows:
        for line in row.results.values():
            if line.get(key) is not None:
                found.setdefault((line.get("setting") or alone, row.label), []).append(line[key])
    return found


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


def _agreement(summary: Summary, ours: Values, theirs: Values, key: str, reference: dict) -> list:
    """How often the reference's figures are met."""
    both = [place for place in ours if place in theirs]
    if not both:
        return []
    told = f"The reference is {reference.get('source')}."
    if reference.get("score_pads", summary.score_pads) != summary.score_pads:
        pads = "scored" if summary.score_pads else "not scored"
        return [Paragraph(f"{told} Padding is {pads} here, unlike there: figures do not compare.")]
    room, alike = ALIKE.get(key, (0.0, "nothing more"))
    met, higher = 0, 0
    for place in both:
        relative = np.mean(theirs[place]) if key == "perplexity" else 1
        low, high = min(theirs[place]) - room * relative, max(theirs[place]) + room * relative
        met += min(ours[place]) <= high and max(ours[place]) >= low
        higher += min(ours[place]) > high
    text = (
        f"{told} Our runs and its overlap in {met} of {len(both)} cells (variant and setting;"
        f" ranges over seeds, {alike} counted as equal); ours lie above in {higher} and below in"
        f" {len(both) - met - higher}. Both draw their own random numbers."
    )
    return [Paragraph(text)]
