"""Lookups in tables whose rows may be spread over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qkvjax.parallel.rules import RULES, axes_of, gather, has_mesh, ways


def copies(matrix: jax.Array) -> jax.Array:
    """One copy of a matrix for each group of devices with tokens of its own.

    [V, D] -> [W, V, D], spread over the groups, so that a device stores one copy as it would
    anyway. What uses the copies has gradients of each device's tokens alone; they add up on the
    device, and cross devices once, as the gradient of the copying.

    The matrix itself, [V, D], where no tokens are spread.
    """
    if not has_mesh() or ways("batch", "length") == 1:
        return matrix
    matrix = gather(matrix)
    place = PartitionSpec(token_axes(), *jax.typeof(matrix).sharding.spec)
    shape = (ways("batch", "length"), *matrix.shape)
    dimensions = tuple(range(1, matrix.ndim + 1))
    return jax.lax.broadcast_in_dim(matrix, shape, dimensions, out_sharding=place)


def token_axes() -> tuple[str, ...]:
    """The mesh axes that spread tokens."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in (*RULES["batch"], *RULES["length"]) if sizes[axis] > 1)


def embed(table: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Looks ids up in a table: [V, D] or its `copies`, int [B, T] -> [B, T, D].

    Of a table whose rows are spread over devices, each device looks up the rows that it has, and
    all add up.
    """
    if not has_mesh():
        return table[ids_BT]
    has_copies = table.ndim == 3
    table = table if has_copies else gather(table)
    place = jax.typeof(table).sharding.spec
    axis = place[-2]
    tokens = PartitionSpec(*axes_of(ids_BT))
    if axis is None and not has_copies:
        return table.at[ids_BT].get(out_sharding=PartitionSpec(*tokens, None))

    def local(table, ids):
        table = table[0] if has_copies else table
        if axis is None:
            return table[ids]
        ids = ids - jax.lax.axis_index(axis) * table.shape[0]
        here = (ids >= 0) & (ids < table.shape[0])
        rows = jnp.where(here[..., None], table[jnp.where(here, ids, 0)], 0)
        return jax.lax.psum(rows, axis)

    return jax.shard_map(local, in_specs=(place, tokens), out_specs=tokens, check_vma=False)(
        table, ids_BT
    )


def lookup(table_S: jax.Array, places_BS: jax.Array) -> jax.Array:
    """Numbers of a table [S] at places int [B, S], sharded as these are: [B, S]."""
    if not has_mesh():
        return table_S[places_BS]
    return table_S.at[places_BS].get(out_sharding=jax.typeof(places_BS).sharding.spec)
