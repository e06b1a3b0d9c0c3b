"""What `analyze` shows: a table; spectra, maps of layers by heads, attention maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qkvjax import formats
from qkvjax.evaluation.inside import Looked
from qkvjax.report import drawing

MOST_LAYERS, MOST_HEADS = 6, 8  # of attention maps
_MAPS = {
    "score_asymmetry": "asymmetry of scores",
    "diagonal_mass": "attention to oneself",
    "entropy": "entropy, nats",
    "max_logit": "largest logit",
}


def table(records: list[dict]) -> list[str]:
    """Lines of a table of one model: a row a layer, means over heads."""
    cells: dict[int, dict[str, list[float]]] = {}
    for record in records:
        metric, what = record["metric"], record["what"]
        name = {
            "effective_rank": f"rank {what}" if record["head"] is None else None,
            "linear_cka": f"CKA {what.removesuffix(' activations')}",
            "score_asymmetry": "asymmetry",
            "diagonal_mass": "to oneself",
            "entropy": "entropy",
            "max_logit": "max logit",
        }.get(metric)
        if name:
            row = cells.setdefault(record["layer"], {})
            row.setdefault(name.replace(" activations", "(x)"), []).append(record["value"])
    columns_ = list(dict.fromkeys(name for row in cells.values() for name in row))
    header = [("", "layer"), *(tuple(("", *name.split(" ", 1))[-2:]) for name in columns_)]
    rows = [
        [str(layer), *(f"{np.mean(row[n]):.3g}" if n in row else "–" for n in columns_)]
        for layer, row in cells.items()
    ]
    return formats.table(header, rows)


def write(records: list[dict], seen: list[Looked], folder: Path) -> list[Path]:
    """Writes spectra.svg, heads.svg and attention.svg; returns their paths."""
    figures = drawing.drawn(
        {
            "spectra": lambda: _spectra(records),
            "heads": lambda: _heads(records),
            "attention": lambda: _attention(seen),
        }
    )
    drawing.write(figures, folder)
    return [folder / f"{name}.svg" for name in figures]


def _spectra(records: list[dict]):
    """Singular values over the largest: weights above, activations below, a line a layer."""
    from matplotlib import colormaps

    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for record in records:
        if record["metric"] == "singular_values" and record["head"] is None:
            line = record["layer"], np.array(record["values"])
            found.setdefault(record["what"], []).append(line)
    kinds = [
        [what for what in found if what.endswith(" activations") == below]
        for below in (False, True)
    ]
    last = max(layer for lines in found.values() for layer, _ in lines)
    columns = max(map(len, kinds))
    figure, panels = drawing.new(2.9 * columns + 0.8, 5.6, columns=columns, rows=2)
    for axes in panels:
        axes.set_visible(False)
    for row, kind in enumerate(kinds):
        for axes, what in zip(panels[row * columns :], kind):
            axes.set_visible(True)
            for layer, values in found[what]:
                colour = colormaps["viridis"](0.85 * layer / max(1, last))
                label = f"layer {layer}" if layer in (0, last) else None
                part = np.linspace(0, 1, len(values))
                axes.plot(part, values / values[0], color=colour, label=label)
            axes.set_ylim(0, 1.03)
            axes.set_title(what, fontsize=10)
        panels[row * columns].set_ylabel("singular value / largest")
        panels[row * columns].legend(frameon=False, fontsize=8.5)
    for axes in panels[columns:]:
        axes.set_xlabel("index / number of values")
    return figure


def _heads(records: list[dict]):
    """Layer-by-head heat maps of the attention measures."""
    figure, panels = drawing.new(11, 3.0, columns=len(_MAPS))
    for axes, (metric, title) in zip(panels, _MAPS.items(), strict=True):
        cells = {(r["layer"], r["head"]): r["value"] for r in records if r["metric"] == metric}
        layers, heads = (1 + max(place[i] for place in cells) for i in (0, 1))
        grid = np.full((layers, heads), np.nan)
        for place, value in cells.items():
            grid[place] = value
        image = axes.imshow(grid, cmap="cividis", aspect="auto")
        axes.figure.colorbar(image, ax=axes, fraction=0.05)
        _whole_ticks(axes, layers, heads)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("head")
    panels[0].set_ylabel("layer")
    return figure


def _attention(seen: list[Looked]):
    """Attention of the first sequence: a row a layer, a column a head."""
    layers = np.unique(np.linspace(0, len(seen) - 1, min(len(seen), MOST_LAYERS)).round())
    heads = min(MOST_HEADS, seen[0].weights.shape[1])
    size = (1.55 * heads + 0.6, 1.7 * len(layers) + 0.3)
    figure, panels = drawing.new(*size, columns=heads, rows=len(layers))
    for row, layer in enumerate(layers.astype(int)):
        for head in range(heads):
            axes = panels[row * heads + head]
            weights = seen[layer].weights[0, head]
            axes.imshow(np.sqrt(weights), cmap="cividis", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            axes.set_title(f"layer {layer}, head {head}", fontsize=8)
    return figure


def _whole_ticks(axes, rows: int, columns: int) -> None:
    axes.grid(visible=False)
    axes.set_yticks(range(0, rows, max(1, rows // 8)))
    axes.set_xticks(range(0, columns, max(1, columns // 8)))
