"""Attention in Pallas for TPUs, through Mosaic.

`v=None` says that the key tile is the value tile: it is copied to the core once, and its two
gradients are one accumulator and one write, dKV = s dS^T Q + P^T dO.

What one output tile adds up stays in VMEM while the tiles that it needs pass by (`tpu_grid`).

Scores may have several parts, as in kernels.triton. Letters: B sequences, T places, N query
heads, K key-value heads, G = N/K, H head width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as lowering

from qkvjax.errors import UserError
from qkvjax.kernels import limits, tile
from qkvjax.kernels.tpu.grid import (
    LANES,
    Blocks,
    Options,
    keys_walk,
    pallas,
    queries_walk,
    segment_specs,
)

WIDTHS = range(8, 513, 8)
DTYPES = ("float32", "bfloat16")


# Sizes for heads of up to so many bytes, that fit the 16 MB that a kernel gets of a v5e's VMEM
# whatever the options; neither tuned nor timed.
FORWARD = {512: Blocks(1024, 512), 2048: Blocks(512, 512)}
BACKWARD = {256: Blocks(512, 1024), 1024: Blocks(512, 512), 2048: Blocks(256, 256)}


def refusal(q, v=None, *, softcap=None, q_pe=None, **_) -> str | None:
    """Why these kernels do not take such arguments; None where they do."""
    return limits.refusal(q, v, WIDTHS, DTYPES, softcap=softcap)


def attention(
    q,
    k,
    v=None,
    *,
    causal=True,
    segment_ids=None,
    window=None,
    scale=None,
    q_pe=None,
    k_pe=None,
    blocks: Blocks | None = None,
    interpret: bool | lowering.InterpretParams = False,
) -> jax.Array:
    """As `kernels.dispatch.attention`, whose arguments these are.

    Args:
      blocks: tile sizes of every kernel; None takes this file's.
      interpret: run on any machine, slowly.

    Raises:
      UserError: `refusal` has an answer, or a block is no multiple of 128.
    """
    why = refusal(q, v)
    if why:
        raise UserError(f"the tpu kernel takes no such attention: {why}; use impl='auto'")
    length, width = q.shape[1], q.shape[-1]
    longest = -(-length // LANES) * LANES
    head_bytes = max(width, k.shape[-1] if v is None else v.shape[-1]) * q.dtype.itemsize

    def fit(defaults):
        chosen = blocks or next(sizes for most, sizes in defaults.items() if head_bytes <= most)
        for size in (chosen.queries, chosen.keys):
            if size <= 0 or size % LANES:
                raise UserError(
                    f"a block of {size} does not fit the tpu kernel: use multiples of {LANES}"
                )
        return Blocks(min(chosen.queries, longest), min(chosen.keys, longest))

    options = Options(
        causal,
        window,
        width**-0.5 if scale is None else float(scale),
        length,
        fit(FORWARD),
        fit(BACKWARD),
        interpret,
    )
    sizes = (
        getattr(b, side)
        for b in (options.forward, options.backward)
        for side in ("queries", "keys")
    )
    fill = -length % math.lcm(*sizes)

    def by_head(x):  # [B, T, N, H] -> [B, N, T, H] with whole tiles
        return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, fill), (0, 0)])

    qs, ks, v = jax.tree.map(by_head, (_parts(q, q_pe), _parts(k, k_pe), v))
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids.astype(jnp.int32), [(0, 0), (0, fill)])
    return jnp.swapaxes(_attend(options, qs, ks, v, segment_ids)[:, :, :length], 1, 2)


def _parts(x, second):
    """The parts of the scores' operand."""
    return (x,) if second is None else (x, second.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, qs, ks, v, segments):
    return _forward(options, qs, ks, v, segments)[0]


def _forward(options, qs, ks, v, segments):
    batch, heads, length, _ = qs[0].shape
    group, blocks = heads // ks[0].shape[1], options.forward
    value = ks[0] if v is None else v
    out = jax.ShapeDtypeStruct((*qs[0].shape[:3], value.shape[-1]), qs[0].dtype)
    normaliser = jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)
    rows, columns = queries_walk(blocks, group)
    call = pallas(
        functools.partial(_forward_kernel, options),
        "attention_forward",
        options.interpret,
        options.ends(blocks, qs, segments),
        grid=(batch, heads, length // blocks.queries, options.steps(blocks.queries, blocks.keys)),
        in_specs=tile.specs((qs, rows.tile), (ks, columns.tile), (v, columns.tile))
        + segment_specs(segments, rows, columns),
        out_specs=[rows.tile(out), rows.numbers(normaliser)],
        out_shape=[out, normaliser],
        scratch_shapes=[
            *(lowering.VMEM((blocks.queries, 1), jnp.float32) for _ in "ml"),
            lowering.VMEM((blocks.queries, value.shape[-1]), jnp.float32),
        ],
    )
    out, normaliser = call(qs, ks, v, *_both_ways(segments))
    return out, (qs, ks, v, segments, out, normaliser)


def _forward_kernel(
    options,
    begins,
    ends,
    qs,
    ks,
    v,
    row_segments,
    column_segments,
    out,
    normaliser,
    top,
    total,
    mixed,
):
    blocks = options.forward
    b, i, step = (pl.program_id(axis) for axis in (0, 2, 3))
    j = begins[b, i] + step

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full(top.shape, tile.HIDDEN, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        mixed[...] = jnp.zeros(mixed.shape, jnp.float32)

    @pl.when(j < ends[b, i])
    def _():
        k = [ref[...] for ref in ks]
        products = tile.products([ref[...] for ref in qs], k)
        seen = _seen(options, i, j, blocks, row_segments, column_segments)
        state = top[:, 0], total[:, 0], [mixed[...]]
        state = tile.absorb(state, products, seen, [k[0] if v is None else v[...]], options.scale)
        top[...], total[...], mixed[...] = state[0][:, None], state[1][:, None], state[2][0]

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        divisor = jnp.maximum(total[...], 1e-30)  # of rows that pad the sequence
        out[...] = (mixed[...] / divisor).astype(out.dtype)
        normaliser[...] = turned(top[...] + jnp.log2(divisor))


def _backward(options, residuals, slope):
    qs, ks, v, segments, out, normaliser = residuals
    wide = lambda x: x.astype(jnp.float32)  # noqa: E731
    delta = options.scale * jnp.sum(wide(out) * wide(slope), axis=-1)[:, :, None]
    batch, heads, length, _ = qs[0].shape
    num_kv_heads, blocks = ks[0].shape[1], options.backward
    group = heads // num_kv_heads
    arrays = (qs, ks, v, slope, normaliser, delta, *_both_ways(segments))

    same = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)  # noqa: E731
    sums = lambda tree, size: jax.tree.map(  # noqa: E731
        lambda x: lowering.VMEM((size, x.shape[-1]), jnp.float32), tree
    )

    def read(rows, columns):
        return tile.specs(
            (qs, rows.tile),
            (ks, columns.tile),
            (v, columns.tile),
            (slope, rows.tile),
            (normaliser, rows.numbers),
            (delta, rows.numbers),
        )

    rows, columns = keys_walk(blocks, group)
    dks, dv = pallas(
        functools.partial(_keys_kernel, options),
        "attention_keys",
        options.interpret,
        options.ends(blocks, qs, segments, turned=True),
        grid=(
            batch,
            num_kv_heads,
            length // blocks.keys,
            group,
            options.steps(blocks.keys, blocks.queries),
        ),
        in_specs=read(rows, columns) + segment_specs(segments, columns, rows)[::-1],
        out_specs=tile.specs((ks, columns.tile), (v, columns.tile)),
        out_shape=[same(ks), same(v)],
        scratch_shapes=[sums(ks, blocks.keys), sums(v, blocks.keys)],
    )(*arrays[:6], *arrays[:5:-1])
    rows, columns = queries_walk(blocks, group)
    [dqs] = pallas(
        functools.partial(_queries_kernel, options),
        "attention_queries",
        options.interpret,
        options.ends(blocks, qs, segments),
        grid=(batch, heads, length // blocks.queries, options.steps(blocks.queries, blocks.keys)),
        in_specs=read(rows, columns) + segment_specs(segments, rows, columns),
        out_specs=tile.specs((qs, rows.tile)),
        out_shape=[same(qs)],
        scratch_shapes=[
            sums(qs, blocks.queries),
            *(lowering.VMEM((blocks.queries, 1), jnp.float32) for _ in "ld"),
        ],
    )(*arrays)
    return dqs, dks, dv, None


_attend.defvjp(_forward, _backward)


def _keys_kernel(
    options,
    begins,
    ends,
    qs,
    ks,
    v,
    slope,
    normaliser,
    delta,
    row_segments,
    column_segments,
    dks,
    dv,
    of_keys,
    of_values,
):
    """Gradients of one tile of keys (and values): all queries of its group of heads pass by."""
    blocks = options.backward
    b, j, head, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    i = begins[b, j] + step
    sums = [*of_keys] if v is None else [*of_keys, of_values]
    gradients = [*dks] if v is None else [*dks, dv]

    @pl.when((head == 0) & (step == 0))
    def _():
        for ref in sums:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    @pl.when(i < ends[b, j])
    def _():
        q, k, do = [ref[...] for ref in qs], [ref[...] for ref in ks], slope[...]
        # A tile lies with its keys down: neither product below turns it.
        seen = _seen(options, i, j, blocks, row_segments, column_segments, keys_down=True)
        weights, slopes = tile.weights_and_slopes(
            tile.products(k, q),
            seen,
            normaliser[...],
            tile.dot(k[0] if v is None else v[...], do, (1, 1)),
            delta[...],
            options.scale,
        )
        slopes = slopes.astype(do.dtype)
        from_values = tile.dot(weights.astype(do.dtype), do)
        added = [tile.dot(slopes, part) for part in q]
        if v is None:  # one accumulator: dKV = dS^T Q + P^T dO
            added[0] += from_values
        else:
            added.append(from_values)
        for ref, found in zip(sums, added):
            ref[...] += found

    @pl.when((head == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
    def _():
        for ref, total in zip(gradients, sums):
            ref[...] = total[...].astype(ref.dtype)


def _queries_kernel(
    options,
    begins,
    ends,
    qs,
    ks,
    v,
    slope,
    normaliser,
    delta,
    row_segments,
    column_segments,
    dqs,
    sums,
    of_row,
    delta_of_row,
):
    """Gradient of one tile of queries."""
    blocks = options.backward
    b, i, step = (pl.program_id(axis) for axis in (0, 2, 3))
    j = begins[b, i] + step

    @pl.when(step == 0)
    def _():
        of_row[...], delta_of_row[...] = turned(normaliser[...]), turned(delta[...])
        for ref in sums:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    @pl.when(j < ends[b, i])
    def _():
        k, do = [ref[...] for ref in ks], slope[...]
        seen = _seen(options, i, j, blocks, row_segments, column_segments)
        _, slopes = tile.weights_and_slopes(
            tile.products([ref[...] for ref in qs], k),
            seen,
            of_row[...],
            tile.dot(do, k[0] if v is None else v[...], (1, 1)),
            delta_of_row[...],
            options.scale,
        )
        slopes = slopes.astype(do.dtype)
        for ref, part in zip(sums, k):
            ref[...] += tile.dot(slopes, part)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        for ref, total in zip(dqs, sums):
            ref[...] = total[...].astype(ref.dtype)


def turned(x: jax.Array) -> jax.Array:
    """A row [1, r] as a column [r, 1], or a column as a row; r is a multiple of 128."""
    r = max(x.shape)
    if x.shape[0] == 1:
        return jnp.broadcast_to(x, (LANES, r)).T[:, :1]
    return jnp.broadcast_to(x, (r, LANES)).T[:1]


def _seen(options, i, j, blocks, row_segments, column_segments, keys_down: bool = False):
    """The mask of tile i of queries and j of keys: [r, c], or [c, r] with `keys_down`."""
    shapes = [(blocks.queries, 1), (1, blocks.keys)]
    if keys_down:
        shapes = [shape[::-1] for shape in shapes]
    starts = i * blocks.queries, j * blocks.keys
    places = [
        start + jax.lax.broadcasted_iota(jnp.int32, shape, shape[0] == 1)
        for start, shape in zip(starts, shapes)
    ]
    segments = {}
    if row_segments is not None:
        segments = {"row_segments": row_segments[...], "column_segments": column_segments[...]}
    return tile.visible(*places, **options.limits, **segments)


def _both_ways(segments):
    """Segments [B, T] as they lie down and along a tile."""
    return (None, None) if segments is None else (segments[:, :, None], segments[:, None])
