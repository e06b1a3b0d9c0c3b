"""How the Triton kernels are laid out: which program holds which tile, and where arrays have it.

A grid point is (tile i, sequence b, head n). A `BlockSpec` says which part of an array its program
gets:

    by_tile         [B, T, N, H]   rows of tile i of head n               what the program holds
    by_head         [B, T, K, H]   all positions of head n's key head     what it walks over
    by_group        [B, T, N, H]   all positions of key head n's queries
    row_numbers     [B, N, T]      numbers of tile i of head n
    group_numbers   [B, N, T]      numbers of key head n's queries
    whole_sequence  [B, T]         segments of sequence b

"Gets" means a pointer. A load happens where the kernel indexes the reference.

Letters: B sequences, T positions, N query heads, K key-value heads, G = N / K, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as lowering

from qkvjax.kernels import tile
from qkvjax.kernels.triton.blocks import Blocks


class Options(tile.Options):
    """`tile.Options` with `forward` as Blocks and `backward` as (those of keys, of queries)."""

    def padded(self, tree):
        """Returns arrays [B, T, ...] of a tree with zeros behind them, so that no tile is cut."""
        sizes = (self.forward, *self.backward)
        return tile.padded(tree, self.length, max(max(b.queries, b.keys) for b in sizes))

    def ranges(self, blocks: Blocks, x, segments, by_keys: bool = False) -> jax.Array:
        """Returns `tile.ranges` for sequences like x [B, T, ...]."""
        return tile.ranges(
            blocks.queries,
            blocks.keys,
            x.shape[1],
            segments=segments,
            by_keys=by_keys,
            **self.mask_rules,
        )


def pallas(kernel, name: str, interpret: bool, blocks: Blocks, **shapes):
    """Returns a `pallas_call` that goes through Triton, whatever the version's default is."""
    params = lowering.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)
    return pl.pallas_call(
        kernel, name=name, interpret=bool(interpret), compiler_params=params, **shapes
    )


def like(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


# ---- block specs ------------------------------------------------------------------------------
#
# Functions of an array, or functions that make such a function. Given the number of `tiles`, they
# go backwards: the first program computes the last tile. Of a causal sequence that tile has the
# most to do, and a long program that starts last would keep the others waiting at the end.


def last_first():
    """Returns the number of the tile that this program computes, in a grid that goes backwards."""
    return pl.num_programs(0) - 1 - pl.program_id(0)


def _tile_of(tiles: int | None):
    """Returns the map from the first axis of the grid to a tile."""
    return (lambda i: i) if tiles is None else (lambda i: tiles - 1 - i)


def by_tile(size: int, tiles: int | None = None):
    """Tile i of one head of [B, T, N, H]."""
    tile_of = _tile_of(tiles)
    return lambda x: pl.BlockSpec(
        (None, size, None, x.shape[3]), lambda i, b, n: (b, tile_of(i), n, 0)
    )


def range_of_tile(tiles: int | None = None):
    """Tile i's row of `tile.ranges` [B or 1, tiles, 4]."""
    tile_of = _tile_of(tiles)
    return lambda x: pl.BlockSpec(
        (None, None, 4), lambda i, b, n: (b if x.shape[0] > 1 else 0, tile_of(i), 0)
    )


def by_head(length: int, group: int):
    """All positions of the key-value head that query head n belongs to."""
    return lambda x: pl.BlockSpec(
        (None, length, None, x.shape[3]), lambda i, b, n: (b, 0, n // group, 0)
    )


def by_group(length: int, group: int):
    """All positions of the query heads of key-value head n."""
    return lambda x: pl.BlockSpec((None, length, group, x.shape[3]), lambda i, b, n: (b, 0, n, 0))


def row_numbers(size: int, tiles: int):
    """Tile i of one head of [B, N, T]."""
    return lambda x: pl.BlockSpec((None, None, size), lambda i, b, n: (b, n, tiles - 1 - i))


def group_numbers(group: int, length: int):
    """All positions of the query heads of key-value head n, of [B, N, T]."""
    return lambda x: pl.BlockSpec((None, group, length), lambda i, b, n: (b, n, 0))


def whole_sequence(segments):
    """All positions of sequence b, of [B, T]."""
    return pl.BlockSpec((None, segments.shape[1]), lambda i, b, n: (b, 0))


# ---- masks, inside a kernel -------------------------------------------------------------------


def positions_of(first, size: int, segments):
    """Returns (the positions [size] of a tile, their segments or None)."""
    positions = first + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
    return positions, None if segments is None else segments[pl.ds(first, size)]


def tile_mask(options, rows, columns, keys_down: bool = False):
    """Returns the mask [r, c] of a tile, or [c, r] with `keys_down`.

    Args:
      rows, columns: of `positions_of`, of the queries and of the keys.
    """

    def down(x):
        return x[:, None]

    def across(x):
        return x[None, :]

    of_rows, of_columns = (across, down) if keys_down else (down, across)
    positions = of_rows(rows[0]), of_columns(columns[0])
    if rows[1] is None:
        return tile.visible(*positions, **options.mask_rules)
    return tile.visible(
        *positions,
        **options.mask_rules,
        row_segments=of_rows(rows[1]),
        column_segments=of_columns(columns[1]),
    )
