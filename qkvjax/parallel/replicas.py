"""Whether devices that hold the same part of an array hold the same bits.

A bit that flips in the memory of one replica is averaged into all replicas through the gradients,
and the loss need not show it. Comparing fingerprints of what each device holds does show it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import PartitionSpec

from qkvjax.parallel.distributed import fetch


def differing_copies(
    arrays: Mapping[str, jax.Array], fingerprint: Callable[[jax.Array], jax.Array]
) -> list[str]:
    """Returns the names of arrays whose copies differ between devices, the same on every process.

    Args:
      arrays: on the mesh in force.
      fingerprint: array -> uint32 [n]; called with each device's part alone.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.size == 1:
        return []
    prints = fetch(_fingerprint_program(mesh, fingerprint)(dict(arrays)))
    row_of_device = {device: row for row, device in enumerate(mesh.devices.ravel())}
    differing = []
    for name, array in arrays.items():
        first_row: dict[str, int] = {}  # part of the array -> row of the first device that has it
        for device, part in array.sharding.devices_indices_map(array.shape).items():
            row = row_of_device[device]
            other = first_row.setdefault(str(part), row)
            if np.any(prints[name][row] != prints[name][other]):
                differing.append(name)
                break
    return differing


@functools.cache
def _fingerprint_program(mesh: jax.sharding.Mesh, fingerprint: Callable):
    """Returns a program: arrays by name -> fingerprints by name, uint32 [devices, n]."""

    def of_parts(arrays):
        return jax.tree.map(lambda part: fingerprint(part)[None], arrays)

    def program(arrays):
        specs = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, arrays)
        out = PartitionSpec(mesh.axis_names)
        return jax.shard_map(of_parts, in_specs=(specs,), out_specs=out, check_vma=False)(arrays)

    return jax.jit(program)
