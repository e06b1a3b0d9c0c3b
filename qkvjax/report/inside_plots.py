"""What `analyze` shows of one model: a table, and plots of spectra, heads and attention."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from qkvjax import formats
from qkvjax.evaluation.activations import LayerActivations
from qkvjax.report import drawing

# The plot of attention shows at most so many layers and heads.
MOST_LAYERS = 6
MOST_HEADS = 8
_HEAT_MAPS = {
    "score_asymmetry": "asymmetry of scores",
    "diagonal_mass": "attention to oneself",
    "entropy": "entropy, nats",
    "max_logit": "largest logit",
}
_TABLE_COLUMNS = {
    "score_asymmetry": "asymmetry",
    "diagonal_mass": "to oneself",
    "entropy": "entropy",
    "max_logit": "max logit",
}


def table(records: list[dict]) -> list[str]:
    """Returns the lines of a table of one model: a row for each layer, means over heads."""
    rows: dict[int, dict[str, list[float]]] = {}  # layer -> column -> values of its heads
    for record in records:
        column = _column(record)
        if column is not None:
            row = rows.setdefault(record["layer"], {})
            row.setdefault(column, []).append(record["value"])
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    header = [("", "layer"), *(_two_lines(column) for column in columns)]
    cells = []
    for layer, row in rows.items():
        means = [f"{np.mean(row[name]):.3g}" if name in row else formats.NONE for name in columns]
        cells.append([str(layer), *means])
    return formats.table(header, cells)


def _column(record: dict) -> str | None:
    """Returns the column of a record, such as "rank W_q" or "CKA k, v"; None if it has none.

    "(x)" marks ranks of what a projection puts out, beside those of its weights.
    """
    metric = record["metric"]
    if metric == "effective_rank" and record["head"] is None:
        return f"rank {record['what']}".replace(" activations", "(x)")
    if metric == "linear_cka":
        return f"CKA {record['what'].removesuffix(' activations')}"
    return _TABLE_COLUMNS.get(metric)


def _two_lines(column: str) -> tuple[str, str]:
    """Returns the title of a column in two lines; the first is empty for a single word."""
    first, _, second = column.partition(" ")
    return (first, second) if second else ("", first)


def write(records: list[dict], seen: list[LayerActivations], folder: Path) -> list[Path]:
    """Writes spectra.svg, heads.svg and attention.svg; returns their paths.

    Args:
      records: of `evaluation.inside`.
      seen: what each layer computed.
    """
    figures = drawing.drawn(
        {
            "spectra": functools.partial(_spectra, records),
            "heads": functools.partial(_heads, records),
            "attention": functools.partial(_attention, seen),
        }
    )
    drawing.write(figures, folder)
    return [folder / f"{name}.svg" for name in figures]


def _spectra(records: list[dict]):
    """Draws singular values over the largest: weights above, activations below, a line a layer."""
    spectra: dict[str, dict[int, np.ndarray]] = {}  # name -> layer -> singular values
    for record in records:
        if record["metric"] == "singular_values" and record["head"] is None:
            layers = spectra.setdefault(record["what"], {})
            layers[record["layer"]] = np.array(record["values"])
    last_layer = max(layer for layers in spectra.values() for layer in layers)
    weights = [name for name in spectra if not name.endswith(" activations")]
    activations = [name for name in spectra if name.endswith(" activations")]

    columns = max(len(weights), len(activations))
    figure, panels = drawing.new(2.9 * columns + 0.8, 5.6, columns=columns, rows=2)
    for axes in panels:
        axes.set_visible(False)
    for row, names in ((panels[:columns], weights), (panels[columns:], activations)):
        for axes, name in zip(row, names):
            axes.set_visible(True)
            axes.set_title(name, fontsize=10)
            _draw_spectra(axes, spectra[name], last_layer)
        row[0].set_ylabel("singular value / largest")
        row[0].legend(frameon=False, fontsize=8.5)
    for axes in panels[columns:]:
        axes.set_xlabel("index / number of values")
    return figure


def _draw_spectra(axes, layers: dict[int, np.ndarray], last_layer: int) -> None:
    """Draws a line for each layer, from dark to light; the first and the last are named."""
    from matplotlib import colormaps

    for layer, values in layers.items():
        colour = colormaps["viridis"](0.85 * layer / max(1, last_layer))
        label = f"layer {layer}" if layer in (0, last_layer) else None
        axes.plot(np.linspace(0, 1, len(values)), values / values[0], color=colour, label=label)
    axes.set_ylim(0, 1.03)


def _heads(records: list[dict]):
    """Draws a heat map of layers by heads for each measure of attention."""
    figure, panels = drawing.new(11, 3.0, columns=len(_HEAT_MAPS))
    for axes, (metric, title) in zip(panels, _HEAT_MAPS.items(), strict=True):
        cells = {(r["layer"], r["head"]): r["value"] for r in records if r["metric"] == metric}
        num_layers = 1 + max(layer for layer, _ in cells)
        num_heads = 1 + max(head for _, head in cells)
        grid = np.full((num_layers, num_heads), np.nan)
        for cell, value in cells.items():
            grid[cell] = value
        image = axes.imshow(grid, cmap="cividis", aspect="auto")
        axes.figure.colorbar(image, ax=axes, fraction=0.05)
        axes.grid(visible=False)
        axes.set_yticks(range(0, num_layers, max(1, num_layers // 8)))
        axes.set_xticks(range(0, num_heads, max(1, num_heads // 8)))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("head")
    panels[0].set_ylabel("layer")
    return figure


def _attention(seen: list[LayerActivations]):
    """Draws the attention of the first sequence: a row for each layer, a column for each head."""
    count = min(len(seen), MOST_LAYERS)
    layers = np.unique(np.linspace(0, len(seen) - 1, count).round()).astype(int)
    heads = min(MOST_HEADS, seen[0].weights.shape[1])
    width = 1.55 * heads + 0.6
    height = 1.7 * len(layers) + 0.3
    figure, panels = drawing.new(width, height, columns=heads, rows=len(layers))
    for row, layer in enumerate(layers):
        for head in range(heads):
            axes = panels[row * heads + head]
            weights = seen[layer].weights[0, head]
            axes.imshow(np.sqrt(weights), cmap="cividis", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            axes.set_title(f"layer {layer}, head {head}", fontsize=8)
    return figure
