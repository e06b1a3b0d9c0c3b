"""Ties projections of a trained model by averaging them. Nothing is trained here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qkvjax.attention.spec import parse_sharing
from qkvjax.errors import UserError

METHODS = ("average",)


def tied_arrays(
    arrays: Mapping[str, np.ndarray], names: list[str], old: str, new: str
) -> dict[str, np.ndarray]:
    """Returns the arrays of a model with the sharing `new`, made from one with the sharing `old`.

    A projection that several roles share is the mean over these roles; so is the gain of a norm.
    A projection counts once for each role that used it: from "q-k=v" to "q=k=v" the mean is
    (q + 2 kv) / 3. With kv = (k + v) / 2 that is (q + k + v) / 3, so tying in two steps gives the
    same model as tying in one.

    Args:
      arrays: of the model with `old`, by their names in the checkpoint.
      names: names of the arrays of the model with `new`.
      old: sharing of the model, such as "q-k-v".
      new: sharing to make, such as "q-k=v".

    Raises:
      UserError: `old` ties roles that `new` keeps apart.
    """
    old_blocks = {role: "".join(block) for block in parse_sharing(old) for role in block}
    new_blocks = {"".join(block): block for block in parse_sharing(new)}
    for roles in old_blocks.values():
        if not any(set(roles) <= set(block) for block in new_blocks):
            raise UserError(
                f"sharing {old!r} is already tied where {new!r} is not: tie to one that shares more"
            )
    return {name: _tied_array(name, arrays, old_blocks, new_blocks) for name in names}


def _tied_array(
    name: str,
    arrays: Mapping[str, np.ndarray],
    old_blocks: Mapping[str, str],
    new_blocks: Mapping[str, tuple[str, ...]],
) -> np.ndarray:
    """Returns one array of the tied model.

    Args:
      name: such as "...attention.projections.kv.weight" or "...attention.norms.kv.gain".
      arrays: of the model before.
      old_blocks: role -> its block in the model before, such as {"q": "q", "k": "k", "v": "v"}.
      new_blocks: block of the tied model -> its roles, such as {"q": ("q",), "kv": ("k", "v")}.
    """
    parts = name.split(".")
    kind = next((i for i, part in enumerate(parts) if part in ("projections", "norms")), None)
    if kind is None:
        return arrays[name]
    roles = new_blocks[parts[kind + 1]]
    old_names = [
        ".".join([*parts[: kind + 1], old_blocks[role], *parts[kind + 2 :]]) for role in roles
    ]
    # Values have no norm, so a tied norm has the gains of queries and keys alone.
    values = [arrays[old_name] for old_name in old_names if old_name in arrays]
    return np.mean(values, axis=0, dtype=np.float64).astype(values[0].dtype)
