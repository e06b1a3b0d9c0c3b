"""The plots of a study, as SVG text. Each variant has a colour, a marker and a line style."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pandas as pd

from qkvjax import formats
from qkvjax.report import literature, pareto, statistics, tables
from qkvjax.report.drawing import (
    INK,
    MARKERS,
    PAPER,
    drawn,
    label_ends,
    line_style,
    new,
    tokens_axis,
)
from qkvjax.report.summary import Summary


def draw(summary: Summary) -> dict[str, str]:
    """Returns name -> SVG of the plots that a study has data for."""
    styles = _styles(summary)
    plots = {
        "forest": _forest,
        "pareto": pareto.plot,
        "curves": _curves,
        "gap": _gap,
        "tuning": _tuning,
    }
    calls = {name: functools.partial(plot, summary, styles) for name, plot in plots.items()}
    calls["spectra"] = functools.partial(_spectra, summary)
    return drawn(calls)


def _styles(summary: Summary) -> dict[str, dict]:
    """Returns label -> colour, marker and line style; the baseline is solid ink with dots."""
    others = [label for label in summary.variants.index if label != summary.baseline]
    styles = {summary.baseline: {"color": INK, "marker": "o", "linestyle": "solid"}}
    for number, label in enumerate(others):
        styles[label] = line_style(number) | {"marker": MARKERS[number % len(MARKERS)]}
    return styles


def _score_grids(summary: Summary) -> dict[str, pd.DataFrame]:
    """Returns label -> validation scores: a row for each run, and a column for each number of
    tokens at which all runs of the variant were evaluated."""
    key = summary.metric.key
    if key not in summary.curves:
        return {}
    grids = {}
    for label in summary.variants.index:
        curves = summary.curves[summary.curves["label"] == label]
        grid = curves.pivot_table(index=["setting", "seed"], columns="tokens", values=key)
        grid = grid.dropna(axis="columns")
        if grid.shape[0] and grid.shape[1] > 1:
            grids[label] = grid
    return grids


def _curves(summary: Summary, styles: dict[str, dict]):
    """Draws validation score against tokens: the mean, and a band from best to worst seed."""
    grids = _score_grids(summary)
    if not grids:
        return None
    figure, (axes,) = new(8.6, 4.1)
    ends = []
    for label, grid in grids.items():
        tokens = grid.columns.to_numpy()
        mean = grid.mean().to_numpy()
        color = styles[label]["color"]
        axes.plot(tokens, mean, markersize=4, **styles[label])
        # Settings differ far more than seeds: a band over both would hide the rest.
        if len(grid) > 1 and not summary.settings:
            low = grid.min().to_numpy()
            high = grid.max().to_numpy()
            axes.fill_between(tokens, low, high, color=color, alpha=0.16, linewidth=0)
        ends.append((label, tokens[-1], mean[-1], color))
    axes.set_ylim(*_limits_without_start([grid.mean().to_numpy() for grid in grids.values()]))
    axes.set_xlim(left=min(g.columns[(g.shape[1] - 1) // 4] for g in grids.values()))
    axes.set_ylabel(f"validation {summary.metric.name}")
    tokens_axis(axes)
    label_ends(axes, ends)
    return figure


def _limits_without_start(lines: list[np.ndarray]) -> tuple[float, float]:
    """Returns limits that cut the steep start: up to the worst value of the second half."""
    low = min(line.min() for line in lines)
    high = max(line[(len(line) - 1) // 2 :].max() for line in lines)
    room = 0.06 * max(high - low, 0.01)
    return low - room, high + room


def _gap(summary: Summary, styles: dict[str, dict]):
    """Draws the paired gap to the baseline in percent, with 95 % bands from three seeds on."""
    grids = _score_grids(summary)
    base = grids.pop(summary.baseline, None)
    if base is None:
        return None
    figure, (axes,) = new(8.6, 4.1)
    ends = []
    heights = [0.0]
    for label, grid in grids.items():
        gaps = _gaps(summary, grid, base)
        if gaps.shape[1] < 2 or not len(gaps):
            continue
        tokens = gaps.columns.to_numpy()
        mean = 100 * gaps.mean().to_numpy()
        color = styles[label]["color"]
        axes.plot(tokens, mean, markersize=4, **styles[label])
        if len(gaps) > 2:  # two runs give a band of twelve standard errors, which hides the rest
            edges = np.array([statistics.interval(gaps[t])[1:] for t in gaps.columns]).T * 100
            axes.fill_between(tokens, *edges, color=color, alpha=0.14, linewidth=0)
        heights += mean[len(mean) // 4 :].tolist()
        ends.append((label, tokens[-1], mean[-1], color))
    if not ends:
        return None
    marks = _literature_marks(summary)
    heights += marks.values()
    room = 0.12 * max(max(heights) - min(heights), 0.1)
    axes.set_ylim(min(heights) - room, max(heights) + room)
    axes.axhline(0, color=INK, linewidth=1.2)
    _draw_marks(axes, marks)
    axes.set_ylabel(f"gap to {summary.baseline}, % {summary.metric.of}")
    tokens_axis(axes)
    label_ends(axes, ends)
    return figure


def _gaps(summary: Summary, grid: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """Returns gaps to the baseline by unit (a seed or a setting) and number of tokens."""
    gaps = (grid - base).dropna(how="all").dropna(axis="columns")
    gaps = gaps.loc[:, gaps.columns > 0]  # before the first step there is nothing to compare
    if gaps.shape[1] < 2 or not len(gaps):
        return gaps
    if summary.metric.relative:
        gaps = gaps / base[gaps.columns].loc[gaps.index].mean()
    if summary.settings:
        gaps = gaps.groupby(level="setting").mean()
    return gaps


def _literature_marks(summary: Summary) -> dict[str, float]:
    """Returns text -> gap in percent, of what others report for Q-K=V."""
    if literature.pure(summary, "q-k=v") is None or not summary.metric.relative:
        return {}
    return {
        "paper, Q-K=V, 300M": 100 * literature.paper_bits("Q-K=V"),
        "its masked rerun": 100 * literature.masked_bits(),
    }


def _draw_marks(axes, marks: dict[str, float]) -> None:
    """Draws dotted lines at given heights, with one text for all: the lines may lie close."""
    if not marks:
        return
    for height in marks.values():
        axes.axhline(height, color=INK, linewidth=1, linestyle=(0, (2, 3)))
    texts = [f"{text} {formats.percent(height / 100)}" for text, height in marks.items()]
    axes.annotate(
        f"dotted: {', '.join(texts)}",
        (0.99, max(marks.values())),
        xytext=(0, 3),
        fontsize=8.5,
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
    )


def _forest(summary: Summary, styles: dict[str, dict]):
    """Draws the paired differences in percent, with 95 % intervals."""
    rows = summary.compared.sort_values("difference", ascending=False)
    if not len(rows):
        return None
    figure, (axes,) = new(8.6, 0.9 + 0.42 * len(rows))
    axes.axvline(0, color=INK, linewidth=1.2)
    for y, (label, row) in enumerate(rows.iterrows()):
        color = styles[label]["color"]
        if not math.isnan(row["low"]):
            ends = [100 * summary.relative(row[name]) for name in ("low", "high")]
            axes.plot(ends, [y, y], color=color, linewidth=2.2, solid_capstyle="butt")
        excludes_zero = row["verdict"] != statistics.NOT_SHOWN
        axes.plot(
            100 * summary.relative(row["difference"]),
            y,
            marker=styles[label]["marker"],
            markersize=8,
            color=color,
            markerfacecolor=color if excludes_zero else PAPER,
            markeredgewidth=1.6,
        )
        axes.annotate(
            row["verdict"],
            (1.02, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(range(len(rows)), list(rows.index))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    percent_of = summary.metric.of
    axes.set_xlabel(f"difference from {summary.baseline}, % {percent_of} (left is better)")
    return figure


def _tuning(summary: Summary, styles: dict[str, dict]):
    """Draws the score for each value of the tuned field, mean over the tuning seeds."""
    frame = tables.tuning_scores(summary)
    if not len(frame):
        return None
    figure, (axes,) = new(8.6, 4.1)
    ends = []
    lines = []
    for label in summary.variants.index:
        means = frame[frame["label"] == label].groupby("value")["score"].mean()
        if len(means):
            axes.plot(means.index, means, markersize=5, **styles[label])
            ends.append((label, means.index[-1], means.iloc[-1], styles[label]["color"]))
            lines.append(means.to_numpy())
    values = sorted(frame["value"].unique())
    if values[0] > 0 and values[-1] / values[0] > 4:
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
    low = min(map(np.min, lines))
    high = max(map(np.median, lines))  # a value at which training fails may lie far above
    room = 0.1 * max(high - low, 0.01)
    axes.set_ylim(low - room, high + 4 * room)
    axes.set_xlabel(summary.study["tuned"]["field"])
    axes.set_ylabel(f"validation {summary.metric.name}")
    label_ends(axes, ends)
    return figure


def _spectra(summary: Summary):
    """Draws singular values over the largest: a panel for each variant, a line a projection."""
    spectra = _first_spectra(summary)
    if not spectra:
        return None
    columns = min(len(spectra), 5)
    rows = math.ceil(len(spectra) / columns)
    figure, panels = new(2.1 * columns + 0.6, 2.4 * rows, columns=columns, rows=rows)
    for axes in panels[len(spectra) :]:
        axes.set_visible(False)
    projections = list(dict.fromkeys(itertools.chain.from_iterable(spectra.values())))
    labels = [label for label in summary.variants.index if label in spectra]
    for axes, label in zip(panels, labels):
        for name, values in spectra[label].items():
            style = line_style(projections.index(name))
            axes.plot(np.linspace(0, 1, len(values)), values, label=f"W_{name}", **style)
        axes.set_ylim(0, 1.03)
        axes.set_title(label, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("singular value / largest")
    return figure


def _first_spectra(summary: Summary) -> dict[str, dict]:
    """Returns label -> projection -> singular values, of the first run in the first setting."""
    spectra: dict[str, dict] = {}
    for line in summary.files.lines:
        in_setting = not summary.settings or line.get("setting") == summary.settings[0]
        if line.get("spectra") and in_setting:
            spectra.setdefault(line["label"], line["spectra"])
    return spectra
