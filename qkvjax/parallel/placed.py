"""On which mesh the arrays of a tree are, and what they take there."""

from __future__ import annotations

import contextlib
import math

import jax
from jax.sharding import NamedSharding

from qkvjax.parallel.rules import has_mesh


def mesh_of(tree) -> jax.sharding.Mesh | None:
    """Returns the mesh of the arrays of a tree; None where they are on one device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return sharding.mesh
    return None


def on_mesh_of(tree) -> contextlib.AbstractContextManager:
    """Returns a context in which the mesh of a tree's arrays is in force, if none is yet."""
    mesh = None if has_mesh() else mesh_of(tree)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def use_mesh_of(tree) -> None:
    """Puts the mesh of a tree's arrays in force until another one is; without one does nothing."""
    mesh = mesh_of(tree)
    if mesh is not None:
        jax.set_mesh(mesh)


def allocated_bytes(array) -> int:
    """Returns the bytes of an array or a ShapeDtypeStruct on all devices of its mesh together.

    An array that is whole on each of two devices counts twice.
    """
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return math.prod(array.shape) * array.dtype.itemsize
    shard_bytes = math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return shard_bytes * sharding.mesh.size


def on_devices_of(mesh: jax.sharding.Mesh, tree):
    """Returns ShapeDtypeStructs on the devices of `mesh`.

    Args:
      tree: the result of `jax.eval_shape` under this mesh; its shardings name axes and no devices.
    """

    def place(leaf):
        sharding = NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree)
