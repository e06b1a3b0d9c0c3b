"""Over which mesh, and how, the arrays of a tree lie."""

from __future__ import annotations

import contextlib
import math

import jax
from jax.sharding import NamedSharding

from qkvjax.parallel.rules import has_mesh


def mesh_of(tree) -> jax.sharding.Mesh | None:
    """The mesh over which the arrays of a tree lie; None where they lie on one device."""
    for leaf in jax.tree.leaves(tree):
        place = getattr(leaf, "sharding", None)
        if isinstance(place, NamedSharding):
            return place.mesh
    return None


def on_mesh_of(tree) -> contextlib.AbstractContextManager:
    """`jax.set_mesh` of the mesh over which the arrays of a tree lie, for a `with` statement."""
    mesh = None if has_mesh() else mesh_of(tree)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def use_mesh_of(tree) -> None:
    """Puts the mesh over which the arrays of a tree lie in force until another one is, if there
    is one."""
    mesh = mesh_of(tree)
    if mesh is not None:
        jax.set_mesh(mesh)


def allocated_bytes(array) -> int:
    """Bytes that an array, or a ShapeDtypeStruct, takes on all devices of the mesh over which it
    lies; copies count."""
    shape, place = array.shape, getattr(array, "sharding", None)
    if not isinstance(place, NamedSharding):
        return math.prod(shape) * array.dtype.itemsize
    return math.prod(place.shard_shape(shape)) * array.dtype.itemsize * place.mesh.size


def on_devices_of(mesh: jax.sharding.Mesh, tree):
    """What `jax.eval_shape` gave under a mesh, as ShapeDtypeStructs over the mesh's devices."""

    def place(leaf):
        where = NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(place, tree)
