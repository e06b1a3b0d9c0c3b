"""Combinators for the grid of a study. A grid is a tuple of points, a point a dict of fields.

    product(axis("model.sharing", SHARINGS), axis("model.num_kv_heads", (4, 1)))
    zipped(axis("model.d_model", (128, 256)), axis("model.num_layers", (2, 4)))

The first point of a study is its baseline. A point may carry a "label" of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable

from qkvjax.attention.spec import sharing_name
from qkvjax.errors import UserError

Grid = tuple[dict, ...]


def axis(field: str, values: Iterable) -> Grid:
    """One point for each value of a field such as "model.sharing"."""
    return tuple({field: value} for value in values)


def product(*grids: Grid) -> Grid:
    """Every combination; the last grid varies fastest."""
    return tuple(_merge(points) for points in itertools.product(*grids))


def zipped(*grids: Grid) -> Grid:
    """First with first, second with second; the grids must be equally long."""
    sizes = [len(grid) for grid in grids]
    if len(set(sizes)) > 1:
        raise UserError(f"zipped grids have {sizes} points: make them equal")
    return tuple(_merge(points) for points in zip(*grids))


def chain(*grids: Grid) -> Grid:
    """One grid after another."""
    return tuple(itertools.chain(*grids))


def paper_variants(channels: int) -> Grid:
    """The six variants of the paper's encoders (Kayyam et al. 2026, table 1): four sharings, and
    "+", which is score2d(channels), on the two that tie queries to keys.
    """
    score = (f"score2d({channels})",)
    plus = tuple(
        {"model.sharing": sharing, "model.score": score, "label": f"({sharing_name(sharing)})+"}
        for sharing in ("q=k-v", "q=k=v")
    )
    return axis("model.sharing", ("q-k-v", "q=k-v", "q-k=v", "q=k=v")) + plus


def _merge(points: Iterable[dict]) -> dict:
    merged: dict = {}
    for point in points:
        twice = merged.keys() & point.keys()
        if twice:
            raise UserError(f"{sorted(twice)[0]} stands on two axes of the grid")
        merged |= point
    return merged


def label(point: dict) -> str:
    """The point's name in tables: the sharing as reports write it, then other fields."""
    if "label" in point:
        return point["label"]
    parts = [
        sharing_name(value) if field == "model.sharing" else f"{field.split('.')[-1]}={value}"
        for field, value in point.items()
    ]
    return " ".join(parts) or "base"


def slug(text: str) -> str:
    """A label as a folder's name."""
    return re.sub(r"[^a-z0-9._=-]+", "-", text.lower()).strip("-.=") or "run"


def identity_hash(identity: dict) -> str:
    """12 hex digits of the fields that fix a run."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
