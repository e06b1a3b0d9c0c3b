"""Computations in which each device works on its own part of the arrays.

The types of Explicit axes say how every intermediate result is sharded. Where they cannot, or where
a kernel knows no mesh, these functions run plain code on each device through `jax.shard_map`.
Without a mesh each of them calls the function as it is.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import PartitionSpec

from qkvjax.parallel.rules import axes_of, gather, has_mesh, names_of


def _spec_of(array: jax.Array) -> PartitionSpec:
    """Returns how an array is sharded."""
    return jax.typeof(array).sharding.spec


# ---- tokens and the columns of a matrix -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a matrix that a device has, and the reductions over those of all devices.

    Attributes:
      axis: the mesh axis over which columns are sharded; None where the device has all.
    """

    axis: str | None = None

    def first(self, count: int):
        """Returns the index of the first of this device's `count` columns."""
        return 0 if self.axis is None else count * jax.lax.axis_index(self.axis)

    def sum(self, x):
        """Adds up a tree of sums, each over one device's columns, to sums over all columns."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def min(self, x: jax.Array) -> jax.Array:
        """Returns the minimum over all columns, from those over each device's columns."""
        return x if self.axis is None else jax.lax.pmin(x, self.axis)

    def max(self, x: jax.Array) -> jax.Array:
        """Returns the maximum over all columns, from those over each device's columns."""
        return x if self.axis is None else jax.lax.pmax(x, self.axis)


def map_tokens(f, matrix: jax.Array, *by_token: jax.Array, sums: bool = True):
    """Calls f(columns, matrix, *by_token) on each device, with its tokens and its columns.

    Args:
      f: returns a tree of arrays [B, T, ...]; with `sums` it returns (such a tree, a tree of totals
        over its tokens, an array like the matrix, also summed over its tokens).
      matrix: [D, V], or `tables.copies` of it; f sees the device's one copy, [D, V].
      by_token: arrays [B, T, ...].
      sums: whether f returns totals.

    Returns:
      What f returns. Arrays of tokens stay sharded as they are; totals are summed over the devices
      that have different tokens. The array like the matrix is summed too, except that with copies
      it has one sum for each copy.
    """
    if not has_mesh():
        return f(Columns(), matrix, *by_token)

    has_copies = matrix.ndim == 3
    matrix = matrix if has_copies else gather(matrix)
    matrix_spec = _spec_of(matrix)
    tokens = PartitionSpec(*axes_of(by_token[0])[:2])
    token_axes = tuple(axis for entry in tokens if entry for axis in names_of(entry))

    def sum_over_tokens(tree):
        return jax.lax.psum(tree, token_axes) if token_axes else tree

    def local(matrix, *by_token):
        matrix = matrix[0] if has_copies else matrix
        results = f(Columns(matrix_spec[-1]), matrix, *by_token)
        if not sums:
            return results
        of_tokens, totals, like_matrix = results
        # The gradient of the copying adds the copies up later, so here each device keeps its own.
        like_matrix = like_matrix[None] if has_copies else sum_over_tokens(like_matrix)
        return of_tokens, sum_over_tokens(totals), like_matrix

    run = jax.shard_map(
        local,
        in_specs=(matrix_spec, *(tokens for _ in by_token)),
        out_specs=(tokens, PartitionSpec(), matrix_spec) if sums else tokens,
        check_vma=False,
    )
    return run(matrix, *by_token)


# ---- parts of arrays --------------------------------------------------------------------------


def on_each_device(f, x: jax.Array, arrays: dict[str, object]) -> jax.Array:
    """Calls f(x, **arrays) on each device's part of a batch, for kernels, which know no mesh.

    Args:
      f: returns an array of the shape of x.
      arrays: trees of arrays, or None.

    Returns:
      The results, sharded as x is.
    """
    if not has_mesh():
        return f(x, **arrays)
    given = {name: array for name, array in arrays.items() if array is not None}
    run = jax.shard_map(
        lambda x, given: f(x, **given),
        in_specs=(_spec_of(x), jax.tree.map(_spec_of, given)),
        out_specs=_spec_of(x),
        check_vma=False,
    )
    return run(x, given)


def map_shards(f, like, *args):
    """Calls f(*args) on each device's part of every array.

    For computations that need nothing from other devices.

    Args:
      f: from trees of arrays to a tree of arrays; it sees each device's part as a plain array.
      like: a tree with the structure of f's result, whose arrays are sharded as the result is.
      args: trees of arrays, or None.
    """
    if not has_mesh():
        return f(*args)
    # shard_map wants one spec for each array. Leaves alone have no None, no modules among them.
    leaves, tree = jax.tree.flatten(args)

    def local(leaves):
        return f(*jax.tree.unflatten(tree, leaves))

    run = jax.shard_map(
        local,
        in_specs=([_spec_of(leaf) for leaf in leaves],),
        out_specs=jax.tree.map(_spec_of, like),
        check_vma=False,
    )
    return run(leaves)


def merged(x: jax.Array) -> jax.Array:
    """Reshapes [B, K, ...] to [B K, ...] on a mesh, each device's part by itself.

    The order of the rows of the whole array therefore depends on the mesh; `unmerged` restores it.
    """
    rows, heads, *rest = axes_of(x)
    both = (*names_of(rows), *names_of(heads))
    result = PartitionSpec(tuple(axis for axis in both if axis), *rest)
    run = jax.shard_map(
        lambda part: part.reshape(-1, *part.shape[2:]),
        in_specs=_spec_of(x),
        out_specs=result,
        check_vma=False,
    )
    return run(x)


def unmerged(x: jax.Array, like) -> jax.Array:
    """Restores what `merged` reshaped to the shape and sharding of `like`."""
    shard_shape = like.sharding.shard_shape(like.shape)
    run = jax.shard_map(
        lambda part: part.reshape(shard_shape),
        in_specs=_spec_of(x),
        out_specs=like.sharding.spec,
        check_vma=False,
    )
    return run(x)


# ---- left to the compiler ---------------------------------------------------------------------


def automatic(f, like, *args):
    """Returns f(*args), whose intermediate results XLA shards as it likes.

    For computations that Explicit axes cannot type.

    Args:
      f: from trees of arrays to a tree of arrays.
      like: a tree with the structure of f's result, whose arrays are sharded as the result is.
    """
    if not has_mesh():
        return f(*args)
    shardings = jax.tree.map(lambda array: jax.typeof(array).sharding, like)
    return jax.sharding.auto_axes(f, out_sharding=shardings)(*args)
