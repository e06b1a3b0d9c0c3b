"""What each device computes on its own part of an array, where the axes' types say too little."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import PartitionSpec

from qkvjax.parallel.rules import axes_of, gather, has_mesh, names_of


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a matrix a device has, and how what they give is put together."""

    axis: str | None = None  # None: all

    def first(self, count: int):
        """The number of the first of its `count` columns."""
        return 0 if self.axis is None else count * jax.lax.axis_index(self.axis)

    def sum(self, x):
        """A tree of sums over a device's columns -> over all."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def min(self, x: jax.Array) -> jax.Array:
        """The smallest over a device's columns -> over all."""
        return x if self.axis is None else jax.lax.pmin(x, self.axis)

    def max(self, x: jax.Array) -> jax.Array:
        """The largest over a device's columns -> over all."""
        return x if self.axis is None else jax.lax.pmax(x, self.axis)


def map_tokens(f, matrix: jax.Array, *by_token: jax.Array, sums: bool = True):
    """f(columns, matrix, *by_token) on each device's own tokens and columns.

    Args:
      f: returns a tree of tokens and, with `sums`, totals and an array like the matrix.
      matrix: [D, V], or `tables.copies` of it, of which f sees the device's one.
      by_token: [B, T, ...].

    Returns:
      What f returns: of tokens [B, T, ...], as they lie; totals, summed over the devices that
      spread tokens; what is like the matrix, summed likewise, or one for each copy.
    """
    if not has_mesh():
        return f(Columns(), matrix, *by_token)

    has_copies = matrix.ndim == 3
    matrix = matrix if has_copies else gather(matrix)
    where = jax.typeof(matrix).sharding.spec
    tokens = PartitionSpec(*axes_of(by_token[0])[:2])
    axes = tuple(axis for some in tokens if some for axis in names_of(some))

    def add(tree):
        return jax.lax.psum(tree, axes) if axes else tree

    def local(matrix, *by_token):
        matrix = matrix[0] if has_copies else matrix
        results = f(Columns(where[-1]), matrix, *by_token)
        if not sums:
            return results
        of_tokens, totals, like = results
        return of_tokens, add(totals), like[None] if has_copies else add(like)

    in_specs = (where, *(tokens for _ in by_token))
    out_specs = (tokens, PartitionSpec(), where) if sums else tokens
    run = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return run(matrix, *by_token)


def on_each_device(f, x: jax.Array, arrays: dict[str, object]) -> jax.Array:
    """f(x, **arrays) on each device's part of a batch: for kernels, which know no mesh.

    `arrays` are trees of arrays, or None.

    The result lies as x does.
    """
    if not has_mesh():
        return f(x, **arrays)
    given = {name: array for name, array in arrays.items() if array is not None}
    where = lambda array: jax.typeof(array).sharding.spec  # noqa: E731
    run = jax.shard_map(
        lambda x, given: f(x, **given),
        in_specs=(where(x), jax.tree.map(where, given)),
        out_specs=where(x),
        check_vma=False,
    )
    return run(x, given)


def on_own_part(f, like, *args):
    """f(*args) on each device's part of every array: for computations that need nothing of other
    devices.

    Args:
      f: from trees of arrays to a tree.
      like: a tree with the structure of f's result and its arrays' shardings.
      args: trees of arrays, or None; f sees each device's part as a plain array.
    """
    if not has_mesh():
        return f(*args)
    leaves, tree = jax.tree.flatten(args)
    where = lambda array: jax.typeof(array).sharding.spec  # noqa: E731

    def local(leaves):
        return f(*jax.tree.unflatten(tree, leaves))

    return jax.shard_map(
        local,
        in_specs=([where(leaf) for leaf in leaves],),
        out_specs=jax.tree.map(where, like),
        check_vma=False,
    )(leaves)


def merged(x: jax.Array) -> jax.Array:
    """[B, K, ...] as [B K, ...] on a mesh, each device's part by itself."""
    rows, heads, *rest = axes_of(x)
    both = (*names_of(rows), *names_of(heads))
    flat = PartitionSpec(tuple(axis for axis in both if axis), *rest)
    return jax.shard_map(
        lambda x: x.reshape(-1, *x.shape[2:]),
        in_specs=jax.typeof(x).sharding.spec,
        out_specs=flat,
        check_vma=False,
    )(x)


def unmerged(x: jax.Array, like) -> jax.Array:
    """What `merged` made, in the shape and sharding of `like` again."""
    place = like.sharding
    whole = place.shard_shape(like.shape)
    return jax.shard_map(
        lambda x: x.reshape(whole),
        in_specs=jax.typeof(x).sharding.spec,
        out_specs=place.spec,
        check_vma=False,
    )(x)


def automatic(f, like, *args):
    """f(*args), whose results lie as the tree `like` does, with everything inside left to XLA: for
    what Explicit axes cannot type."""
    if not has_mesh():
        return f(*args)
    where = jax.tree.map(lambda array: jax.typeof(array).sharding, like)
    return jax.sharding.auto_axes(f, out_sharding=where)(*args)
