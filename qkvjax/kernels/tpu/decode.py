"""Decoding in Pallas for TPUs: a few new tokens onto a cache that is read once.

With K = V one tile is copied to the core and used twice. Where keys are normed and rotated but
values are not (`rotary_values=raw`), the tile is the shared state and its key is made in VMEM.

One core walks through a sequence's tiles in order; tiles behind its last position are neither
copied nor computed. Letters: B sequences, S slots, N query heads, K key-value heads, H head
width, R rows: the new tokens of all query heads of a K; P pages of E slots.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as lowering

from qkvjax.errors import UserError
from qkvjax.kernels import rows as rows_of
from qkvjax.kernels import tile
from qkvjax.kernels.stored import NORM_EPSILON, Int8, KeyOfState
from qkvjax.kernels.tpu.attention import refusal, turned
from qkvjax.kernels.tpu.grid import pallas

SLOTS = 1024  # of a tile; neither tuned nor timed
FEWEST_ROWS, MOST_ROWS = 16, 256
# A step of the grid takes about as long as 256 KB: it reads several heads where they are small.
MOST_HEADS, MOST_BYTES, MOST_ROWS_A_STEP = 8, 2**20, 512


def heads_a_step(k, rows: int, size: int) -> int:
    """How many of the heads of [B, K, S, H] a step of the grid takes."""
    itemsize = jax.tree.leaves(k)[0].dtype.itemsize
    fit = min(MOST_HEADS, MOST_BYTES // (size * k.shape[3] * itemsize), MOST_ROWS_A_STEP // rows)
    return max(n for n in range(1, max(fit, 1) + 1) if k.shape[1] % n == 0)


def cannot_make(key: KeyOfState, head_width: int) -> str | None:
    """Why the kernel cannot make such keys; None where it can."""
    return None if key.width else "it makes no keys that are normed and not rotated"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when the kernel is compiled; `turned` numbers of a head are rotated."""

    window: int | None
    scale: float
    slots: int
    tile: int
    turned: int

    @property
    def ragged(self) -> bool:
        """Whether the last tile reaches beyond the cache."""
        return self.slots % self.tile != 0


def decode(
    q,
    k,
    v=None,
    *,
    positions,
    window=None,
    scale=None,
    q_pe=None,
    k_pe=None,
    key: KeyOfState | None = None,
    table=None,
    slots: int = SLOTS,
    interpret: bool | lowering.InterpretParams = False,
) -> jax.Array:
    """As `kernels.dispatch.decode_attention`, whose arguments these are.

    Args:
      slots: of a tile, a multiple of 128; with a table a tile is a page.

    Raises:
      UserError: `refusal` has an answer, or `slots` is no such multiple.
    """
    why = refusal(q, v)
    if why:
        raise UserError(f"the tpu kernel takes no such attention: {why}; use impl='auto'")
    if slots <= 0 or slots % 128:
        raise UserError(
            f"a tile of {slots} slots does not fit the tpu kernel: use multiples of 128"
        )
    batch, length, heads, width = q.shape
    num_kv_heads, group = k.shape[2], heads // k.shape[2]
    size = k.shape[1] if table is not None else min(slots, k.shape[1])
    slots = k.shape[1] * (1 if table is None else table.shape[1])
    # As a cache is stored; these transpositions and those of its views cancel.
    k, v, k_pe = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), (k, v, k_pe))
    # Scales along the lanes: a column of them would take 128 times its bytes.
    k, v = (x._replace(scales=x.scales[:, :, None]) if isinstance(x, Int8) else x for x in (k, v))
    options = Options(
        window,
        width**-0.5 if scale is None else float(scale),
        slots,
        size,
        0 if key is None else key.width,
    )

    # Rows go by tiles as well: a prompt that enters a cache has many.
    tall = min(-(-length * group // FEWEST_ROWS) * FEWEST_ROWS, MOST_ROWS)
    rows = -(-length * group // tall) * tall
    taken = heads_a_step(k, tall, size)

    packed = functools.partial(rows_of.packed, kv_heads=num_kv_heads, rows=rows)
    places = rows_of.places(positions, group, rows)[:, :, None]
    spans = jnp.minimum(rows_of.spans(positions, window, size), -(-slots // size))
    qs = (packed(q),) if q_pe is None else (packed(q), packed(q_pe.astype(q.dtype)))
    turns = gain = None
    if key is not None:
        turns = _turns(key, options, width)
        gain = None if key.gain is None else key.gain.astype(jnp.float32)[None]

    def slots_of(x, paged: bool, axis: int = 2):
        """A tile of some heads of [B, K, S, H], or a page of [P, K, E, H]; slots lie on an axis."""
        shape = [None, taken, *x.shape[2:]]
        shape[axis] = size

        def where(b, n, i, j, begins, ends, *table):
            at = jnp.minimum(begins[b] + j, ends[b] - 1)
            lead = (table[0][b, at], n, 0) if paged else (b, n, at)
            return (*lead, 0) if axis == 2 else (*lead[:2], 0, lead[2])

        return pl.BlockSpec(shape, where)

    def held(x):
        if not isinstance(x, Int8):
            return slots_of(x, table is not None)
        return Int8(*(slots_of(part, table is not None, axis) for part, axis in zip(x, (2, 3))))

    def of_rows(x):
        return pl.BlockSpec((None, taken, tall, x.shape[3]), lambda b, n, i, *_: (b, n, i, 0))

    def whole(x):
        return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)

    scalars = spans[:, 0], spans[:, 3], *([] if table is None else [table.astype(jnp.int32)])
    inputs = qs, k, v, k_pe, turns, gain, places
    out = jax.ShapeDtypeStruct(
        (batch, num_kv_heads, rows, width if v is None else v.shape[3]), q.dtype
    )
    found = pallas(
        functools.partial(_kernel, options, len(scalars)),
        "attention_decode",
        interpret,
        scalars,
        grid=(batch, num_kv_heads // taken, rows // tall, -(-slots // size)),
        in_specs=[
            *(
                jax.tree.map(spec, x, is_leaf=lambda x: isinstance(x, Int8))
                for spec, x in zip(
                    (of_rows, held, held, lambda x: slots_of(x, False), whole, whole), inputs
                )
            ),
            pl.BlockSpec((None, tall, 1), lambda b, n, i, *_: (b, i, 0)),
        ],
        out_specs=of_rows(out),
        out_shape=out,
        scratch_shapes=[
            *(lowering.VMEM((taken, tall, 1), jnp.float32) for _ in "ml"),
            lowering.VMEM((taken, tall, out.shape[3]), jnp.float32),
        ],
    )(*inputs)
    return rows_of.unpacked(found, length, heads)


def _turns(key: KeyOfState, options, width: int):
    """The rotations of a tile's slots and of its start, each (cos, sin) [.., H] in float32.

    A key at slot s + o is R_s R_o of its state, so that the tile is turned by the offsets o,
    which stay in VMEM, and its queries by -s: no angles are read along with the cache.
    """
    rest = width - key.width

    def wide(rows):
        cos, sin = (x.astype(jnp.float32)[rows] for x in key.at(options.slots, jnp.float32))
        ones, zeros = (make((cos.shape[0], rest), jnp.float32) for make in (jnp.ones, jnp.zeros))
        return (
            jnp.concatenate([cos, cos, ones], axis=1),
            jnp.concatenate([-sin, sin, zeros], axis=1),
        )

    return wide(slice(options.tile)), wide(slice(None, None, options.tile))


def _rotate(options, x, cos, sin):
    """[r, H] float32, the first `turned` numbers rotated; cos and sin as of `_turns`."""
    half = options.turned // 2
    pieces = [x[:, half : 2 * half], x[:, :half], x[:, 2 * half :]]
    # Mosaic has no empty vectors.
    swapped = jnp.concatenate([piece for piece in pieces if piece.shape[1]], axis=1)
    return x * cos + swapped * sin


def _kernel(options, num_scalars, begins, ends, *refs):
    """One tile of one sequence's cache for a tile of the rows of some key-value heads."""
    qs, k, v, k_pe, turns, gain, places, out, top, total, mixed = refs[num_scalars - 2 :]
    b, step = pl.program_id(0), pl.program_id(3)
    j = begins[b] + step

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full(top.shape, tile.HIDDEN, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        mixed[...] = jnp.zeros(mixed.shape, jnp.float32)

    @pl.when(j < ends[b])
    def _():
        first = j * options.tile
        columns = first + jax.lax.broadcasted_iota(jnp.int32, (1, options.tile), 1)
        seen = tile.visible(
            places[...], columns, causal=True, window=options.window, length=options.slots
        )
        for n in range(mixed.shape[0]):
            q, held = qs[0][n], _load(options, first, k, n, qs[0].dtype)
            values = held if v is None else _load(options, first, v, n, q.dtype)
            keys = held
            if turns is not None:
                (cos, sin), (start_cos, start_sin) = turns
                at = pl.ds(j, 1)
                q = _rotate(options, q.astype(jnp.float32), start_cos[at, :], -start_sin[at, :])
                q = q.astype(qs[0].dtype)
                keys = _rotate(options, _normed(options, held, gain), cos[...], sin[...])
                keys = keys.astype(held.dtype)
            products = tile.dot(q, keys, (1, 1))
            if k_pe is not None:
                second = _load(options, first, k_pe, n, q.dtype)
                products += tile.dot(qs[1][n], second, (1, 1))
            state = top[n][:, 0], total[n][:, 0], [mixed[n]]
            state = tile.absorb(state, products, seen, [values], options.scale)
            top[n], total[n], mixed[n] = state[0][:, None], state[1][:, None], state[2][0]

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        out[...] = (mixed[...] / total[...]).astype(out.dtype)


def _load(options, first, x, n: int, dtype):
    """A tile of head n of a cached tensor; zeros for what lies beyond the cache, where anything
    may be."""
    if isinstance(x, Int8):
        wide = x.codes[n].astype(jnp.float32) * turned(x.scales[n].astype(jnp.float32))
        found = wide.astype(dtype)
    else:
        found = x[n].astype(dtype)
    if not options.ragged:
        return found
    slots = first + jax.lax.broadcasted_iota(jnp.int32, (options.tile, 1), 0)
    return jnp.where(slots < options.slots, found, jnp.zeros((), dtype))


def _normed(options, held, gain):
    """States [r, H] in float32, normed as the layer does if there is a gain."""
    wide = held.astype(jnp.float32)
    if gain is None:
        return wide
    mean = jnp.sum(wide * wide, axis=1, keepdims=True) / wide.shape[1]
    # Rounded where the layer rounds: what leaves the norm has the dtype of the state.
    wide = wide * jax.lax.rsqrt(mean + NORM_EPSILON) * gain[...]
    return wide.astype(held.dtype).astype(jnp.float32)
