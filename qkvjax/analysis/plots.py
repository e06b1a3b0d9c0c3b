"""The plots of a study, as SVG text.

Colours are Okabe and Ito's, told apart in every common colour blindness, and each variant also
has its own marker and line style. Text, paper and grid are drawn in three fixed colours, which
the HTML report replaces by its own (so that plots follow a dark page).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from qkvjax.analysis import curves, formats
from qkvjax.analysis.sharings import is_sharing_study, masked_bits, paper_bits
from qkvjax.analysis.statistics import BETTER, WORSE, t_quantile
from qkvjax.analysis.summary import Row, Summary

INK, PAPER, FAINT = "#22272e", "#fffffe", "#a0a8b0"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "h")
_DASHES = ((0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.6, 1.2, 1.6)), (0, (3, 1)), "solid")
_BEHIND = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.2}  # of labels on lines
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "qkvjax",
    "text.parse_math": False,  # labels are names, and may hold a dollar sign
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK,
    "figure.facecolor": PAPER, "axes.facecolor": PAPER,
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "axes.unicode_minus": True,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True,
    "grid.color": FAINT, "grid.alpha": 0.28, "grid.linewidth": 0.7,
    "xtick.color": FAINT, "xtick.labelcolor": INK, "ytick.color": FAINT, "ytick.labelcolor": INK,
    "lines.linewidth": 1.8, "lines.markersize": 5,
}  # fmt: skip


def draw(summary: Summary, **others: Callable[[Summary], object]) -> dict[str, str]:
    """name -> SVG of the plots that this study has data for, `others` among them."""
    plots = {"curves": _curves, "gap": _gap, "pareto": _pareto, "forest": _forest} | others
    return drawn({name: functools.partial(plot, summary) for name, plot in plots.items()})


def drawn(plots: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """name -> SVG of what each function draws in the house's style; one may return None."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figures = {name: plot() for name, plot in plots.items()}
        return {name: _svg(figure) for name, figure in figures.items() if figure is not None}


def write(figures: dict[str, str], folder: Path) -> None:
    """Writes each plot to `folder`/NAME.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in figures.items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")


def new(width: float, height: float, columns: int = 1, rows: int = 1):
    """(figure, its panels row by row), outside pyplot, so that nothing global keeps it alive."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _svg(figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _look(summary: Summary) -> dict[str, dict]:
    """label -> colour, marker and line style; the baseline is solid ink with dots."""
    look = {summary.baseline.label: {"color": INK, "marker": "o", "linestyle": "solid"}}
    for i, row in enumerate(summary.others):
        look[row.label] = line_style(i) | {"marker": _MARKERS[i % len(_MARKERS)]}
    return look


def line_style(i: int) -> dict:
    """Colour and dashes of line number i."""
    return {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _DASHES[i % len(_DASHES)]}


def spread(wanted: list[float], distance: float) -> list[float]:
    """Moves heights apart until neighbours keep `distance`, as little as a few rounds allow."""
    order = np.argsort(wanted, kind="stable")
    heights = np.array(wanted, np.float64)[order]
    for _ in range(200):
        overlap = distance - np.diff(heights)
        if not (overlap > 1e-9).any():
            break
        push = np.where(overlap > 0, overlap / 2, 0)
        heights[:-1] -= push
        heights[1:] += push
    result = np.empty_like(heights)
    result[order] = heights
    return result.tolist()


def _label_ends(axes, ends: list[tuple[str, float, float, str]]) -> None:
    """Names lines at their right ends (label, x, y, colour), with leaders where they crowd."""
    low, high = axes.get_ylim()
    heights = spread([min(max(y, low), high) for _, _, y, _ in ends], (high - low) * 0.062)
    for (label, x, y, colour), height in zip(ends, heights):
        axes.annotate(
            label, (x, min(max(y, low), high)), xytext=(1.035, (height - low) / (high - low)),
            textcoords="axes fraction", va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 2, "shrinkB": 4},
        )  # fmt: skip


def _tokens_axis(axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: formats.count(x) if x else "0"))
    axes.set_xlabel("training tokens")


def _curves(summary: Summary):
    """Validation score against tokens: mean over seeds, band from the best to the worst seed."""
    rows = [row for row in summary.rows if row.curve is not None]
    if not rows or max(len(row.curve.tokens) for row in rows) < 2:
        return None
    figure, (axes,) = new(8.6, 4.1)
    look, ends = _look(summary), []
    for row in rows:
        line, style = row.curve, look[row.label]
        axes.plot(line.tokens, line.mean, markersize=4, **style)
        if len(line.seeds) > 1 and not summary.settings:  # which differ far more than seeds
            axes.fill_between(
                line.tokens, line.values.min(0), line.values.max(0), color=style["color"],
                alpha=0.16, linewidth=0,
            )  # fmt: skip
        ends.append((row.label, line.tokens[-1], line.mean[-1], style["color"]))
    axes.set_ylim(*_trimmed([row.curve.mean for row in rows]))
    axes.set_xlim(left=min(row.curve.tokens[(len(row.curve.tokens) - 1) // 4] for row in rows))
    axes.set_ylabel(f"validation {summary.metric.name}")
    _tokens_axis(axes)
    _label_ends(axes, ends)
    return figure


def _trimmed(lines: list[np.ndarray]) -> tuple[float, float]:
    """Limits that cut the steep beginning: up to the worst value of the second half."""
    low = min(line.min() for line in lines)
    high = max(line[(len(line) - 1) // 2 :].max() for line in lines)
    room = 0.06 * max(high - low, 0.01)
    return low - room, high + room


def _gap(summary: Summary):
    """Paired gap to the baseline in percent; 95 % bands from three seeds up."""
    base, relative = summary.baseline.curve, summary.metric.relative
    gaps = {row.label: curves.gap(base, row.curve, relative) for row in summary.compared}
    gaps = {label: found for label, found in gaps.items() if found and len(found[0]) > 1}
    if not gaps:
        return None
    figure, (axes,) = new(8.6, 4.1)
    look, ends, shown = _look(summary), [], [0.0]
    for label, (tokens, values) in gaps.items():
        mean, style = 100 * values.mean(0), look[label]
        axes.plot(tokens, mean, markersize=4, **style)
        n = len(values)
        if n > 2:  # two seeds give a band twelve standard errors wide: it would hide the rest
            half = 100 * t_quantile(0.975, n - 1) * values.std(0, ddof=1) / np.sqrt(n)
            low, high = mean - half, mean + half
            axes.fill_between(tokens, low, high, color=style["color"], alpha=0.14, linewidth=0)
        shown += [*mean[len(mean) // 4 :]]
        ends.append((label, tokens[-1], mean[-1], style["color"]))
    marks = []
    if is_sharing_study(summary) and summary.metric.relative:
        marks.append(("paper, Q-K=V, 300M", 100 * paper_bits("q-k=v")))
        marks.append(("its masked rerun", 100 * masked_bits()))
    shown += [height for _, height in marks]
    room = 0.12 * max(max(shown) - min(shown), 0.1)
    axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.axhline(0, color=INK, linewidth=1.2)
    for _, height in marks:
        axes.axhline(height, color=INK, linewidth=1, linestyle=(0, (2, 3)))
    if marks:  # one text for both, since the lines may lie close together
        listed = ", ".join(f"{text} {formats.percent(h / 100)}" for text, h in marks)
        axes.annotate(
            f"dotted: {listed}", (0.99, max(h for _, h in marks)), xytext=(0, 3), fontsize=8.5,
            xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
        )  # fmt: skip
    axes.set_ylabel(f"gap to {summary.baseline.label}, % {summary.metric.of}")
    _tokens_axis(axes)
    _label_ends(axes, ends)
    return figure


def _pareto(summary: Summary):
    """Cache bytes per token (log) against score; the line joins what nothing beats in both."""
    rows = [row for row in summary.rows if row.score and row.cache_bytes_per_token]
    if len(rows) < 2:
        return None
    figure, (axes,) = new(8.6, 4.1)
    look = _look(summary)
    sizes = sorted({row.cache_bytes_per_token for row in rows})
    places: list[tuple[Row, float]] = []
    for size in sizes:
        here = sorted((r for r in rows if r.cache_bytes_per_token == size), key=_mean)
        steps = (np.arange(len(here)) - (len(here) - 1) / 2) * 0.045  # side by side, not on top
        places += [(row, size * 2**step) for row, step in zip(here, steps)]
    for row, x in places:
        score, style = row.score, look[row.label]
        if score.low is not None:
            axes.plot([x, x], [score.low, score.high], color=style["color"], linewidth=1.4)
        axes.plot(x, score.mean, color=style["color"], marker=style["marker"], markersize=7)
    front, best = [], np.inf
    for row, x in sorted(places, key=lambda p: (p[0].cache_bytes_per_token, _mean(p[0]))):
        if row.score.mean < best:
            front.append((x, row.score.mean))
            best = row.score.mean
    axes.step(*zip(*front), where="post", color=FAINT, linewidth=1, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 1.35, sizes[-1] * 1.55)
    axes.set_xticks(sizes, [formats.num_bytes(size) for size in sizes])
    axes.minorticks_off()
    low, high = _room(rows)
    axes.set_ylim(low, high)
    for size in sizes:
        here = [(row, x) for row, x in places if row.cache_bytes_per_token == size]
        heights = spread([_mean(row) for row, _ in here], (high - low) * 0.058)
        edge = max(x for _, x in here)
        for (row, x), height in zip(here, heights):
            axes.annotate(
                row.label, (x, row.score.mean), xytext=(edge * 1.05, height), va="center",
                bbox=_BEHIND,
                arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.6, "shrinkB": 4},
            )  # fmt: skip
    axes.set_xlabel("decode cache, bytes a token (log scale)")
    axes.set_ylabel(f"validation {summary.metric.name}")
    return figure


def _room(rows: list[Row]) -> tuple[float, float]:
    """Limits that show every mean, and intervals up to the spread of the means beyond."""
    means = [row.score.mean for row in rows]
    span = max(max(means) - min(means), 0.01)
    lows = [row.score.mean if row.score.low is None else row.score.low for row in rows]
    highs = [row.score.mean if row.score.high is None else row.score.high for row in rows]
    low, high = max(min(lows), min(means) - span / 2), min(max(highs), max(means) + span / 2)
    return low - 0.08 * span, high + 0.08 * span


def _mean(row: Row) -> float:
    return row.score.mean


def _forest(summary: Summary):
    """Paired differences in percent, with 95 % intervals."""
    rows = sorted(summary.compared, key=lambda row: row.paired.mean, reverse=True)
    if not rows:
        return None
    figure, (axes,) = new(8.6, 0.9 + 0.42 * len(rows))
    look = _look(summary)
    axes.axvline(0, color=INK, linewidth=1.2)
    for y, row in enumerate(rows):
        pair, style = row.paired, look[row.label]
        middle = 100 * summary.relative(pair.mean)
        if pair.low is not None:
            ends = [100 * summary.relative(v) for v in (pair.low, pair.high)]
            axes.plot(ends, [y, y], color=style["color"], linewidth=2.2, solid_capstyle="butt")
        claimed = pair.verdict in (BETTER, WORSE)
        axes.plot(
            middle, y, marker=style["marker"], markersize=8, color=style["color"],
            markerfacecolor=style["color"] if claimed else PAPER, markeredgewidth=1.6,
        )  # fmt: skip
        axes.annotate(
            pair.verdict, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.5
        )
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    of = summary.metric.of
    axes.set_xlabel(f"difference from {summary.baseline.label}, % {of} (left is better)")
    return figure
