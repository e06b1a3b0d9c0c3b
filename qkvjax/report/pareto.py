"""The plot of decode cache against score."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from qkvjax import formats
from qkvjax.report.drawing import FAINT, PAPER, new, spread
from qkvjax.report.summary import Summary

_SIZE = "cache_bytes_per_token"
_LABEL_BOX = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.2}  # keeps labels clear of lines


def plot(summary: Summary, styles: dict[str, dict]):
    """Draws cache bytes per token (log) against score; a line joins the variants on the frontier.

    Args:
      styles: label -> colour, marker and line style.

    Returns:
      The figure; None with fewer than two variants that have both figures.
    """
    rows = summary.variants[summary.variants["score"].notna() & (summary.variants[_SIZE] > 0)]
    if len(rows) < 2:
        return None
    figure, (axes,) = new(8.6, 4.1)
    sizes = sorted(rows[_SIZE].unique())
    positions = _positions(rows, sizes)
    for label, x in positions.items():
        row = rows.loc[label]
        color = styles[label]["color"]
        if not math.isnan(row["score_low"]):
            axes.plot([x, x], [row["score_low"], row["score_high"]], color=color, linewidth=1.4)
        axes.plot(x, row["score"], color=color, marker=styles[label]["marker"], markersize=7)

    frontier = [(positions[label], score) for label, score in _frontier(rows)]
    axes.step(*zip(*frontier), where="post", color=FAINT, linewidth=1, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 1.35, sizes[-1] * 1.55)
    axes.set_xticks(sizes, [formats.num_bytes(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(*_score_limits(rows))
    for size in sizes:
        labels = [label for label in positions if rows.loc[label, _SIZE] == size]
        _write_labels(
            axes, {label: (positions[label], rows.loc[label, "score"]) for label in labels}
        )
    axes.set_xlabel("decode cache, bytes per token (log scale)")
    axes.set_ylabel(f"validation {summary.metric.name}")
    return figure


def _positions(rows: pd.DataFrame, sizes: list[float]) -> dict[str, float]:
    """Returns label -> x; variants of one size stand side by side, not on top of each other."""
    positions: dict[str, float] = {}
    for size in sizes:
        labels = rows[rows[_SIZE] == size].sort_values("score").index
        offsets = (np.arange(len(labels)) - (len(labels) - 1) / 2) * 0.045
        for label, offset in zip(labels, offsets):
            positions[label] = size * 2**offset
    return positions


def _frontier(rows: pd.DataFrame) -> list[tuple[str, float]]:
    """Returns (label, score) of the variants that none with as small a cache beats, by size."""
    frontier = []
    best = math.inf
    for label, row in rows.sort_values([_SIZE, "score"]).iterrows():
        if row["score"] < best:
            best = row["score"]
            frontier.append((label, best))
    return frontier


def _score_limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Returns limits that show every mean, and of the intervals at most half the spread of the
    means beyond them."""
    means = rows["score"]
    span = max(means.max() - means.min(), 0.01)
    low = max(rows["score_low"].fillna(means).min(), means.min() - span / 2)
    high = min(rows["score_high"].fillna(means).max(), means.max() + span / 2)
    return low - 0.08 * span, high + 0.08 * span


def _write_labels(axes, points: dict[str, tuple[float, float]]) -> None:
    """Writes labels to the right of the points of one cache size, without overlap.

    Args:
      points: label -> (x, y).
    """
    low, high = axes.get_ylim()
    heights = spread([y for _, y in points.values()], (high - low) * 0.058)
    x_labels = max(x for x, _ in points.values()) * 1.05
    for (label, point), height in zip(points.items(), heights):
        axes.annotate(
            label,
            point,
            xytext=(x_labels, height),
            va="center",
            bbox=_LABEL_BOX,
            arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.6, "shrinkB": 4},
        )
