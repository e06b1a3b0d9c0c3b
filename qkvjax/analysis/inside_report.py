"""The part of a study's report that looks inside its models: measures and spectra."""

from __future__ import annotations

import re

import numpy as np

from qkvjax.analysis import formats, plots
from qkvjax.analysis.document import Cell, Figure, Heading, Table
from qkvjax.analysis.summary import Row, Summary

# What stands in the table behind the ranks, in order; a sharing may have no such pair.
MEASURES = {
    "rank_scores": "rank W_q W_kᵀ", "cka_k_v": "CKA k, v", "cosine_k_v": "cos W_k, W_v",
    "angles_k_v": "cos of angles k, v",
    "score_asymmetry": "Asymmetry", "diagonal_mass": "To oneself", "entropy": "Entropy",
    "max_logit": "Max logit",
}  # fmt: skip


def look_inside(summary: Summary, figures: dict[str, str]) -> list:
    """A section with the measures of the evaluator `inside`, and the spectra; empty without."""
    rows = {row.label: found for row in summary.rows if (found := _measures(row))}
    if not rows and "spectra" not in figures:
        return []
    parts: list = [Heading("Inside the models")]
    shown = [name for name in MEASURES if any(name in found for found in rows.values())]
    if rows:
        cells = [
            [label, _ranks(found), *(_cell(found.get(name)) for name in shown)]
            for label, found in rows.items()
        ]
        columns = ["Variant", "Effective ranks", *(MEASURES[name] for name in shown)]
        parts.append(Table(
            columns, cells, left=("Variant",),
            caption="After training: means over layers and heads, of logits the largest; below,"
            " the range over seeds. Effective ranks (Roy & Vetterli 2007) of the projections (and"
            " of what they put out), and by head of W_q W_kᵀ; linear CKA of what keys and values"
            " carry, and cosine of their weights (near 0 for maps that differ by a rotation,"
            " whatever they carry); mean cosine of the principal angles between a head's spaces;"
            " asymmetry of the scores; attention to oneself; entropy in nats.",
        ))  # fmt: skip
    if "spectra" in figures:
        caption = (
            "Singular values of the projections over the largest, mean over layers, first seed"
            f"{summary.settings and f' of {summary.settings[0]}' or ''}."
            " A line that stays high uses all its directions."
        )
        parts.append(Figure("spectra", figures["spectra"], caption))
    return parts


def draw_spectra(summary: Summary):
    """A panel a variant, a line a projection."""
    found = {}
    for row in summary.rows:
        spectra = [line["spectra"] for line in row.results.values() if line.get("spectra")]
        if spectra:
            found[row.label] = spectra[0]
    if not found:
        return None
    across = min(len(found), 5)
    down = -(-len(found) // across)
    figure, panels = plots.new(2.1 * across + 0.6, 2.4 * down, columns=across, rows=down)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    names = list(dict.fromkeys(name for spectra in found.values() for name in spectra))
    for axes, (label, spectra) in zip(panels, found.items()):
        for name, values in spectra.items():
            style = plots.line_style(names.index(name))
            axes.plot(np.linspace(0, 1, len(values)), values, label=f"W_{name}", **style)
        axes.set_ylim(0, 1.03)
        axes.set_title(label, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("singular value / largest")
    return figure


def _measures(row: Row) -> dict[str, list[float]]:
    """measure -> its values over the runs."""
    found: dict[str, list[float]] = {}
    for line in row.results.values():
        for name, value in (line.get("inside") or {}).items():
            found.setdefault(name, []).append(value)
    return found


def _ranks(found: dict[str, list[float]]) -> Cell:
    """ "q 101, kv 102" of the weights; below, of what they put out."""

    def text(of: str) -> str:
        ranks = {match[1]: values for name, values in found.items()
                 if (match := re.fullmatch(f"rank_([a-z]+){of}", name))}  # fmt: skip
        ranks.pop("scores", None)  # which have a column
        return ", ".join(f"{name}{formats.NBSP}{np.mean(v):.0f}" for name, v in ranks.items())

    return Cell(text(""), text("_activations"))


def _cell(values: list[float] | None) -> Cell | str:
    if not values:
        return formats.NONE
    low, high = (f"{v:.2g}" for v in (min(values), max(values)))
    below = "" if low == high else f"{low}{formats.NBSP}to{formats.NBSP}{high}"
    return Cell(formats.signed(f"{np.mean(values):.3g}"), formats.signed(below))
