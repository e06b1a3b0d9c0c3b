"""Reads the points and settings of a study from its config, and names them."""

from __future__ import annotations

from qkvjax import sweep
from qkvjax.attention.spec import canonical_sharing
from qkvjax.errors import UserError


def read_points(name: str, points: object) -> tuple[list[dict], list[str]]:
    """Returns the points of a grid and their labels.

    Args:
      name: "points" or "settings", the field of the group `study`.
      points: its value: a list of points as `qkvjax.sweep` makes them.

    Raises:
      UserError: it is not a list of dicts, a point sets the seed, or two labels are equal.
    """
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise UserError(
            f"study.{name}={points!r} is not a grid: make it with qkvjax.sweep, one dict per point"
        )
    for point in points:
        if not all(isinstance(text, str) for text in (*point, point.get("label", ""))):
            raise UserError(f"the grid's point {point!r}: field names and label must be strings")
        if "seed" in point:
            raise UserError("a point of the grid sets `seed`: study.seeds is the number of seeds")
    points = [_with_canonical_sharing(point) for point in points]
    labels = [sweep.label(point) for point in points]
    twins = sorted(label for label in labels if labels.count(label) > 1)
    if twins:
        raise UserError(f"two points of the grid are called {twins[0]!r}: give labels that differ")
    return points, labels


def _with_canonical_sharing(point: dict) -> dict:
    """Returns a point whose sharing, if it has one, is written as in "q-k=v"."""
    if "model.sharing" not in point:
        return point
    return {**point, "model.sharing": canonical_sharing(point["model.sharing"])}
