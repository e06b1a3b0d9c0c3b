"""Whether the devices that hold the same numbers hold the same bits.

A bit that flips in one replica's memory is averaged into all of them through the gradients, and no
loss shows it. Comparing fingerprints of what each device holds does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import PartitionSpec

from qkvjax.parallel.distributed import fetch


def came_apart(
    arrays: Mapping[str, jax.Array], fingerprint: Callable[[jax.Array], jax.Array]
) -> list[str]:
    """The names of arrays whose copies differ between devices, the same on every process.

    Args:
      arrays: on the mesh in force.
      fingerprint: array -> uint32 [n], of a device's part alone.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.size == 1:
        return []
    prints = fetch(_prints(mesh, fingerprint)(dict(arrays)))
    row = {device: i for i, device in enumerate(mesh.devices.ravel())}
    differing = []
    for name, array in arrays.items():
        first: dict[str, int] = {}  # part of the array -> a device that has it
        for device, part in array.sharding.devices_indices_map(array.shape).items():
            own = row[device]
            other = first.setdefault(str(part), own)
            if np.any(prints[name][own] != prints[name][other]):
                differing.append(name)
                break
    return differing


@functools.cache
def _prints(mesh: jax.sharding.Mesh, fingerprint: Callable):
    """A program: arrays by name -> uint32 [devices, n] by name."""

    def of_parts(arrays):
        return jax.tree.map(lambda part: fingerprint(part)[None], arrays)

    def program(arrays):
        where = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, arrays)
        out = PartitionSpec(mesh.axis_names)
        return jax.shard_map(of_parts, in_specs=(where,), out_specs=out, check_vma=False)(arrays)

    return jax.jit(program)
