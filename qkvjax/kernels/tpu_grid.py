"""How the TPU kernels walk: which tiles meet at a point of the grid, and where they lie.

The last dimension of each grid walks over the tiles that one output tile needs. A step that no
pair of its tiles wants names the tile before it again, which copies nothing.

Letters: B sequences, T places, N query heads, K key-value heads, H head width.
"""

from __future__ import annotations

import dataclasses
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

    def keys_of(self, i, blocks: Blocks):
        """(begin, end) of the tiles of keys that tile i of queries sees."""
        first, size = i * blocks.queries, blocks.queries
        return tile.key_tiles(first, first + size - 1, blocks.keys, **self.limits)

    def queries_of(self, j, blocks: Blocks):
        """(begin, end) of the tiles of queries that see tile j of keys."""
        first, size = j * blocks.keys, blocks.keys
        return tile.query_tiles(first, first + size - 1, blocks.queries, **self.limits)

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


def queries_walk(options: Options, blocks: Blocks, group: int) -> tuple[Walk, Walk]:
    """(queries, keys) of a grid (sequence, query head, tile of queries, step over keys)."""

    def keys(b, n, i, step):
        begin, end = options.keys_of(i, blocks)
        return b, jax.lax.div(n, group), jnp.minimum(begin + step, end - 1)

    return Walk(blocks.queries, lambda b, n, i, step: (b, n, i)), Walk(blocks.keys, keys)


def keys_walk(options: Options, blocks: Blocks, group: int) -> tuple[Walk, Walk]:
    """(queries, keys) of a grid (sequence, key-value head, tile of keys, head of group, step)."""

    def queries(b, n, j, head, step):
        begin, end = options.queries_of(j, blocks)
        return b, n * group + head, jnp.minimum(begin + step, end - 1)

    return Walk(blocks.queries, queries), Walk(blocks.keys, lambda b, n, j, head, step: (b, n, j))


def segment_specs(segments, down: Walk, along: Walk) -> list:
    """Block specs of segments as they lie down and along a tile."""
    return [None, None] if segments is None else [down.down(), along.along()]


def pallas(kernel, name: str, interpret, **shapes):
    """`pallas_call` whose first three dimensions are independent and whose others go in order."""
    dimensions = len(shapes["grid"] if "grid" in shapes else shapes["grid_spec"].grid)
    order = ("parallel",) * 3 + ("arbitrary",) * (dimensions - 3)
    params = lowering.CompilerParams(dimension_semantics=order)
    return pl.pallas_call(kernel, name=name, interpret=interpret, compiler_params=params, **shapes)
