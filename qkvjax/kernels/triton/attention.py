"""Attention in Pallas for NVIDIA GPUs from Ampere on, through Triton.

`v=None` says that the key tile is the value tile: it is loaded once, and its two gradients are
one accumulator and one write, dKV = dS^T Q + P^T dO.

Scores may have several parts, S = sum of q_p k_p^T (`q_pe` and `k_pe`); values are their own or
those of the first part. Letters: B sequences, T places, N query heads, K key-value heads, G = N/K,
H head width.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as lowering

from qkvjax.errors import UserError
from qkvjax.kernels import limits, tile

WIDTHS = (16, 32, 64, 128, 256)  # of the kernels; other heads are filled up with zeros
TAKEN = range(8, 257, 8)
DTYPES = ("float32", "bfloat16", "float16")
NARROWEST = 16  # of a matrix product's sides


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes and what Triton is told: warps a block, stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# By (head width, whether the keys are the values): the fastest on an H200 of those that fit it
# (benchmarks/results/h200/tiles.jsonl, by benchmarks/kernel_speed.py). Narrower heads take 64's.
FORWARD = {
    (64, False): Blocks(64, 64, 4, 3),
    (64, True): Blocks(64, 64, 4, 3),
    (128, False): Blocks(128, 64, 4, 2),
    (128, True): Blocks(64, 64, 4, 2),
    (256, False): Blocks(64, 64, 4, 3),
    (256, True): Blocks(128, 64, 8, 4),
}
KEYS = {
    (64, False): Blocks(64, 64, 4, 3),
    (64, True): Blocks(64, 128, 4, 3),
    (128, False): Blocks(64, 64, 4, 2),
    (128, True): Blocks(64, 64, 4, 3),
    (256, False): Blocks(64, 64, 8, 2),
    (256, True): Blocks(64, 128, 8, 2),
}
QUERIES = {
    (64, False): Blocks(64, 128, 4, 3),
    (64, True): Blocks(128, 64, 4, 3),
    (128, False): Blocks(128, 64, 8, 3),
    (128, True): Blocks(64, 64, 4, 2),
    (256, False): Blocks(128, 32, 8, 3),
    (256, True): Blocks(64, 64, 4, 3),
}


def refusal(q, v=None, *, softcap=None, q_pe=None, **_) -> str | None:
    """Why these kernels do not take such arguments; None where they do."""
    return limits.refusal(q, v, TAKEN, DTYPES, softcap=softcap)


class Options(tile.Options):
    """With `forward` as Blocks and `backward` as those of keys and those of queries."""

    def padded(self, tree):
        """Arrays [B, T, ...] of a tree with zeros behind them, so that every tile is whole."""
        sizes = (self.forward, *self.backward)
        return tile.padded(tree, self.length, max(max(b.queries, b.keys) for b in sizes))

    def spans(self, blocks: Blocks, x, segments, turned: bool = False) -> jax.Array:
        """`tile.spans` of sequences like x [B, T, ...]."""
        return tile.spans(
            blocks.queries, blocks.keys, x.shape[1], segments=segments, turned=turned, **self.limits
        )


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
    forward: Blocks | None = None,
    backward: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `kernels.dispatch.attention`, whose arguments these are.

    Args:
      forward, backward: tile sizes, powers of two of at least 16; None takes this file's.
      interpret: run on any machine, slowly.

    Raises:
      UserError: `refusal` has an answer, or a block is no such power of two.
    """
    length, width = q.shape[1], (k if v is None else v).shape[-1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = filled(q), filled(k), None if v is None else filled(v)
    options = settings(
        q,
        v,
        causal=causal,
        window=window,
        scale=scale,
        forward=forward,
        backward=backward,
        interpret=interpret,
    )
    arrays = options.padded((_parts(q, q_pe), _parts(k, k_pe), v, segment_ids))
    return _attend(options, *arrays)[:, :length, :, :width]


def settings(q, v, *, causal, window, scale, forward, backward, interpret) -> Options:
    """What `attention` compiles for these arguments; raises as it does."""
    why = refusal(q, v)
    if why:
        raise UserError(f"the triton kernel takes no such attention: {why}")
    length, width = q.shape[1], q.shape[-1]
    smallest = max(NARROWEST, pl.next_power_of_2(length))

    def fit(blocks, defaults):
        blocks = blocks or defaults[max(width, 64), v is None]
        for size in (blocks.queries, blocks.keys):
            if size < NARROWEST or size & (size - 1):
                raise UserError(
                    f"a block of {size} does not fit the triton kernel: use powers of two from"
                    f" {NARROWEST} on"
                )
        sizes = min(blocks.queries, smallest), min(blocks.keys, smallest)
        return dataclasses.replace(blocks, queries=sizes[0], keys=sizes[1])

    return Options(
        causal,
        window,
        width**-0.5 if scale is None else float(scale),
        length,
        fit(forward, FORWARD),
        (fit(backward, KEYS), fit(backward, QUERIES)),
        interpret,
    )


def _parts(x, second):
    """The parts of the scores' operand, the second as wide as a product has to be."""
    return (x,) if second is None else (x, widened(second.astype(x.dtype)))


def filled(x: jax.Array) -> jax.Array:
    """[B, T, N, H] with zeros up to the next of WIDTHS, which change no score and no value."""
    width = next((size for size in WIDTHS if size >= x.shape[-1]), x.shape[-1])
    if width == x.shape[-1]:
        return x
    return jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])])


def widened(x: jax.Array) -> jax.Array:
    """[B, T, N, P] with zeros up to a P that a product can have."""
    width = max(NARROWEST, pl.next_power_of_2(x.shape[-1]))
    return jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, qs, ks, v, segments):
    return forward_pass(options, qs, ks, v, segments)[0]


def forward_pass(options, qs, ks, v, segments):
    batch, length, heads, _ = qs[0].shape
    group, blocks = heads // ks[0].shape[2], options.forward
    value = ks[0] if v is None else v
    tiles = length // blocks.queries
    rows, columns = by_tile(blocks.queries, tiles), by_head(length, group)
    spans = options.spans(blocks, qs[0], segments)
    out = jax.ShapeDtypeStruct((*qs[0].shape[:3], value.shape[-1]), qs[0].dtype)
    normaliser = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    call = pallas(
        functools.partial(_forward_kernel, options, options.edges(length, segments)),
        "attention_forward",
        options.interpret,
        blocks,
        grid=(tiles, batch, heads),
        in_specs=tile.specs(
            (spans, of_tile(tiles)), (qs, rows), (ks, columns), (v, columns), (segments, all_places)
        ),
        out_specs=[rows(out), _numbers(blocks.queries, tiles)(normaliser)],
        out_shape=[out, normaliser],
    )
    out, normaliser = call(spans, qs, ks, v, segments)
    return out, (qs, ks, v, segments, out, normaliser)


def _forward_kernel(options, edges, span, qs, ks, v, segments, out, normaliser):
    blocks = options.forward
    q = [ref[...] for ref in qs]
    rows = places_of(_backwards() * blocks.queries, blocks.queries, segments)

    def step(j, state, masked):
        at = pl.ds(j * blocks.keys, blocks.keys)
        k = [ref[at, :] for ref in ks]
        seen = None
        if masked:
            seen = pairs_seen(options, rows, places_of(j * blocks.keys, blocks.keys, segments))
        values = k[0] if v is None else v[at, :]
        return tile.absorb(state, tile.products(q, k), seen, [values], options.scale)

    start = tile.nothing(blocks.queries, [out.shape[-1]])
    top, total, [mixed] = tile.walk(span, step, start, edges)
    total = jnp.maximum(total, 1e-30)  # of rows that pad the sequence
    out[...] = (mixed / total[:, None]).astype(out.dtype)
    normaliser[...] = top + jnp.log2(total)


def _backward(options, residuals, slope):
    qs, ks, v, segments, out, normaliser = residuals
    rest = segments, slope, normaliser, tile.delta(out, slope, options.scale)
    return queries_pass(options, qs, ks, v, *rest), *keys_pass(options, qs, ks, v, *rest), None


def keys_pass(options, qs, ks, v, segments, slope, normaliser, delta):
    """Gradients of the keys and of the values."""
    batch, length, heads, _ = qs[0].shape
    num_kv_heads, blocks = ks[0].shape[2], options.backward[0]
    group = heads // num_kv_heads
    by_key, grouped = by_tile(blocks.keys), _group(length, group)
    numbers = _group_numbers(group, length)
    spans = options.spans(blocks, qs[0], segments, turned=True)
    edges = options.edges(length, segments, turned=True)
    call = pallas(
        functools.partial(_keys_kernel, options, edges, group),
        "attention_keys",
        options.interpret,
        blocks,
        grid=(length // blocks.keys, batch, num_kv_heads),
        in_specs=tile.specs(
            (spans, of_tile()),
            (qs, grouped),
            (ks, by_key),
            (v, by_key),
            (slope, grouped),
            (normaliser, numbers),
            (delta, numbers),
            (segments, all_places),
        ),
        out_specs=jax.tree.map(by_key, (ks, v)),
        out_shape=jax.tree.map(like, (ks, v)),
    )
    return call(spans, qs, ks, v, slope, normaliser, delta, segments)


def queries_pass(options, qs, ks, v, segments, slope, normaliser, delta):
    """Gradient of the queries."""
    batch, length, heads, _ = qs[0].shape
    blocks = options.backward[1]
    tiles = length // blocks.queries
    by_query, numbers = by_tile(blocks.queries, tiles), _numbers(blocks.queries, tiles)
    whole = by_head(length, heads // ks[0].shape[2])
    spans = options.spans(blocks, qs[0], segments)
    call = pallas(
        functools.partial(_queries_kernel, options, options.edges(length, segments)),
        "attention_queries",
        options.interpret,
        blocks,
        grid=(tiles, batch, heads),
        in_specs=tile.specs(
            (spans, of_tile(tiles)),
            (qs, by_query),
            (ks, whole),
            (v, whole),
            (slope, by_query),
            (normaliser, numbers),
            (delta, numbers),
            (segments, all_places),
        ),
        out_specs=[jax.tree.map(by_query, qs)],
        out_shape=[jax.tree.map(like, qs)],
    )
    return call(spans, qs, ks, v, slope, normaliser, delta, segments)[0]


def like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


_attend.defvjp(forward_pass, _backward)


def _keys_kernel(
    options, edges, group, span, qs, ks, v, slope, normaliser, delta, segments, dks, dv
):
    """Gradients of one tile of keys (and values): all queries of its group of heads pass by."""
    blocks, _ = options.backward
    k = [ref[...] for ref in ks]
    value = k[0] if v is None else v[...]
    columns = places_of(pl.program_id(0) * blocks.keys, blocks.keys, segments)

    def head(n, sums):
        def step(i, sums, masked):
            at = pl.ds(i * blocks.queries, blocks.queries)
            q, do, seen = [ref[at, n, :] for ref in qs], slope[at, n, :], None
            if masked:
                rows = places_of(i * blocks.queries, blocks.queries, segments)
                seen = pairs_seen(options, rows, columns, turned=True)
            weights, slopes = tile.weights_and_slopes(
                tile.products(k, q),
                seen,
                normaliser[n, at][None, :],
                tile.dot(value, do, (1, 1)),
                delta[n, at][None, :],
                options.scale,
            )
            of_keys, of_values = sums
            slopes = slopes.astype(q[0].dtype)
            of_keys = [add + tile.dot(slopes, part) for add, part in zip(of_keys, q)]
            from_values = tile.dot(weights.astype(do.dtype), do)
            if v is None:  # one accumulator: dKV = dS^T Q + P^T dO
                return [of_keys[0] + from_values, *of_keys[1:]], None
            return of_keys, of_values + from_values

        return tile.walk(span, step, sums, edges)

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
    sums = [zeros(part) for part in k], None if v is None else zeros(value)
    of_keys, of_values = jax.lax.fori_loop(0, group, head, sums)
    for ref, total in zip(dks, of_keys):
        ref[...] = total.astype(ref.dtype)
    if v is not None:
        dv[...] = of_values.astype(dv.dtype)


def _queries_kernel(options, edges, span, qs, ks, v, slope, normaliser, delta, segments, dqs):
    """Gradient of one tile of queries."""
    _, blocks = options.backward
    q, do = [ref[...] for ref in qs], slope[...]
    of_row, delta_of_row = normaliser[...][:, None], delta[...][:, None]
    rows = places_of(_backwards() * blocks.queries, blocks.queries, segments)

    def step(j, sums, masked):
        at = pl.ds(j * blocks.keys, blocks.keys)
        k = [ref[at, :] for ref in ks]
        value, seen = k[0] if v is None else v[at, :], None
        if masked:
            seen = pairs_seen(options, rows, places_of(j * blocks.keys, blocks.keys, segments))
        _, slopes = tile.weights_and_slopes(
            tile.products(q, k),
            seen,
            of_row,
            tile.dot(do, value, (1, 1)),
            delta_of_row,
            options.scale,
        )
        slopes = slopes.astype(k[0].dtype)
        return [add + tile.dot(slopes, part) for add, part in zip(sums, k)]

    start = [jnp.zeros(part.shape, jnp.float32) for part in q]
    for ref, total in zip(dqs, tile.walk(span, step, start, edges)):
        ref[...] = total.astype(ref.dtype)


def places_of(first, size: int, segments):
    """(places [size], their segments or None)."""
    places = first + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
    return places, None if segments is None else segments[pl.ds(first, size)]


def pairs_seen(options, rows, columns, turned: bool = False):
    """The mask of a tile of rows and columns as `_places` gives them; `turned` is [c, r]."""
    down, along = (lambda x: x[:, None]), (lambda x: x[None, :])
    of_rows, of_columns = (along, down) if turned else (down, along)
    place = of_rows(rows[0]), of_columns(columns[0])
    if rows[1] is None:
        return tile.visible(*place, **options.limits)
    segments = of_rows(rows[1]), of_columns(columns[1])
    return tile.visible(
        *place, **options.limits, row_segments=segments[0], column_segments=segments[1]
    )


# Where a grid point (tile i, sequence b, head n) finds its part of an array: functions of it.
# Given how many `tiles` there are, the last one is the first to be computed: of a causal sequence
# it has the most to do, and what starts last should be short.


def _backwards():
    """The number of the tile that this program of such a grid computes."""
    return pl.num_programs(0) - 1 - pl.program_id(0)


def _turn(tiles: int | None):
    return (lambda i: i) if tiles is None else (lambda i: tiles - 1 - i)


def by_tile(size: int, tiles: int | None = None):
    """Tile i of one head of [B, T, N, H]."""
    at = _turn(tiles)
    return lambda x: pl.BlockSpec((None, size, None, x.shape[3]), lambda i, b, n: (b, at(i), n, 0))


def of_tile(tiles: int | None = None):
    """Tile i's row of `tile.spans` [B or 1, tiles, 4]."""
    at = _turn(tiles)
    return lambda x: pl.BlockSpec(
        (None, None, 4), lambda i, b, n: (b if x.shape[0] > 1 else 0, at(i), 0)
    )


def by_head(length: int, group: int):
    """All places of the key-value head that query head n belongs to."""
    return lambda x: pl.BlockSpec(
        (None, length, None, x.shape[3]), lambda i, b, n: (b, 0, n // group, 0)
    )


def _group(length: int, group: int):
    """All places of the query heads of key-value head n."""
    return lambda x: pl.BlockSpec((None, length, group, x.shape[3]), lambda i, b, n: (b, 0, n, 0))


def _numbers(size: int, tiles: int):
    """Tile i of one head of [B, N, T]."""
    return lambda x: pl.BlockSpec((None, None, size), lambda i, b, n: (b, n, tiles - 1 - i))


def _group_numbers(group: int, length: int):
    """All places of the query heads of key-value head n, of [B, N, T]."""
    return lambda x: pl.BlockSpec((None, group, length), lambda i, b, n: (b, n, 0))


def all_places(segments):
    return pl.BlockSpec((None, segments.shape[1]), lambda i, b, n: (b, 0))


def pallas(kernel, name: str, interpret: bool, blocks: Blocks, **shapes):
    """`pallas_call` that goes by Triton whatever the version's default is."""
    params = lowering.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)
    return pl.pallas_call(
        kernel, name=name, interpret=bool(interpret), compiler_params=params, **shapes
    )
