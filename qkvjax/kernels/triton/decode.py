"""Decoding in Pallas through Triton: a few new tokens onto a cache that is read once.

The cache of one key-value head is cut into splits, which run side by side: few sequences would
otherwise leave most of the GPU idle. Each split leaves the state of its online softmax, and the
states are merged afterwards (flash decoding):

    slots           0 ......... | ......... | ......... | ....... S - 1
    program (b, n, i)  split 0     split 1     split 2     split 3
      holds q rows [R, H]  |          |           |           |
      walks over tiles     v          v           v           v
      leaves           row_max, row_sum, acc of each
                           \\__________\\___ tile.merge ________/  ->  out [R, H]

    one tile         k_j  --> S = q k_j^T --> P = online_softmax --> acc += P v_j
      two tensors    k_j and v_j are loaded
      one tensor     k_j is loaded and is v_j as well
      states         x_j is loaded and is v_j; k_j = rotate(norm(x_j)) is made in registers

With K = V one tile is loaded and used twice. Where keys are normed and rotated but values are not
(`rotary_values=raw`), the tile is the shared state. A rotation needs the two halves of a head
beside each other, so the head is cut into `pieces`, which are separate tiles.

A cache in pages is one pool of all sequences: a tile lies within a page, and the block table is
read before the tile.

Letters: B sequences, S slots, N query heads, K key-value heads, H head width, T new tokens, R rows:
the new tokens of all query heads of a key-value head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from qkvjax.errors import UserError
from qkvjax.kernels import limits, tile
from qkvjax.kernels import rows as rows_of
from qkvjax.kernels.stored import NORM_EPSILON, Int8, KeyOfState, Stored, swap_slots_and_heads
from qkvjax.kernels.triton.blocks import DTYPES, NARROWEST, WIDTHS, Blocks, pad_second_part
from qkvjax.kernels.triton.grid import pallas
from qkvjax.kernels.triton.splits import block_of, options_of, pieces_of

# ---- what it supports -------------------------------------------------------------------------


def refusal(q, v=None, *, page: int | None = None, **_) -> str | None:
    """Returns why the kernel does not support these arguments; None where it does.

    Args:
      page: slots of a page; None for a contiguous cache.
    """
    reason = limits.refusal(q, v, WIDTHS, DTYPES)
    if reason or page is None or (page >= NARROWEST and page & (page - 1) == 0):
        return reason
    return f"a page must have a power of two of slots from {NARROWEST} on, not {page}"


def cannot_make(key: KeyOfState, head_width: int) -> str | None:
    """Returns why the kernel cannot make such keys; None where it can."""
    if not key.width:
        return "it makes no keys that are normed and not rotated"
    pieces = pieces_of(key.width, head_width)
    if all(piece >= NARROWEST and piece & (piece - 1) == 0 for piece in pieces):
        return None
    return (
        f"it rotates {key.width} of {head_width} numbers only where half of the former is one of"
        f" the powers of two from {NARROWEST} on and what is left a multiple of {NARROWEST}"
    )


# ---- arguments --------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What the kernel reads: arrays outside, references inside. None is what is not used.

    Attributes:
      ranges: int32 [B, splits, 4], `rows.ranges` counted from each split's first tile.
      q: [B, K, R, H].
      k, v: `Stored` [B, K, S, H] or [P, K, E, H]; v is None where the keys, or the states, are
        the values.
      table: int [B, n].
      second: second parts of the scores, [B, K, R, P] and [B, K, S, P].
      rotation: (cos, sin), each float32 [S, rotated width / 2], where keys are made.
      gain: float32 [H], where keys that are made are normed.
      positions: int32 [B, R].
    """

    ranges: jax.Array
    q: jax.Array
    k: Stored
    v: Stored | None
    table: jax.Array | None
    second: tuple[jax.Array, jax.Array] | None
    rotation: tuple[jax.Array, jax.Array] | None
    gain: jax.Array | None
    positions: jax.Array


def decode(
    q: Float[Array, "B T N H"],
    k: Stored,
    v: Stored | None = None,
    *,
    positions: Int[Array, "B T"],
    window: int | None = None,
    scale: float | None = None,
    q_pe: Float[Array, "B T N P"] | None = None,
    k_pe: Float[Array, "B S K P"] | None = None,
    key: KeyOfState | None = None,
    table: Int[Array, "B n"] | None = None,
    splits: int | None = None,
    block: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N _"]:
    """Computes `kernels.dispatch.decode_attention`, whose arguments these are.

    Args:
      splits: parts of the cache that run side by side; None chooses.
      block: tile sizes; None chooses.
      interpret: run on any machine, slowly.

    Raises:
      UserError: for the reason that `refusal` or `cannot_make` returns.
    """
    reason = refusal(q, v, page=None if table is None else k.shape[1])
    reason = reason or (key and cannot_make(key, q.shape[-1]))
    if reason:
        raise UserError(
            f"the triton kernel does not support these arguments: {reason}; use impl='auto'"
        )
    batch, length, heads, width = q.shape
    num_kv_heads = k.shape[2]
    group = heads // num_kv_heads
    programs = batch * num_kv_heads
    block = block or block_of(width, q.dtype.itemsize, v is None, programs, key is not None)
    k, v, k_pe = _at_least_a_tile((k, v, k_pe), k.shape[1])
    # [B, K, S, H], as a cache is stored: these transpositions and those of the caller cancel.
    k, v, k_pe = swap_slots_and_heads((k, v, k_pe))
    options = options_of(k, table, window, scale, width, key, block, splits, programs)

    # Rows are cut into tiles as well: a prompt that enters a cache has many.
    tile_rows = min(max(NARROWEST, pl.next_power_of_2(length * group)), block.queries)
    rows = -(-length * group // tile_rows) * tile_rows
    packed = functools.partial(rows_of.packed, kv_heads=num_kv_heads, rows=rows)
    row_positions = rows_of.row_positions(positions, group, rows)
    tiles = options.per_split // options.tile
    ranges = rows_of.ranges(positions, window, options.tile)[:, None]
    ranges = jnp.clip(ranges - tiles * jnp.arange(options.splits)[:, None], 0, tiles)
    rotation = gain = second = None
    if key is not None:
        rotation = key.at(options.slots, jnp.float32)
        gain = None if key.gain is None else key.gain.astype(jnp.float32)
    if q_pe is not None:
        q_pe, k_pe = (pad_second_part(x.astype(q.dtype)) for x in (q_pe, k_pe))
        second = packed(q_pe), k_pe
    inputs = Inputs(ranges, packed(q), k, v, table, second, rotation, gain, row_positions)

    value_pieces = options.pieces if v is None else (v.shape[3],)
    state_spec = functools.partial(_state_spec, tile_rows, options.splits)

    def state_shape(*last):
        shape = (batch, num_kv_heads, options.splits, rows, *last)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    row_max, row_sum, acc = pallas(
        functools.partial(_kernel, options, len(inputs)),
        "attention_decode",
        interpret,
        block,
        grid=(batch, num_kv_heads, rows // tile_rows * options.splits),
        in_specs=list(_input_specs(inputs, tile_rows, options.splits)),
        out_specs=[state_spec(), state_spec(), [state_spec(piece) for piece in value_pieces]],
        out_shape=[state_shape(), state_shape(), [state_shape(piece) for piece in value_pieces]],
    )(*inputs)
    out = tile.merge(row_max, row_sum, jnp.concatenate(acc, axis=-1), axis=2)
    return rows_of.unpacked(out, length, heads).astype(q.dtype)


def _at_least_a_tile(tree, slots: int):
    """Returns arrays [B, S, K, ...] with zeros up to the smallest tile; they are masked."""
    fill = NARROWEST - slots
    if fill <= 0:
        return tree
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2)), tree)


# ---- block specs ------------------------------------------------------------------------------
#
# Where program (sequence b, key-value head n, i) has its part of an array. The last axis of the
# grid counts the splits of each tile of rows: i = tile of rows * splits + split.


def _input_specs(inputs: Inputs, tile_rows: int, splits: int) -> Inputs:
    paged = inputs.table is not None
    cached = functools.partial(_slots_spec, paged=paged)
    second = None
    if inputs.second is not None:
        second = (
            _rows_spec(inputs.second[0], tile_rows, splits),
            _slots_spec(inputs.second[1]),
        )
    return Inputs(
        ranges=pl.BlockSpec((None, None, 4), lambda b, n, i: (b, i % splits, 0)),
        q=_rows_spec(inputs.q, tile_rows, splits),
        k=jax.tree.map(cached, inputs.k),
        v=jax.tree.map(cached, inputs.v),
        table=_table_spec(inputs.table) if paged else None,
        second=second,
        rotation=jax.tree.map(_whole_spec, inputs.rotation),
        gain=jax.tree.map(_whole_spec, inputs.gain),
        positions=pl.BlockSpec((None, tile_rows), lambda b, n, i: (b, i // splits)),
    )


def _rows_spec(x, tile_rows: int, splits: int):
    """A tile of one head's rows in [B, K, R, H]."""
    return pl.BlockSpec((None, None, tile_rows, x.shape[3]), lambda b, n, i: (b, n, i // splits, 0))


def _slots_spec(x, paged: bool = False):
    """All slots of one head in [B, K, S, ...], or all pages of one head in [P, K, E, ...]."""
    zeros = (0,) * (x.ndim - 2)
    pages = x.shape[0] if paged else None
    return pl.BlockSpec((pages, None, *x.shape[2:]), lambda b, n, i: (0 if paged else b, n, *zeros))


def _table_spec(table):
    """One sequence's row of the block table [B, n]."""
    return pl.BlockSpec((None, table.shape[1]), lambda b, n, i: (b, 0))


def _whole_spec(x):
    """All of an array."""
    return pl.BlockSpec(x.shape, lambda b, n, i: (0,) * x.ndim)


def _state_spec(tile_rows: int, splits: int, *last: int):
    """The state that a split leaves for a tile of rows in [B, K, splits, R, ...]."""
    zeros = (0,) * len(last)
    return pl.BlockSpec(
        (None, None, None, tile_rows, *last),
        lambda b, n, i: (b, n, i % splits, i // splits, *zeros),
    )


# ---- inside the kernel ------------------------------------------------------------------------


def _kernel(options, num_inputs: int, *refs):
    """Computes one split of one sequence's cache for a tile of rows of one key-value head."""
    tile_range, q, k, v, table, second, rotation, gain, positions = refs[:num_inputs]
    row_max, row_sum, acc = refs[num_inputs:]
    size = options.tile
    ends = [sum(options.pieces[:i]) for i in range(len(options.pieces) + 1)]
    pieces = [slice(start, end) for start, end in zip(ends, ends[1:])]
    queries = [q[:, piece] for piece in pieces]
    rows = positions[...][:, None]
    split_start = jax.lax.rem(pl.program_id(2), options.splits) * options.per_split
    gains = None if gain is None else [gain[piece] for piece in pieces]

    def step(j, state, masked):
        # The last tile may reach beyond the cache. It is moved back until it does not; the slots
        # that it shares with the tile before it are masked, so that each slot counts once.
        wanted = split_start + j * size
        first = jnp.minimum(wanted, options.slots - size)
        at = pl.ds(first, size)
        index = (at,)
        if table is not None:
            page = table[jax.lax.div(first, options.page)]
            index = (page, pl.ds(jax.lax.rem(first, options.page), size))
        # The only load of K: these pieces are the keys or what keys are made from, and, without v,
        # the values.
        loaded = [_load(k, index, piece, q.dtype) for piece in pieces]
        keys = loaded
        if rotation is not None:
            cos, sin = (part[at, :] for part in rotation)
            keys = _keys_of_states(options, loaded, gains, cos, sin)
        parts = [tile.dot(a, b, (1, 1)) for a, b in zip(queries, keys)]
        if second is not None:
            parts.append(tile.dot(second[0][...], second[1][at, :], (1, 1)))
        mask = None
        if masked:
            columns = (first + jax.lax.broadcasted_iota(jnp.int32, (size,), 0))[None, :]
            limits = {"causal": True, "window": options.window, "length": options.slots}
            mask = tile.visible(rows, columns, **limits) & (columns >= wanted)
        values = loaded if v is None else [_load(v, index, slice(None), q.dtype)]
        scores = sum(parts[1:], parts[0])
        return tile.accumulate(state, scores, mask, values, options.scale)

    start = tile.empty_state(rows.shape[0], [ref.shape[-1] for ref in acc])
    # Behind the full tiles is the last position; before them only a window's first slot.
    masked_ends = options.window is not None, True
    row_max[...], row_sum[...], sums = tile.walk(tile_range, step, start, masked_ends)
    for ref, total in zip(acc, sums):
        ref[...] = total


def _load(x, index, piece, dtype):
    """Loads a piece of a tile of a cached tensor; int8 is widened in registers."""
    if not isinstance(x, Int8):
        return x[*index, piece].astype(dtype)
    codes = x.codes[*index, piece]
    scales = x.scales[index]
    return (codes.astype(jnp.float32) * scales.astype(jnp.float32)[:, None]).astype(dtype)


def _keys_of_states(options, states, gains, cos, sin):
    """Returns the keys of a tile of stored states, piece by piece: RMSNorm, then rotation."""
    dtype = states[0].dtype
    wide = [piece.astype(jnp.float32) for piece in states]
    if gains is not None:
        squares = [jnp.sum(piece * piece, axis=1) for piece in wide]
        mean = sum(squares[1:], squares[0]) / sum(options.pieces)
        factor = jax.lax.rsqrt(mean + NORM_EPSILON)[:, None]
        # Rounded where the layer rounds: what leaves the norm has the dtype of the state.
        wide = [(piece * factor * g[None, :]).astype(dtype) for piece, g in zip(wide, gains)]
        wide = [piece.astype(jnp.float32) for piece in wide]
    a, b, *rest = wide  # the two rotated halves, and what is not rotated
    rotated = [a * cos - b * sin, b * cos + a * sin, *rest]
    return [piece.astype(dtype) for piece in rotated]
