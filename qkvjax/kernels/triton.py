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
from qkvjax.kernels import tile

WIDTHS = (16, 32, 64, 128, 256)
DTYPES = ("float32", "bfloat16", "float16")
NARROWEST = 16  # of a matrix product's sides


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes and what Triton is told: warps a block, stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# Sizes that compile for an H200 without spilling; neither tuned nor timed on hardware.
FORWARD = {256: Blocks(64, 32, 8, 2), 0: Blocks(128, 64, 8, 3)}
BACKWARD = {256: Blocks(32, 32, 4, 1), 0: Blocks(64, 64, 4, 2)}


def refusal(q, v=None, *, softcap=None) -> str | None:
    """Why these kernels do not take such arguments; None where they do."""
    widths = {q.shape[-1], q.shape[-1] if v is None else v.shape[-1]}
    if not widths <= set(WIDTHS):
        wrong = ", ".join(map(str, sorted(widths - set(WIDTHS))))
        return f"its head width is one of {', '.join(map(str, WIDTHS))}, not {wrong}"
    if str(q.dtype) not in DTYPES:
        return f"its dtype is one of {', '.join(DTYPES)}, not {q.dtype}"
    return None if softcap is None else "it has no softcap"


class Options(tile.Options):
    """With tile sizes as `Blocks`."""

    def padded(self, tree):
        """Arrays [B, T, ...] of a tree with zeros behind them, so that every tile is whole."""
        step = max(getattr(b, side) for b in (self.forward, self.backward)
                   for side in ("queries", "keys"))  # fmt: skip
        fill = -self.length % step

        def pad(x):
            return jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2)) if fill else x

        return jax.tree.map(pad, tree)


def attention(
    q, k, v=None, *, causal=True, segment_ids=None, window=None, scale=None, q_pe=None, k_pe=None,
    forward: Blocks | None = None, backward: Blocks | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """As `kernels.dispatch.attention`, whose arguments these are.

    Args:
      forward, backward: tile sizes, powers of two of at least 16; None takes this file's.
      interpret: run on any machine, slowly.

    Raises:
      UserError: `refusal` has an answer, or a block is no such power of two.
    """
    options = settings(
        q, v, causal=causal, window=window, scale=scale, forward=forward, backward=backward,
        interpret=interpret,
    )  # fmt: skip
    length = q.shape[1]
    arrays = options.padded((_parts(q, q_pe), _parts(k, k_pe), v, segment_ids))
    return _attend(options, *arrays)[:, :length]


def settings(q, v, *, causal, window, scale, forward, backward, interpret) -> Options:
    """What `attention` compiles for these arguments; raises as it does."""
    why = refusal(q, v)
    if why:
        raise UserError(f"the triton kernel takes no such attention: {why}")
    length, width = q.shape[1], q.shape[-1]
    smallest = max(NARROWEST, pl.next_power_of_2(length))

    def fit(blocks, defaults):
        blocks = blocks or defaults.get(width, defaults[0])
        for size in (blocks.queries, blocks.keys):
            if size < NARROWEST or size & (size - 1):
                raise UserError(
                    f"a block of {size} does not fit the triton kernel: use powers of two from"
                    f" {NARROWEST} on"
                )
        sizes = min(blocks.queries, smallest), min(blocks.keys, smallest)
        return dataclasses.replace(blocks, queries=sizes[0], keys=sizes[1])

    return Options(
        causal, window, width**-0.5 if scale is None else float(scale), length,
        fit(forward, FORWARD), fit(backward, BACKWARD), interpret,
    )  # fmt: skip


def _parts(x, second):
    """The parts of the scores' operand, the second as wide as a product has to be."""
    return (x,) if second is None else (x, widened(second.astype(x.dtype)))


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
    rows, columns = by_tile(blocks.queries), by_head(length, group)
    out = jax.ShapeDtypeStruct((*qs[0].shape[:3], value.shape[-1]), qs[0].dtype)
    normaliser = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    call = pallas(
        functools.partial(_forward_kernel, options), "attention_forward", options.interpret, blocks,
        grid=(length // blocks.queries, batch, heads),
        in_specs=tile.specs((qs, rows), (ks, columns), (v, columns), (segments, all_places)),
        out_specs=[rows(out), _numbers(blocks.queries)(normaliser)],
        out_shape=[out, normaliser],
    )  # fmt: skip
    out, normaliser = call(qs, ks, v, segments)
    return out, (qs, ks, v, segments, out, normaliser)


def _forward_kernel(options, qs, ks, v, segments, out, normaliser):
    blocks = options.forward
    q = [ref[...] for ref in qs]
    first = pl.program_id(0) * blocks.queries
    rows = places_of(first, blocks.queries, segments)

    def step(j, state):
        at = pl.ds(j * blocks.keys, blocks.keys)
        k = [ref[at, :] for ref in ks]
        scores = tile.scores(q, k, options.scale)
        seen = pairs_seen(options, rows, places_of(j * blocks.keys, blocks.keys, segments))
        return tile.absorb(state, scores, seen, [k[0] if v is None else v[at, :]])

    tiles = tile.key_tiles(first, first + blocks.queries - 1, blocks.keys, **options.limits)
    start = tile.nothing(blocks.queries, [out.shape[-1]])
    top, total, [mixed] = jax.lax.fori_loop(*tiles, step, start)
    total = jnp.maximum(total, 1e-30)  # of rows that pad the sequence
    out[...] = (mixed / total[:, None]).astype(out.dtype)
    normaliser[...] = top + jnp.log2(total)


def _backward(options, residuals, slope):
    qs, ks, v, segments, out, normaliser = residuals
    wide = lambda x: x.astype(jnp.float32)  # noqa: E731
    delta = jnp.einsum("btnh,btnh->bnt", wide(out), wide(slope))
    batch, length, heads, _ = qs[0].shape
    num_kv_heads, blocks = ks[0].shape[2], options.backward
    group = heads // num_kv_heads
    rest = slope, normaliser, delta, segments

    same = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)  # noqa: E731
    by_query, by_key = by_tile(blocks.queries), by_tile(blocks.keys)
    whole, grouped = by_head(length, group), _group(length, group)
    row_numbers, group_numbers = _numbers(blocks.queries), _group_numbers(group, length)
    call = pallas(
        functools.partial(_keys_kernel, options, group), "attention_keys", options.interpret,
        blocks,
        grid=(length // blocks.keys, batch, num_kv_heads),
        in_specs=tile.specs(
            (qs, grouped), (ks, by_key), (v, by_key), (slope, grouped),
            (normaliser, group_numbers), (delta, group_numbers), (segments, all_places),
        ),
        out_specs=jax.tree.map(by_key, (ks, v)), out_shape=same((ks, v)),
    )  # fmt: skip
    dks, dv = call(qs, ks, v, *rest)
    call = pallas(
        functools.partial(_queries_kernel, options), "attention_queries", options.interpret, blocks,
        grid=(length // blocks.queries, batch, heads),
        in_specs=tile.specs(
            (qs, by_query), (ks, whole), (v, whole), (slope, by_query),
            (normaliser, row_numbers), (delta, row_numbers), (segments, all_places),
        ),
        out_specs=[jax.tree.map(by_query, qs)], out_shape=[same(qs)],
    )  # fmt: skip
    [dqs] = call(qs, ks, v, *rest)
    return dqs, dks, dv, None


_attend.defvjp(forward_pass, _backward)


def _keys_kernel(options, group, qs, ks, v, slope, normaliser, delta, segments, dks, dv):
    """Gradients of one tile of keys (and values): all queries of its group of heads pass by."""
    blocks = options.backward
    k = [ref[...] for ref in ks]
    value = k[0] if v is None else v[...]
    first = pl.program_id(0) * blocks.keys
    columns = places_of(first, blocks.keys, segments)

    def head(n, sums):
        def step(i, sums):
            at = pl.ds(i * blocks.queries, blocks.queries)
            q, do = [ref[at, n, :] for ref in qs], slope[at, n, :]
            seen = pairs_seen(
                options,
                places_of(i * blocks.queries, blocks.queries, segments),
                columns,
                turned=True,
            )
            weights, slopes = tile.weights_and_slopes(
                tile.scores(k, q, options.scale), seen, normaliser[n, at][None, :],
                tile.dot(value, do, (1, 1)), delta[n, at][None, :],
            )  # fmt: skip
            of_keys, of_values = sums
            slopes = (slopes * options.scale).astype(q[0].dtype)
            of_keys = [add + tile.dot(slopes, part) for add, part in zip(of_keys, q)]
            from_values = tile.dot(weights.astype(do.dtype), do)
            if v is None:  # one accumulator: dKV = dS^T Q + P^T dO
                return [of_keys[0] + from_values, *of_keys[1:]], None
            return of_keys, of_values + from_values

        return jax.lax.fori_loop(*tiles, step, sums)

    tiles = tile.query_tiles(first, first + blocks.keys - 1, blocks.queries, **options.limits)
    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
    sums = [zeros(part) for part in k], None if v is None else zeros(value)
    of_keys, of_values = jax.lax.fori_loop(0, group, head, sums)
    for ref, total in zip(dks, of_keys):
        ref[...] = total.astype(ref.dtype)
    if v is not None:
        dv[...] = of_values.astype(dv.dtype)


def _queries_kernel(options, qs, ks, v, slope, normaliser, delta, segments, dqs):
    """Gradient of one tile of queries."""
    blocks = options.backward
    q, do = [ref[...] for ref in qs], slope[...]
    of_row, delta_of_row = normaliser[...][:, None], delta[...][:, None]
    first = pl.program_id(0) * blocks.queries
    rows = places_of(first, blocks.queries, segments)

    def step(j, sums):
        at = pl.ds(j * blocks.keys, blocks.keys)
        k = [ref[at, :] for ref in ks]
        value = k[0] if v is None else v[at, :]
        seen = pairs_seen(options, rows, places_of(j * blocks.keys, blocks.keys, segments))
        _, slopes = tile.weights_and_slopes(
            tile.scores(q, k, options.scale),
            seen,
            of_row,
            tile.dot(do, value, (1, 1)),
            delta_of_row,
        )
        slopes = (slopes * options.scale).astype(k[0].dtype)
        return [add + tile.dot(slopes, part) for add, part in zip(sums, k)]

    tiles = tile.key_tiles(first, first + blocks.queries - 1, blocks.keys, **options.limits)
    start = [jnp.zeros(part.shape, jnp.float32) for part in q]
    for ref, total in zip(dqs, jax.lax.fori_loop(*tiles, step, start)):
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


def by_tile(size: int):
    """Tile i of one head of [B, T, N, H]."""
    return lambda x: pl.BlockSpec((None, size, None, x.shape[3]), lambda i, b, n: (b, i, n, 0))


def by_head(length: int, group: int):
    """All places of the key-value head that query head n belongs to."""
    return lambda x: pl.BlockSpec(
        (None, length, None, x.shape[3]), lambda i, b, n: (b, 0, n // group, 0)
    )


def _group(length: int, group: int):
    """All places of the query heads of key-value head n."""
    return lambda x: pl.BlockSpec((None, length, group, x.shape[3]), lambda i, b, n: (b, 0, n, 0))


def _numbers(size: int):
    """Tile i of one head of [B, N, T]."""
    return lambda x: pl.BlockSpec((None, None, size), lambda i, b, n: (b, n, i))


def _group_numbers(group: int, length: int):
    """All places of the query heads of key-value head n, of [B, N, T]."""
    return lambda x: pl.BlockSpec((None, group, length), lambda i, b, n: (b, n, 0))


def all_places(segments):
    return pl.BlockSpec((None, segments.shape[1]), lambda i, b, n: (b, 0))


def pallas(kernel, name: str, interpret: bool, blocks: Blocks, **shapes):
    """`pallas_call` that goes by Triton whatever the version's default is."""
    params = lowering.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)
    return pl.pallas_call(kernel, name=name, interpret=interpret, compiler_params=params, **shapes)
