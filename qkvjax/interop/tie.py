"""Ties the projections of a trained model, without training: where `healing` would start."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qkvjax.attention.spec import parse_sharing
from qkvjax.errors import UserError

METHODS = ("average",)


def tied_arrays(
    arrays: Mapping[str, np.ndarray], names: list[str], old: str, new: str
) -> dict[str, np.ndarray]:
    """Arrays of the tied model: a projection that several roles share is their mean.

    Args:
      arrays: of the model that is tied, by the names of its checkpoint.
      names: of the tied model's arrays.
      old, new: sharings, such as "q-k-v" and "q-k=v".

    Raises:
      UserError: roles that `old` shares and `new` does not.
    """
    before = {role: "".join(block) for block in parse_sharing(old) for role in block}
    after = {"".join(block): block for block in parse_sharing(new)}
    for roles in set(before.values()):
        if not any(set(roles) <= set(block) for block in after):
            raise UserError(
                f"sharing {old!r} is already tied where {new!r} is not: tie to one that shares more"
            )

    def of(name: str) -> np.ndarray:
        parts = name.split(".")
        kind = next((i for i, part in enumerate(parts) if part in ("projections", "norms")), None)
        if kind is None:
            return arrays[name]
        # Every role counts once, whichever of them shared before; values have no norm.
        found = []
        for role in after[parts[kind + 1]]:
            parts[kind + 1] = before[role]
            found.append(arrays.get(".".join(parts)))
        found = [array for array in found if array is not None]
        return np.mean(found, axis=0, dtype=np.float64).astype(found[0].dtype)

    return {name: of(name) for name in names}
