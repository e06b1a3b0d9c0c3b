"""Lookups in tables whose rows may be spread over devices, and copies of a table for gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qkvjax.parallel.rules import RULES, axes_of, gather, has_mesh, ways


def copies(matrix: jax.Array) -> jax.Array:
    """Returns one copy of a matrix for each group of devices that has tokens of its own.

    A tied embedding has two gradients, one from the lookup and one from the head. Were each summed
    over devices by itself, an array as large as the embedding would cross devices twice. With the
    copies, both gradients add up on the device, and their sum crosses once: as the gradient of the
    copying.

    Returns:
      [V, D] -> [W, V, D], sharded over the W groups, so that a device stores one copy, as it would
      anyway. The matrix itself, [V, D], where tokens are not sharded.
    """
    if not has_mesh() or ways("batch", "length") == 1:
        return matrix
    matrix = gather(matrix)
    result = PartitionSpec(token_axes(), *axes_of(matrix))
    shape = (ways("batch", "length"), *matrix.shape)
    dimensions = tuple(range(1, matrix.ndim + 1))
    return jax.lax.broadcast_in_dim(matrix, shape, dimensions, out_sharding=result)


def token_axes() -> tuple[str, ...]:
    """Returns the mesh axes over which tokens are sharded."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in (*RULES["batch"], *RULES["length"]) if sizes[axis] > 1)


def embed(table: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Looks ids up in a table: [V, D] or its `copies` [W, V, D], int [B, T] -> [B, T, D].

    Where the rows of the table are sharded, each device looks up the ids that are among its rows,
    takes zeros for the others, and one sum over devices gives every row.
    """
    if not has_mesh():
        return table[ids_BT]
    has_copies = table.ndim == 3
    table = table if has_copies else gather(table)
    table_spec = jax.typeof(table).sharding.spec
    vocab_axis = table_spec[-2]
    tokens = PartitionSpec(*axes_of(ids_BT))
    if vocab_axis is None and not has_copies:
        return table.at[ids_BT].get(out_sharding=PartitionSpec(*tokens, None))

    def look_up_local(table, ids):
        table = table[0] if has_copies else table
        if vocab_axis is None:
            return table[ids]
        ids = ids - jax.lax.axis_index(vocab_axis) * table.shape[0]
        is_local = (ids >= 0) & (ids < table.shape[0])
        rows = jnp.where(is_local[..., None], table[jnp.where(is_local, ids, 0)], 0)
        return jax.lax.psum(rows, vocab_axis)

    run = jax.shard_map(
        look_up_local, in_specs=(table_spec, tokens), out_specs=tokens, check_vma=False
    )
    return run(table, ids_BT)


def lookup(table_S: jax.Array, positions_BS: jax.Array) -> jax.Array:
    """Returns the numbers of a table [S] at positions int [B, S], sharded as the positions are."""
    if not has_mesh():
        return table_S[positions_BS]
    return table_S.at[positions_BS].get(out_sharding=jax.typeof(positions_BS).sharding.spec)
