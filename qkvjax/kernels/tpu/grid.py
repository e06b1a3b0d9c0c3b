"""How the TPU kernels walk: which tiles meet at a point of the grid, and where they are.

A core goes through the points of a grid in order, and Pallas copies the tiles of the next point to
VMEM while the current one is computed. The last dimension of each grid walks over the tiles that
one output tile needs; their range is known beforehand (`tile.ranges`):

    queries_walk, point (b, n, i, step)        keys_walk, point (b, n, j, head, step)
      stays     Q_i, the sums for it             stays     K_j (and V_j), the sums for it
      passes    K_j, V_j, j = begin + step       passes    Q_i, ... of query head n G + head,
                                                           i = begin + step

    step            0        1        2        3        4
    tile        begin  begin+1  begin+2  begin+2  begin+2       with end = begin + 3
    copied          x        x        x        -        -       the same tile is not copied again
    computed        x        x        x        -        -       `pl.when(j < end)`

The grid has as many steps as any tile needs, so the other tiles have steps behind their end. These
name the last tile once more, which costs no copy.

Letters: B sequences, T positions, N query heads, K key-value heads, G = N / K, H head width.
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

LANES = 128  # the last side of a tile is a multiple of it, or that of the whole array


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes, multiples of 128."""

    queries: int
    keys: int


class Options(tile.Options):
    """`tile.Options` with `forward` and `backward` as Blocks, and where their tiles meet."""

    def ends(self, blocks: Blocks, qs, segments, by_keys: bool = False):
        """Returns (begins, ends), each int32 [B, tiles], of `tile.ranges`, for qs [B, N, T, H]."""
        batch, _, num_positions, _ = qs[0].shape
        ranges = tile.ranges(
            blocks.queries,
            blocks.keys,
            num_positions,
            **self.mask_rules,
            segments=segments,
            by_keys=by_keys,
        )
        ranges = jnp.broadcast_to(ranges, (batch, *ranges.shape[1:]))
        return ranges[..., 0], ranges[..., 3]

    def steps(self, staying: int, passing: int) -> int:
        """Returns the most tiles of `passing` positions that a tile of `staying` positions needs.

        Segments are not known here, and only reduce the number.
        """
        tiles = -(-self.length // passing)
        if self.window is None:
            return tiles
        reach = staying + (self.window - 1) * (1 if self.causal else 2)
        # So many positions in a row may begin at the last position of a tile.
        return min(tiles, -(-(reach - 1) // passing) + 1)


# ---- where the tiles of a grid point are ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Walk:
    """Where the points of a grid have their tile of queries, or of keys.

    Attributes:
      size: of the tile.
      at: grid point -> (sequence, head, tile).
    """

    size: int
    at: Callable

    def tile(self, x) -> pl.BlockSpec:
        """Returns the block spec of an array [B, N, T, H]."""
        return pl.BlockSpec((None, None, self.size, x.shape[3]), lambda *p: (*self.at(*p), 0))

    def numbers(self, x) -> pl.BlockSpec:
        """Returns the block spec of numbers [B, N, 1, T]."""

        def where(*point):
            sequence, head, i = self.at(*point)
            return sequence, head, 0, i

        return pl.BlockSpec((None, None, 1, self.size), where)

    def down(self) -> pl.BlockSpec:
        """Returns the block spec of a sequence's numbers [B, T, 1], one for each row."""

        def where(*point):
            sequence, _, i = self.at(*point)
            return sequence, i, 0

        return pl.BlockSpec((None, self.size, 1), where)

    def across(self) -> pl.BlockSpec:
        """Returns the block spec of a sequence's numbers [B, 1, T], one for each column."""

        def where(*point):
            sequence, _, i = self.at(*point)
            return sequence, 0, i

        return pl.BlockSpec((None, 1, self.size), where)


def queries_walk(blocks: Blocks, group: int) -> tuple[Walk, Walk]:
    """Returns (queries, keys) of a grid (sequence, query head, tile of queries, step over keys)."""

    def queries(b, n, i, *_):
        return b, n, i

    def keys(b, n, i, step, begins, ends):
        return b, jax.lax.div(n, group), passing_tile(b, i, step, begins, ends)

    return Walk(blocks.queries, queries), Walk(blocks.keys, keys)


def keys_walk(blocks: Blocks, group: int) -> tuple[Walk, Walk]:
    """Returns (queries, keys) of a grid (sequence, key-value head, tile of keys, head of its group,
    step over queries)."""

    def queries(b, n, j, head, step, begins, ends):
        return b, n * group + head, passing_tile(b, j, step, begins, ends)

    def keys(b, n, j, *_):
        return b, n, j

    return Walk(blocks.queries, queries), Walk(blocks.keys, keys)


def passing_tile(b, staying, step, begins, ends):
    """Returns the tile that passes by tile `staying` at a step; behind the end, the last one."""
    return jnp.minimum(begins[b, staying] + step, jnp.maximum(ends[b, staying] - 1, 0))


def segment_specs(segments, down: Walk, across: Walk) -> list:
    """Returns block specs of segments as they lie down a tile and across it."""
    return [None, None] if segments is None else [down.down(), across.across()]


def both_ways(segments):
    """Returns segments [B, T] as they lie down a tile and across it."""
    return (None, None) if segments is None else (segments[:, :, None], segments[:, None])


def pallas(kernel, name: str, interpret, scalars: tuple, *, out_shape, **grid):
    """Returns a `pallas_call` for the TPU that has its scalars already.

    Args:
      scalars: int32 arrays. They are read before the grid starts, so that block specs may depend on
        them, and come first among the kernel's arguments.
      grid: of `PrefetchScalarGridSpec`. Its first three dimensions are independent; the others go
        in order, because their points add to the same sums.
    """
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


# ---- inside a kernel --------------------------------------------------------------------------


def transposed(x: jax.Array) -> jax.Array:
    """Returns a row [1, r] as a column [r, 1], or a column as a row; r is a multiple of 128.

    It is repeated 128 times first, and the matrix is transposed.
    """
    r = max(x.shape)
    if x.shape[0] == 1:
        return jnp.broadcast_to(x, (LANES, r)).T[:, :1]
    return jnp.broadcast_to(x, (r, LANES)).T[:1]


def tile_mask(options, i, j, blocks, row_segments, column_segments, keys_down: bool = False):
    """Returns the mask of tile i of queries and tile j of keys: [r, c], or [c, r] with `keys_down`.

    Args:
      row_segments, column_segments: references to the segments, or None.
    """
    shapes = [(blocks.queries, 1), (1, blocks.keys)]
    if keys_down:
        shapes = [shape[::-1] for shape in shapes]
    starts = i * blocks.queries, j * blocks.keys
    positions = [
        start + jax.lax.broadcasted_iota(jnp.int32, shape, shape[0] == 1)
        for start, shape in zip(starts, shapes)
    ]
    segments = {}
    if row_segments is not None:
        segments = {"row_segments": row_segments[...], "column_segments": column_segments[...]}
    return tile.visible(*positions, **options.mask_rules, **segments)
