"""Attention whose queries are its keys (Q = K, Q = K = V), in Pallas through Triton.

One tensor X has two gradients, as queries and as keys. The kernel computes both for a tile of X and
adds them where they are made: one accumulator and one write, where there would be two kernels,
two writes and a sum in memory. With Q = K = V the gradient of the values joins them.

Where every pair is seen both ways (not causal), one product X_i X_j^T serves both scans.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qkvjax.kernels import tile, triton
from qkvjax.kernels.triton import Blocks

# Of the backward pass, by (head width, whether the queries are the values); 0 is any other.
BACKWARD = {
    (256, True): Blocks(128, 64, 8, 2), (256, False): Blocks(64, 64, 8, 2), 0: Blocks(64, 64, 4, 2)
}  # fmt: skip


def attention(
    x, v=None, *, causal=True, segment_ids=None, window=None, scale=None,
    forward: Blocks | None = None, backward: Blocks | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """As `kernels.triton.attention` with q = k = x [B, T, N, H]; `v=None` is Q = K = V."""
    options = triton.settings(
        x, v, causal=causal, window=window, scale=scale, forward=forward,
        backward=backward or BACKWARD.get((x.shape[-1], v is None), BACKWARD[0]),
        interpret=interpret,
    )  # fmt: skip
    return _attend(options, *options.padded((x, v, segment_ids)))[:, : x.shape[1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, x, v, segments):
    return _forward(options, x, v, segments)[0]


def _forward(options, x, v, segments):
    out, (*_, normaliser) = triton.forward_pass(options, (x,), (x,), v, segments)
    return out, (x, v, segments, out, normaliser)


def _backward(options, residuals, slope):
    x, v, segments, out, normaliser = residuals
    delta = tile.delta(out, slope, options.scale)
    batch, length, heads, _ = x.shape
    blocks, _ = options.backward
    by_tile, by_head = triton.by_tile(blocks.queries), triton.by_head(length, 1)
    numbers = lambda x: pl.BlockSpec((None, None, length), lambda i, b, n: (b, n, 0))  # noqa: E731
    # What the tile sees as queries, and where the two differ what sees it as keys.
    passing = dataclasses.replace(blocks, queries=blocks.keys, keys=blocks.queries)
    roles = [(blocks, False), (passing, True)][: 2 if options.causal else 1]
    spans = [options.spans(sizes, x, segments, turned) for sizes, turned in roles]
    edges = [options.edges(length, segments, turned) for _, turned in roles]
    call = triton.pallas(
        functools.partial(_kernel, options, edges), "attention_symmetric", options.interpret,
        blocks,
        grid=(length // blocks.queries, batch, heads),
        in_specs=tile.specs(
            (spans, triton.of_tile()), (x, by_head), (v, by_head), (slope, by_head),
            (normaliser, numbers), (delta, numbers), (segments, triton.all_places),
        ),
        out_specs=jax.tree.map(by_tile, (x, v)), out_shape=jax.tree.map(triton.like, (x, v)),
    )  # fmt: skip
    return *call(spans, x, v, slope, normaliser, delta, segments), None


_attend.defvjp(_forward, _backward)


def _kernel(options, edges, spans, x, v, slope, normaliser, delta, segments, dx, dv):
    """Gradients of one tile of X, as queries and as keys, and of its values."""
    blocks, _ = options.backward
    first = pl.program_id(0) * blocks.queries
    here = pl.ds(first, blocks.queries)
    values = x if v is None else v
    mine, my_values, my_slope = x[here, :], values[here, :], slope[here, :]
    my_normaliser, my_delta = normaliser[here][:, None], delta[here][:, None]
    rows = triton.places_of(first, blocks.queries, segments)

    def step(as_queries, as_keys, j, sums, masked):
        of_x, of_values = sums
        at = pl.ds(j * blocks.keys, blocks.keys)
        other, other_slope = x[at, :], slope[at, :]
        products = tile.dot(mine, other, (1, 1))
        columns = triton.places_of(j * blocks.keys, blocks.keys, segments)
        if as_queries:
            seen = triton.pairs_seen(options, rows, columns) if masked else None
            _, slopes = tile.weights_and_slopes(
                products, seen, my_normaliser,
                tile.dot(my_slope, values[at, :], (1, 1)), my_delta, options.scale,
            )  # fmt: skip
            of_x += tile.dot(slopes.astype(other.dtype), other)
        if as_keys:  # rows are keys here
            seen = triton.pairs_seen(options, columns, rows, turned=True) if masked else None
            weights, slopes = tile.weights_and_slopes(
                products, seen,
                normaliser[at][None, :], tile.dot(my_values, other_slope, (1, 1)),
                delta[at][None, :], options.scale,
            )  # fmt: skip
            of_x += tile.dot(slopes.astype(other.dtype), other)
            from_values = tile.dot(weights.astype(other_slope.dtype), other_slope)
            if v is None:
                of_x += from_values
            else:
                of_values += from_values
        return of_x, of_values

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
    sums = zeros(mine), None if v is None else zeros(my_values)
    roles = [(True, False), (False, True)] if options.causal else [(True, True)]
    for role, span, edge in zip(roles, spans, edges):
        sums = tile.walk(span, functools.partial(step, *role), sums, edge)
    dx[...] = sums[0].astype(dx.dtype)
    if v is not None:
        dv[...] = sums[1].astype(dv.dtype)
