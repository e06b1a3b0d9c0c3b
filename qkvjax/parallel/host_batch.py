"""Batches of the host and how they come onto the mesh."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from qkvjax.parallel.rules import sharding, ways


def host_rows(mesh: jax.sharding.Mesh, count: int) -> slice:
    """Which of `count` rows over "batch" this process's devices hold: one range, or all rows where
    they hold several.

    Processes hold the same rows or other ones, and together all.
    """
    held: dict[int, set[int]] = {}
    for device, (part,) in sharding(mesh, "batch").devices_indices_map((count,)).items():
        held.setdefault(device.process_index, set()).update(range(*part.indices(count)))
    groups = {frozenset(rows) for rows in held.values()}
    assert sum(map(len, groups)) == count == len(set().union(*groups)), groups
    mine = held[jax.process_index()]
    start, stop = min(mine), max(mine) + 1
    return slice(start, stop) if stop - start == len(mine) else slice(0, count)


def place(
    batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh, num_rows: int | None = None
) -> dict[str, jax.Array]:
    """Puts host arrays [..., B, T] on the mesh, sequences over its data axes where these divide
    their number; what has another number of labels or vectors than T is whole in that axis.

    Args:
      num_rows: B of the whole batch, where each process has the rows of its devices alone; None
        where it has them all.
    """
    *before, rows, length = batch["positions"].shape
    divides = (num_rows or rows) % ways("batch", sizes=mesh.shape) == 0
    over = "batch" if divides else None

    def put(array):
        sequence, *rest = array.shape[len(before) + 1 :]
        axes = (over, "length" if sequence == length else None, *(None for _ in rest))
        there = sharding(mesh, *(None for _ in before), *axes)
        shape = (*before, num_rows or rows, sequence, *rest)
        return jax.make_array_from_process_local_data(there, array, shape)

    return {name: put(array) for name, array in batch.items()}
