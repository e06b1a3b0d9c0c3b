"""Decoding in Pallas for TPUs: a few new tokens onto a cache that is read once.

One core walks over a sequence's tiles of slots in order, for a few key-value heads at a time. While
one tile is computed, Pallas copies the next one:

    grid (b, heads, tile of rows, step)           one step, for tile j of the cache
      stays   q rows [heads, R, H]                  mask of the rows' positions
      scratch row_max, row_sum, acc                 for each head:
      passes  k_j (and v_j), j = begin + step         k_j  = the tile, or made from it
      written out, after the last step                S    = q k_j^T
                                                      P    = online softmax, acc += P v_j

    tiles of slots    0    1    2    3    4         tiles behind the last position (and before a
                      -    x    x    x    -         window) are neither copied nor computed

With K = V one tile is copied to the core and used twice. Where keys are normed and rotated but
values are not (`rotary_values=raw`), the tile is the shared state x_j; its key is made in VMEM.
The rotation of slot j * tile + o is split: the tile is rotated by the offset o, whose table stays
in VMEM, and the queries by minus the tile's start (`_rotations`).

Letters: B sequences, S slots, N query heads, K key-value heads, H head width, T new tokens, R rows:
the new tokens of all query heads of a key-value head; P pages of E slots.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as lowering
from jaxtyping import Array, Float, Int

from qkvjax.errors import UserError
from qkvjax.kernels import rows as rows_of
from qkvjax.kernels import tile
from qkvjax.kernels.stored import NORM_EPSILON, Int8, KeyOfState, Stored, swap_slots_and_heads
from qkvjax.kernels.tpu.attention import refusal
from qkvjax.kernels.tpu.grid import LANES, pallas, transposed

SLOTS = 1024  # of a tile; neither tuned nor timed
FEWEST_ROWS = 16
MOST_ROWS = 256
# A step of the grid takes about as long as copying 256 KB: where heads are small, a step reads
# several of them.
MOST_HEADS = 8
MOST_BYTES = 2**20
MOST_ROWS_A_STEP = 512

__all__ = ["cannot_make", "decode", "heads_a_step", "refusal"]


# ---- how the work is cut ----------------------------------------------------------------------


def cannot_make(key: KeyOfState, head_width: int) -> str | None:
    """Returns why the kernel cannot make such keys; None where it can."""
    return None if key.width else "it makes no keys that are normed and not rotated"


def heads_a_step(k, rows: int, size: int) -> int:
    """Returns how many of the heads of [B, K, S, H] a step of the grid takes, a divisor of K.

    Args:
      rows, size: of a tile of rows, and of a tile of slots.
    """
    itemsize = jax.tree.leaves(k)[0].dtype.itemsize
    fit = min(MOST_HEADS, MOST_BYTES // (size * k.shape[3] * itemsize), MOST_ROWS_A_STEP // rows)
    return max(n for n in range(1, max(fit, 1) + 1) if k.shape[1] % n == 0)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when the kernel is compiled.

    Attributes:
      window, scale: as in `kernels.dispatch.decode_attention`.
      slots: S, of a sequence.
      tile: slots of a tile; those of a page in a cache in pages.
      rotary_width: numbers of a head that are rotated where keys are made.
    """

    window: int | None
    scale: float
    slots: int
    tile: int
    rotary_width: int

    @property
    def ragged(self) -> bool:
        """Whether the last tile reaches beyond the cache."""
        return self.slots % self.tile != 0


class Inputs(NamedTuple):
    """What the kernel reads: arrays outside, references inside. None is what is not used.

    Attributes:
      qs: the queries [B, K, R, H], and their second part [B, K, R, P] if there is one.
      k, v: `Stored` [B, K, S, H] or [P, K, E, H]; v is None where the keys, or the states, are
        the values.
      k_pe: second part of the keys, [B, K, S, P].
      rotations: of `_rotations`, where keys are made.
      gain: float32 [1, H], where keys that are made are normed.
      positions: int32 [B, R, 1].
    """

    qs: tuple[jax.Array, ...]
    k: Stored
    v: Stored | None
    k_pe: jax.Array | None
    rotations: tuple | None
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
    slots: int = SLOTS,
    interpret: bool | lowering.InterpretParams = False,
) -> Float[Array, "B T N _"]:
    """Computes `kernels.dispatch.decode_attention`, whose arguments these are.

    Args:
      slots: of a tile, a multiple of 128; with a table a tile is a page.
      interpret: run on any machine, slowly.

    Raises:
      UserError: for the reason that `refusal` returns, or `slots` is not such a multiple.
    """
    reason = refusal(q, v)
    if reason:
        raise UserError(
            f"the tpu kernel does not support these arguments: {reason}; use impl='auto'"
        )
    if slots <= 0 or slots % LANES:
        raise UserError(
            f"a tile of {slots} slots does not fit the tpu kernel: use multiples of {LANES}"
        )
    batch, length, heads, width = q.shape
    num_kv_heads = k.shape[2]
    group = heads // num_kv_heads
    options = Options(
        window=window,
        scale=width**-0.5 if scale is None else float(scale),
        slots=k.shape[1] * (1 if table is None else table.shape[1]),
        tile=k.shape[1] if table is not None else min(slots, k.shape[1]),
        rotary_width=0 if key is None else key.width,
    )
    num_tiles = -(-options.slots // options.tile)
    # [B, K, S, H], as a cache is stored: these transpositions and those of the caller cancel.
    k, v, k_pe = swap_slots_and_heads((k, v, k_pe))
    k = _scales_across(k)
    v = _scales_across(v)

    # Rows are cut into tiles as well: a prompt that enters a cache has many.
    tile_rows = min(-(-length * group // FEWEST_ROWS) * FEWEST_ROWS, MOST_ROWS)
    rows = -(-length * group // tile_rows) * tile_rows
    heads_taken = heads_a_step(k, tile_rows, options.tile)
    packed = functools.partial(rows_of.packed, kv_heads=num_kv_heads, rows=rows)
    row_positions = rows_of.row_positions(positions, group, rows)[:, :, None]
    ranges = jnp.minimum(rows_of.ranges(positions, window, options.tile), num_tiles)
    rotations = gain = None
    if key is not None:
        rotations = _rotations(key, options, width)
        gain = None if key.gain is None else key.gain.astype(jnp.float32)[None]
    qs = (packed(q),) if q_pe is None else (packed(q), packed(q_pe.astype(q.dtype)))
    inputs = Inputs(qs, k, v, k_pe, rotations, gain, row_positions)

    # Block specs need these before the grid starts: which tiles are walked over, which pages.
    scalars = ranges[:, 0], ranges[:, 3], *([] if table is None else [table.astype(jnp.int32)])
    specs = _Specs(heads_taken, tile_rows, options.tile, paged=table is not None)
    value_width = width if v is None else v.shape[3]
    out = jax.ShapeDtypeStruct((batch, num_kv_heads, rows, value_width), q.dtype)
    out = pallas(
        functools.partial(_kernel, options, len(scalars)),
        "attention_decode",
        interpret,
        scalars,
        grid=(batch, num_kv_heads // heads_taken, rows // tile_rows, num_tiles),
        in_specs=list(specs.of_inputs(inputs)),
        out_specs=specs.rows(out),
        out_shape=out,
        scratch_shapes=[
            lowering.VMEM((heads_taken, tile_rows, 1), jnp.float32),  # row_max
            lowering.VMEM((heads_taken, tile_rows, 1), jnp.float32),  # row_sum
            lowering.VMEM((heads_taken, tile_rows, value_width), jnp.float32),  # acc
        ],
    )(*inputs)
    return rows_of.unpacked(out, length, heads)


def _scales_across(x: Stored | None) -> Stored | None:
    """Returns an int8 tensor with scales [B, K, 1, S]: a column would take 128 times its bytes."""
    return x._replace(scales=x.scales[:, :, None]) if isinstance(x, Int8) else x


# ---- block specs ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Specs:
    """Where point (sequence b, heads n, tile of rows i, step) has its part of an array.

    Attributes:
      heads: that a step takes.
      tile_rows, tile_slots: of a tile.
      paged: whether the cache is in pages; the third scalar is then the block table.
    """

    heads: int
    tile_rows: int
    tile_slots: int
    paged: bool

    def of_inputs(self, inputs: Inputs) -> Inputs:
        second_keys = functools.partial(self.slots, paged=False)
        return Inputs(
            qs=jax.tree.map(self.rows, inputs.qs),
            k=self.stored(inputs.k),
            v=self.stored(inputs.v),
            k_pe=jax.tree.map(second_keys, inputs.k_pe),
            rotations=jax.tree.map(self.whole, inputs.rotations),
            gain=jax.tree.map(self.whole, inputs.gain),
            positions=pl.BlockSpec((None, self.tile_rows, 1), lambda b, n, i, *_: (b, i, 0)),
        )

    def stored(self, x: Stored | None):
        """A tile of a cached tensor."""
        if isinstance(x, Int8):
            return Int8(
                self.slots(x.codes, self.paged),
                self.slots(x.scales, self.paged, slot_axis=3),
            )
        return None if x is None else self.slots(x, self.paged)

    def slots(self, x, paged: bool, slot_axis: int = 2):
        """A tile of some heads of [B, K, S, H], or a page of some heads of [P, K, E, H]."""
        shape = [None, self.heads, *x.shape[2:]]
        shape[slot_axis] = self.tile_slots

        def where(b, n, i, step, begins, ends, *table):
            # Steps behind the end name the last tile once more, which is not copied again.
            at = jnp.minimum(begins[b] + step, ends[b] - 1)
            page, n, at = (table[0][b, at], n, 0) if paged else (b, n, at)
            return (page, n, at, 0) if slot_axis == 2 else (page, n, 0, at)

        return pl.BlockSpec(shape, where)

    def rows(self, x):
        """A tile of rows of some heads of [B, K, R, H]."""
        shape = (None, self.heads, self.tile_rows, x.shape[3])
        return pl.BlockSpec(shape, lambda b, n, i, *_: (b, n, i, 0))

    def whole(self, x):
        """All of an array; it is copied once."""
        return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


# ---- inside the kernel ------------------------------------------------------------------------


def _kernel(options, num_scalars, begins, ends, *refs):
    """Takes one step: a tile of one sequence's cache for a tile of rows of some heads."""
    # The block table, if there is one, serves the block specs alone.
    refs = refs[num_scalars - 2 :]
    inputs = Inputs(*refs[: len(Inputs._fields)])
    out, row_max, row_sum, acc = refs[len(Inputs._fields) :]
    qs, k, v, k_pe, rotations, gain, positions = inputs
    b = pl.program_id(0)
    step = pl.program_id(3)
    j = begins[b] + step

    @pl.when(step == 0)
    def _start():
        row_max[...] = jnp.full(row_max.shape, tile.MASKED, jnp.float32)
        row_sum[...] = jnp.zeros(row_sum.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    # Steps behind the end have the last tile once more, which must not count twice.
    @pl.when(j < ends[b])
    def _step():
        first = j * options.tile
        columns = first + jax.lax.broadcasted_iota(jnp.int32, (1, options.tile), 1)
        # One mask for all heads: their rows have the same positions.
        mask = tile.visible(
            positions[...], columns, causal=True, window=options.window, length=options.slots
        )
        for n in range(acc.shape[0]):
            q = qs[0][n]
            loaded = _load(options, first, k, n, qs[0].dtype)
            values = loaded if v is None else _load(options, first, v, n, q.dtype)
            keys = loaded
            if rotations is not None:
                (cos, sin), (start_cos, start_sin) = rotations
                start = pl.ds(j, 1)
                # Minus the sine: queries are rotated back by the tile's start.
                q = _rotate(
                    options, q.astype(jnp.float32), start_cos[start, :], -start_sin[start, :]
                )
                q = q.astype(qs[0].dtype)
                keys = _rotate(options, _normed(options, loaded, gain), cos[...], sin[...])
                keys = keys.astype(loaded.dtype)
            scores = tile.dot(q, keys, (1, 1))
            if k_pe is not None:
                second = _load(options, first, k_pe, n, q.dtype)
                scores += tile.dot(qs[1][n], second, (1, 1))
            state = row_max[n][:, 0], row_sum[n][:, 0], [acc[n]]
            new_max, new_sum, [new_acc] = tile.accumulate(
                state, scores, mask, [values], options.scale
            )
            row_max[n] = new_max[:, None]
            row_sum[n] = new_sum[:, None]
            acc[n] = new_acc

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        out[...] = (acc[...] / row_sum[...]).astype(out.dtype)


def _load(options, first, x, n: int, dtype):
    """Loads a tile of head n of a cached tensor."""
    if isinstance(x, Int8):
        scales = transposed(x.scales[n].astype(jnp.float32))
        loaded = (x.codes[n].astype(jnp.float32) * scales).astype(dtype)
    else:
        loaded = x[n].astype(dtype)
    if not options.ragged:
        return loaded
    # Beyond the cache anything may be in memory. Its weights are zero, but zero times nan is nan.
    slots = first + jax.lax.broadcasted_iota(jnp.int32, (options.tile, 1), 0)
    return jnp.where(slots < options.slots, loaded, jnp.zeros((), dtype))


# ---- keys of states ---------------------------------------------------------------------------


def _rotations(key: KeyOfState, options, width: int):
    """Returns the rotations of a tile's offsets [tile, H] and of its starts [tiles, H].

    Each is (cos, sin) in float32, for `_rotate`. A key at slot s + o is R_s R_o of its state. So
    the tile is rotated by the offsets o, which are the same for every tile, and its queries by -s:
    no angles are read along with the cache.
    """
    rest = width - key.width

    def whole_head(rows):
        cos, sin = (x.astype(jnp.float32)[rows] for x in key.at(options.slots, jnp.float32))
        ones, zeros = (make((cos.shape[0], rest), jnp.float32) for make in (jnp.ones, jnp.zeros))
        return (
            jnp.concatenate([cos, cos, ones], axis=1),
            jnp.concatenate([-sin, sin, zeros], axis=1),
        )

    return whole_head(slice(options.tile)), whole_head(slice(None, None, options.tile))


def _rotate(options, x, cos, sin):
    """Returns [r, H] float32 with its first `rotary_width` numbers rotated.

    As x * cos + (x with its rotated halves swapped) * sin, over the whole head.
    """
    half = options.rotary_width // 2
    pieces = [x[:, half : 2 * half], x[:, :half], x[:, 2 * half :]]
    # Mosaic has no empty vectors.
    swapped = jnp.concatenate([piece for piece in pieces if piece.shape[1]], axis=1)
    return x * cos + swapped * sin


def _normed(options, states, gain):
    """Returns states [r, H] in float32, normed as the layer does if there is a gain."""
    wide = states.astype(jnp.float32)
    if gain is None:
        return wide
    mean = jnp.sum(wide * wide, axis=1, keepdims=True) / wide.shape[1]
    # Rounded where the layer rounds: what leaves the norm has the dtype of the state.
    wide = wide * jax.lax.rsqrt(mean + NORM_EPSILON) * gain[...]
    return wide.astype(states.dtype).astype(jnp.float32)
