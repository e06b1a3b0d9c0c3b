"""The plots of a study, as SVG text. Each variant has its own colour, marker and line style."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from qkvjax import formats
from qkvjax.report import literature, statistics, tables
from qkvjax.report.drawing import (
    FAINT,
    INK,
    PAPER,
    drawn,
    label_ends,
    line_style,
    new,
    spread,
    tokens_axis,
)
from qkvjax.report.summary import Summary

_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "h")
_BEHIND = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.2}  # of labels on lines


def draw(summary: Summary) -> dict[str, str]:
    """Returns name -> SVG of the plots that a study has data for."""
    plots = {
        "forest": _forest,
        "pareto": _pareto,
        "curves": _curves,
        "gap": _gap,
        "tuning": _tuning,
        "spectra": _spectra,
    }
    return drawn({name: lambda plot=plot: plot(summary) for name, plot in plots.items()})


def _styles(summary: Summary) -> dict[str, dict]:
    """Returns label -> colour, marker and line style; the baseline is solid ink with dots."""
    styles = {}
    others = 0
    for label in summary.variants.index:
        if label == summary.baseline:
            styles[label] = {"color": INK, "marker": "o", "linestyle": "solid"}
        else:
            styles[label] = line_style(others) | {"marker": _MARKERS[others % len(_MARKERS)]}
            others += 1
    return styles


def _grids(summary: Summary) -> dict[str, pd.DataFrame]:
    """Returns label -> validation scores: a row a run, a column a number of tokens that all runs of
    the variant have in common."""
    key = summary.metric.key
    if key not in summary.curves:
        return {}
    grids = {}
    for label in summary.variants.index:
        mine = summary.curves[summary.curves["label"] == label]
        grid = mine.pivot_table(index=["setting", "seed"], columns="tokens", values=key)
        grid = grid.dropna(axis="columns")
        if grid.shape[0] and grid.shape[1] > 1:
            grids[label] = grid
    return grids


def _curves(summary: Summary):
    """Validation score against tokens: mean over seeds, band from the best to the worst seed."""
    grids = _grids(summary)
    if not grids:
        return None
    figure, (axes,) = new(8.6, 4.1)
    styles = _styles(summary)
    ends = []
    for label, grid in grids.items():
        tokens, mean, style = grid.columns.to_numpy(), grid.mean().to_numpy(), styles[label]
        axes.plot(tokens, mean, markersize=4, **style)
        if len(grid) > 1 and not summary.settings:  # which differ far more than seeds
            low, high = grid.min().to_numpy(), grid.max().to_numpy()
            axes.fill_between(tokens, low, high, color=style["color"], alpha=0.16, linewidth=0)
        ends.append((label, tokens[-1], mean[-1], style["color"]))
    axes.set_ylim(*_trimmed([grid.mean().to_numpy() for grid in grids.values()]))
    axes.set_xlim(left=min(g.columns[(g.shape[1] - 1) // 4] for g in grids.values()))
    axes.set_ylabel(f"validation {summary.metric.name}")
    tokens_axis(axes)
    label_ends(axes, ends)
    return figure


def _trimmed(lines: list[np.ndarray]) -> tuple[float, float]:
    """Returns limits that cut the steep beginning: up to the worst value of the second half."""
    low = min(line.min() for line in lines)
    high = max(line[(len(line) - 1) // 2 :].max() for line in lines)
    room = 0.06 * max(high - low, 0.01)
    return low - room, high + room


def _gap(summary: Summary):
    """Paired gap to the baseline in percent; 95 % bands from three seeds up."""
    grids = _grids(summary)
    base = grids.pop(summary.baseline, None)
    if base is None:
        return None
    figure, (axes,) = new(8.6, 4.1)
    styles = _styles(summary)
    ends, shown = [], [0.0]
    for label, grid in grids.items():
        gaps = (grid - base).dropna(how="all").dropna(axis="columns")
        gaps = gaps.loc[:, gaps.columns > 0]  # before the first step there is nothing to compare
        if gaps.shape[1] < 2 or not len(gaps):
            continue
        if summary.metric.relative:
            gaps = gaps / base[gaps.columns].loc[gaps.index].mean()
        if summary.settings:
            gaps = gaps.groupby(level="setting").mean()
        tokens, mean, style = gaps.columns.to_numpy(), 100 * gaps.mean().to_numpy(), styles[label]
        axes.plot(tokens, mean, markersize=4, **style)
        if len(gaps) > 2:  # two give a band twelve standard errors wide, which hides the rest
            edges = np.array([statistics.interval(gaps[t])[1:] for t in gaps.columns]).T * 100
            axes.fill_between(tokens, *edges, color=style["color"], alpha=0.14, linewidth=0)
        shown += [*mean[len(mean) // 4 :]]
        ends.append((label, tokens[-1], mean[-1], style["color"]))
    if not ends:
        return None
    marks = []
    if literature.pure(summary, "q-k=v") is not None and summary.metric.relative:
        marks.append(("paper, Q-K=V, 300M", 100 * literature.paper_bits("Q-K=V")))
        marks.append(("its masked rerun", 100 * literature.masked_bits()))
    shown += [height for _, height in marks]
    room = 0.12 * max(max(shown) - min(shown), 0.1)
    axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.axhline(0, color=INK, linewidth=1.2)
    for _, height in marks:
        axes.axhline(height, color=INK, linewidth=1, linestyle=(0, (2, 3)))
    if marks:  # one text for both, since the lines may lie close together
        listed = ", ".join(f"{text} {formats.percent(h / 100)}" for text, h in marks)
        axes.annotate(
            f"dotted: {listed}",
            (0.99, max(h for _, h in marks)),
            xytext=(0, 3),
            fontsize=8.5,
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
        )
    axes.set_ylabel(f"gap to {summary.baseline}, % {summary.metric.of}")
    tokens_axis(axes)
    label_ends(axes, ends)
    return figure


def _pareto(summary: Summary):
    """Cache bytes per token (log) against score; the line joins what nothing beats in both."""
    size = "cache_bytes_per_token"
    rows = summary.variants[summary.variants["score"].notna() & (summary.variants[size] > 0)]
    if len(rows) < 2:
        return None
    figure, (axes,) = new(8.6, 4.1)
    styles = _styles(summary)
    sizes = sorted(rows[size].unique())
    places: dict[str, float] = {}  # side by side, not on top of each other
    for one in sizes:
        here = rows[rows[size] == one].sort_values("score").index
        steps = (np.arange(len(here)) - (len(here) - 1) / 2) * 0.045
        places |= {label: one * 2**step for label, step in zip(here, steps)}
    for label, x in places.items():
        row, style = rows.loc[label], styles[label]
        if not math.isnan(row["score_low"]):
            ends = [row["score_low"], row["score_high"]]
            axes.plot([x, x], ends, color=style["color"], linewidth=1.4)
        axes.plot(x, row["score"], color=style["color"], marker=style["marker"], markersize=7)
    front, best = [], np.inf
    for label, row in rows.sort_values([size, "score"]).iterrows():
        if row["score"] < best:
            front.append((places[label], row["score"]))
            best = row["score"]
    axes.step(*zip(*front), where="post", color=FAINT, linewidth=1, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 1.35, sizes[-1] * 1.55)
    axes.set_xticks(sizes, [formats.num_bytes(one) for one in sizes])
    axes.minorticks_off()
    low, high = _room(rows)
    axes.set_ylim(low, high)
    for one in sizes:
        here = [label for label in places if rows.loc[label, size] == one]
        heights = spread([rows.loc[label, "score"] for label in here], (high - low) * 0.058)
        edge = max(places[label] for label in here)
        for label, height in zip(here, heights):
            axes.annotate(
                label,
                (places[label], rows.loc[label, "score"]),
                xytext=(edge * 1.05, height),
                va="center",
                bbox=_BEHIND,
                arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.6, "shrinkB": 4},
            )
    axes.set_xlabel("decode cache, bytes a token (log scale)")
    axes.set_ylabel(f"validation {summary.metric.name}")
    return figure


def _room(rows: pd.DataFrame) -> tuple[float, float]:
    """Returns limits that show every mean, and intervals up to the spread of the means beyond."""
    means = rows["score"]
    span = max(means.max() - means.min(), 0.01)
    lows, highs = rows["score_low"].fillna(means), rows["score_high"].fillna(means)
    low, high = max(lows.min(), means.min() - span / 2), min(highs.max(), means.max() + span / 2)
    return low - 0.08 * span, high + 0.08 * span


def _forest(summary: Summary):
    """Paired differences in percent, with 95 % intervals."""
    rows = summary.compared.sort_values("difference", ascending=False)
    if not len(rows):
        return None
    figure, (axes,) = new(8.6, 0.9 + 0.42 * len(rows))
    styles = _styles(summary)
    axes.axvline(0, color=INK, linewidth=1.2)
    for y, (label, row) in enumerate(rows.iterrows()):
        style = styles[label]
        if not math.isnan(row["low"]):
            ends = [100 * summary.relative(row[name]) for name in ("low", "high")]
            axes.plot(ends, [y, y], color=style["color"], linewidth=2.2, solid_capstyle="butt")
        claimed = row["verdict"] != statistics.NOT_SHOWN
        axes.plot(
            100 * summary.relative(row["difference"]),
            y,
            marker=style["marker"],
            markersize=8,
            color=style["color"],
            markerfacecolor=style["color"] if claimed else PAPER,
            markeredgewidth=1.6,
        )
        where = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8.5}
        axes.annotate(row["verdict"], (1.02, y), **where)
    axes.set_yticks(range(len(rows)), list(rows.index))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    of = summary.metric.of
    axes.set_xlabel(f"difference from {summary.baseline}, % {of} (left is better)")
    return figure


def _tuning(summary: Summary):
    """Score against the tuned field, mean over the tuning seeds, a line a variant."""
    frame = tables.tuning_scores(summary)
    if not len(frame):
        return None
    figure, (axes,) = new(8.6, 4.1)
    styles, ends, lines = _styles(summary), [], []
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
    low, high = min(map(np.min, lines)), max(map(np.median, lines))
    room = 0.1 * max(high - low, 0.01)
    axes.set_ylim(low - room, high + 4 * room)
    axes.set_xlabel(summary.study["tuned"]["field"])
    axes.set_ylabel(f"validation {summary.metric.name}")
    label_ends(axes, ends)
    return figure


def _spectra(summary: Summary):
    """Singular values over the largest: a panel a variant, a line a projection."""
    spectra: dict[str, dict] = {}
    for line in summary.files.lines:
        wanted = not summary.settings or line.get("setting") == summary.settings[0]
        if line.get("spectra") and wanted:
            spectra.setdefault(line["label"], line["spectra"])
    if not spectra:
        return None
    across = min(len(spectra), 5)
    down = -(-len(spectra) // across)
    figure, panels = new(2.1 * across + 0.6, 2.4 * down, columns=across, rows=down)
    for axes in panels[len(spectra) :]:
        axes.set_visible(False)
    names = list(dict.fromkeys(name for found in spectra.values() for name in found))
    for axes, label in zip(panels, [name for name in summary.variants.index if name in spectra]):
        for name, values in spectra[label].items():
            style = line_style(names.index(name))
            axes.plot(np.linspace(0, 1, len(values)), values, label=f"W_{name}", **style)
        axes.set_ylim(0, 1.03)
        axes.set_title(label, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("singular value / largest")
    return figure
