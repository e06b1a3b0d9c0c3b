"""How the TPU kernels walk: which tiles meet at a point of the grid, and where they lie.

The last dimension of each grid walks over the tiles that one output tile needs, as `tile.spans`
says beforehand. A step behind them names the last one again, which copies nothing.

Letters: B sequences, T places, N query heads, K key-value heads, H head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as lowering

from qkvjax.kernels import tile

LANES = 128  # a tile's last side is a multiple of it, or the whole array's


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes, multiples of 128."""

    queries: int
    keys: int


class Options(tile.Options):
    """With tile sizes as `Blocks`, and where they meet."""

    def ends(self, blocks: Blocks, qs, segments, turned: bool = False):
        """(begins, ends), each int32 [B, tiles], of `tile.spans`, for queries [B, N, T, H]."""
        batch, _, places, _ = qs[0].shape
        spans = tile.spans(
            blocks.queries, blocks.keys, places, **self.limits, segments=segments, turned=turned
        )
        spans = jnp.broadcast_to(spans, (batch, *spans.shape[1:]))
        return spans[..., 0], spans[..., 3]

    def steps(self, held: int, passing: int) -> int:
        """The most tiles of `passing` places that a tile of `held` places needs."""
        tiles = -(-self.length // passing)
        if self.window is None:
            return tiles
        span = held + (self.window - 1) * (1 if self.causal else 2)
        return min(tiles, -(-(span - 1) // passing) + 1)


@dataclasses.dataclass(frozen=True)
class Walk:
    """Where the points of a grid find their tile of queries, or of keys.

    Attributes:
      size: of the tile.
      at: grid point -> (sequence, head, tile).
    """

    size: int
    at: Callable

    def tile(self, x) -> pl.BlockSpec:
        """Of [B, N, T, H]."""
        return pl.BlockSpec((None, None, self.size, x.shape[3]), lambda *p: (*self.at(*p), 0))

    def numbers(self, x) -> pl.BlockSpec:
        """Of [B, N, 1, T]."""

        def where(*point):
            sequence, head, i = self.at(*point)
            return sequence, head, 0, i

        return pl.BlockSpec((None, None, 1, self.size), where)

    def down(self) -> pl.BlockSpec:
        """Of a sequence's numbers [B, T, 1]."""

        def where(*point):
            sequence, _, i = self.at(*point)
            return sequence, i, 0

        return pl.BlockSpec((None, self.size, 1), where)

    def along(self) -> pl.BlockSpec:
        """Of a sequence's numbers [B, 1, T]."""

        def where(*point):
            sequence, _, i = self.at(*point)
            return sequence, 0, i

        return pl.BlockSpec((None, 1, self.size), where)


def queries_walk(blocks: Blocks, group: int) -> tuple[Walk, Walk]:
    """(queries, keys) of a grid (sequence, query head, tile of queries, step over keys)."""

    def keys(b, n, i, step, begins, ends):
        return b, jax.lax.div(n, group), passing(b, i, step, begins, ends)

    return Walk(blocks.queries, lambda b, n, i, *_: (b, n, i)), Walk(blocks.keys, keys)


def keys_walk(blocks: Blocks, group: int) -> tuple[Walk, Walk]:
    """(queries, keys) of a grid (sequence, key-value head, tile of keys, head of group, step)."""

    def queries(b, n, j, head, step, begins, ends):
        return b, n * group + head, passing(b, j, step, begins, ends)

    return Walk(blocks.queries, queries), Walk(blocks.keys, lambda b, n, j, *_: (b, n, j))


def passing(b, held, step, begins, ends):
    """The tile that passes by tile `held` at a step, or the last one of those that do."""
    return jnp.minimum(begins[b, held] + step, jnp.maximum(ends[b, held] - 1, 0))


def segment_specs(segments, down: Walk, along: Walk) -> list:
    """Block specs of segments as they lie down and along a tile."""
    return [None, None] if segments is None else [down.down(), along.along()]


def pallas(kernel, name: str, interpret, scalars: tuple, *, out_shape, **grid):
    """`pallas_call` whose first three dimensions are independent and whose others go in order; the
    scalars, arrays of int32, come first and are there for index maps as well."""
    order = ("parallel",) * 3 + ("arbitrary",) * (len(grid["grid"]) - 3)
    params = lowering.CompilerParams(dimension_semantics=order)
    spec = lowering.PrefetchScalarGridSpec(num_scalar_prefetch=len(scalars), **grid)
    call = pl.pallas_call(
        kernel,
        name=name,
        interpret=interpret,
        compiler_params=params,
        grid_spec=spec,
        out_shape=out_shape,
    )
    return functools.partial(call, *scalars)
