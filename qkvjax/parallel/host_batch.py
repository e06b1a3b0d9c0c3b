"""Batches of the host: which rows a process prepares, and how they come onto the mesh."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from qkvjax.parallel.rules import sharding, ways


def host_rows(mesh: jax.sharding.Mesh, count: int) -> slice:
    """Returns which rows of a batch this process has to prepare for its devices.

    Two processes need either the same rows or none in common, and together all processes need all
    rows.

    Args:
      count: rows of the whole batch, sharded over "batch".

    Returns:
      The range of the rows that this process's devices hold; all rows where these are not one
      range.
    """
    rows_of_process: dict[int, set[int]] = {}
    for device, (part,) in sharding(mesh, "batch").devices_indices_map((count,)).items():
        rows = rows_of_process.setdefault(device.process_index, set())
        rows.update(range(*part.indices(count)))
    groups = {frozenset(rows) for rows in rows_of_process.values()}
    assert sum(map(len, groups)) == count == len(set().union(*groups)), groups

    mine = rows_of_process[jax.process_index()]
    start = min(mine)
    stop = max(mine) + 1
    is_one_range = stop - start == len(mine)
    return slice(start, stop) if is_one_range else slice(0, count)


def place(
    batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh, num_rows: int | None = None
) -> dict[str, jax.Array]:
    """Puts the arrays of a batch on the mesh.

    Sequences are sharded over "batch" where the devices divide their number, and positions over
    "length". An array whose second axis is not T long (labels of a sequence, vectors) is whole
    along it.

    Args:
      batch: host arrays [..., B, T] or [..., B, other, ...]; "positions" [..., B, T] gives T.
      num_rows: B of the whole batch where this process has only the rows of its devices; None
        where it has all rows.
    """
    *leading, rows, length = batch["positions"].shape
    num_rows = num_rows or rows
    row_name = "batch" if num_rows % ways("batch", sizes=mesh.shape) == 0 else None

    def put(array):
        sequence, *rest = array.shape[len(leading) + 1 :]
        sequence_name = "length" if sequence == length else None
        names = (*(None for _ in leading), row_name, sequence_name, *(None for _ in rest))
        shape = (*leading, num_rows, sequence, *rest)
        return jax.make_array_from_process_local_data(sharding(mesh, *names), array, shape)

    return {name: put(array) for name, array in batch.items()}
