"""What each device computes on its own part of an array, where the axes' types say too little."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import PartitionSpec

from qkvjax.parallel.rules import RULES, gather, has_mesh, spec, token_axes


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
      matrix: [D, V], or `rules.copies` of it, of which f sees the device's one.
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
    axes = token_axes()

    def add(tree):
        return jax.lax.psum(tree, axes) if axes else tree

    def local(matrix, *by_token):
        matrix = matrix[0] if has_copies else matrix
        results = f(Columns(where[-1]), matrix, *by_token)
        if not sums:
            return results
        of_tokens, totals, like = results
        return of_tokens, add(totals), like[None] if has_copies else add(like)

    tokens = spec("batch", "length")
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
        in_specs=(where(x), jax.tree.map(where, given)), out_specs=where(x), check_vma=False,
    )  # fmt: skip
    return run(x, given)


def on_experts(f, x: jax.Array, gates: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
    """f(first, x, gates, weights), summed over experts: [B, T, D] -> [B, T, D].

    Tokens whose experts lie on several devices visit all of these: each device computes what its
    experts, of which `first` is the number of the first, add to the tokens of all.

    Args:
      x: [B, T, D].
      gates: [B, T, E], the weight of each expert.
      weights: matrices [E, rows, columns], shared out as their types say.
    """
    if not has_mesh():
        return f(0, x, gates, weights)
    weights = {name: gather(w) for name, w in weights.items()}
    sizes = jax.sharding.get_abstract_mesh().shape
    (expert,), (tensor,) = RULES["experts"], RULES["mlp"]

    def local(x, gates, weights):
        first = 0
        if sizes[expert] > 1:
            first = jax.lax.axis_index(expert) * next(iter(weights.values())).shape[0]
            x, gates = (jax.lax.all_gather(a, expert, tiled=True) for a in (x, gates))
        y = f(first, x, gates, weights)
        if any(tensor in tuple(place) for place in where.values()):
            y = jax.lax.psum(y, tensor)
        if sizes[expert] > 1:
            y = jax.lax.psum_scatter(y, expert, tiled=True)
        return y

    tokens = spec("batch", "length")
    where = {name: jax.typeof(w).sharding.spec for name, w in weights.items()}
    run = jax.shard_map(
        local, in_specs=(tokens, tokens, where), out_specs=tokens, check_vma=False
    )  # fmt: skip
    return run(x, gates, weights)


def automatic(f, like, *args):
    """f(*args), whose results lie as the tree `like` does, with everything inside left to XLA: for
    what Explicit axes cannot type."""
    if not has_mesh():
        return f(*args)
    where = jax.tree.map(lambda array: jax.typeof(array).sharding, like)
    return jax.sharding.auto_axes(f, out_sharding=where)(*args)
