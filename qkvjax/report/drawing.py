"""How the plots of the project look, as SVG text.

The colours are those of Okabe and Ito, which differ in every common kind of colour blindness. Lines
also differ in their dashes. Text, paper and grid have three fixed colours, which the HTML report
replaces by its own, so that plots follow a dark page.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from qkvjax import formats

INK = "#22272e"
PAPER = "#fffffe"
FAINT = "#a0a8b0"
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "h")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ((0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.6, 1.2, 1.6)), (0, (3, 1)), "solid")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qkvjax",
    "text.parse_math": False,  # labels are names, and may hold a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.28,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def drawn(plots: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """Draws plots in the style of the report.

    Args:
      plots: name -> function that returns a figure, or None where it has nothing to draw.

    Returns:
      name -> SVG text, of those that drew.
    """
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
    """Returns (figure, its panels row by row).

    It is made without pyplot, which would keep every figure alive.

    Args:
      width, height: of the figure, in inches.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _svg(figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def line_style(i: int) -> dict:
    """Returns the colour and dashes of line number i."""
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


def label_ends(axes, ends: list[tuple[str, float, float, str]]) -> None:
    """Writes the names of lines to the right of the axes, joined to their ends.

    Args:
      ends: (label, x, y, colour) of each line.
    """
    low, high = axes.get_ylim()
    visible = [min(max(y, low), high) for _, _, y, _ in ends]
    heights = spread(visible, (high - low) * 0.062)
    for (label, x, _, colour), y, height in zip(ends, visible, heights):
        axes.annotate(
            label,
            (x, y),
            xytext=(1.035, (height - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 2, "shrinkB": 4},
        )


def tokens_axis(axes) -> None:
    """Labels the x axis with numbers of training tokens, such as 500k."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: formats.count(x) if x else "0"))
    axes.set_xlabel("training tokens")
