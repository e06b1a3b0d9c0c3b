"""Attention in Pallas for NVIDIA GPUs from Ampere on, through Triton: the gradients.

Two kernels. Each computes the weights P and the gradient dS of the scores of its tiles anew, from
the forward pass's `lse`; none of them is ever stored.

    attention_keys, program (j, b, key-value head)       attention_queries, program (i, b, n)
      holds    K_j (and V_j), dK_j (and dV_j)              holds    Q_i, dO_i, lse_i, delta_i, dQ_i
      walks    heads of its group,                         walks    tiles of keys
               then tiles of queries of each                        that it sees
      loads    Q_i, dO_i, lse_i, delta_i                   loads    K_j (and V_j)
      tile     [keys, queries]: S^T, P^T, dS^T             tile     [queries, keys]: S, dS
      adds     dK_j += dS^T Q_i                            adds     dQ_i += dS K_j
               dV_j += P^T dO_i

The first kernel keeps its tiles transposed, so that no product has to transpose P or dS. With K = V
its two sums are one, dKV = dS^T Q + P^T dO: one accumulator and one write.

Two kernels and not one: each program then owns what it writes, and no sums are added atomically.

Letters: B sequences, T positions, N query heads, K key-value heads, G = N / K, H head width, P
width of a part of the scores.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qkvjax.kernels import tile
from qkvjax.kernels.triton.grid import (
    by_group,
    by_head,
    by_tile,
    group_numbers,
    last_first,
    like,
    pallas,
    positions_of,
    range_of_tile,
    row_numbers,
    tile_mask,
    whole_sequence,
)


def keys_pass(options, qs, ks, v, segments, d_out, lse, delta):
    """Returns the gradients of the keys, a list like `ks`, and of the values, or None.

    Args:
      qs, ks, v, segments: as in `triton.attention.forward_pass`.
      d_out: [B, T, N, H].
      lse, delta: float32 [B, N, T], of the forward pass and of `tile.delta`.
    """
    batch, length, heads, _ = qs[0].shape
    num_kv_heads = ks[0].shape[2]
    group = heads // num_kv_heads
    blocks = options.backward[0]
    by_key = by_tile(blocks.keys)
    grouped = by_group(length, group)
    numbers = group_numbers(group, length)
    ranges = options.ranges(blocks, qs[0], segments, by_keys=True)
    masked_ends = options.masked_ends(length, segments, by_keys=True)
    call = pallas(
        functools.partial(_keys_kernel, options, masked_ends, group),
        "attention_keys",
        options.interpret,
        blocks,
        grid=(length // blocks.keys, batch, num_kv_heads),
        in_specs=tile.block_specs(
            (ranges, range_of_tile()),
            (qs, grouped),
            (ks, by_key),
            (v, by_key),
            (d_out, grouped),
            (lse, numbers),
            (delta, numbers),
            (segments, whole_sequence),
        ),
        out_specs=jax.tree.map(by_key, (ks, v)),
        out_shape=jax.tree.map(like, (ks, v)),
    )
    return call(ranges, qs, ks, v, d_out, lse, delta, segments)


def _keys_kernel(
    options,
    masked_ends,
    group,
    tile_range,
    qs,
    ks,
    v,
    d_out,
    lse,
    delta,
    segments,
    d_ks,
    d_v,
):
    """Computes the gradients of one tile of keys (and values)."""
    blocks, _ = options.backward
    k = [ref[...] for ref in ks]
    values = k[0] if v is None else v[...]
    columns = positions_of(pl.program_id(0) * blocks.keys, blocks.keys, segments)

    def add_head(n, sums):
        """Adds what query head n of the group contributes."""

        def step(i, sums, masked):
            at = pl.ds(i * blocks.queries, blocks.queries)
            q = [ref[at, n, :] for ref in qs]
            do = d_out[at, n, :]
            mask = None
            if masked:
                rows = positions_of(i * blocks.queries, blocks.queries, segments)
                mask = tile_mask(options, rows, columns, keys_down=True)
            weights, d_scores = tile.weights_and_d_scores(
                tile.scores(k, q),  # [keys, queries]
                mask,
                lse[n, at][None, :],
                tile.dot(values, do, (1, 1)),
                delta[n, at][None, :],
                options.scale,
            )
            d_keys, d_values = sums
            d_scores = d_scores.astype(q[0].dtype)
            d_keys = [total + tile.dot(d_scores, part) for total, part in zip(d_keys, q)]
            from_values = tile.dot(weights.astype(do.dtype), do)
            if v is None:  # one accumulator: dKV = dS^T Q + P^T dO
                return [d_keys[0] + from_values, *d_keys[1:]], None
            return d_keys, d_values + from_values

        return tile.walk(tile_range, step, sums, masked_ends)

    def zeros(x):
        return jnp.zeros(x.shape, jnp.float32)

    sums = [zeros(part) for part in k], None if v is None else zeros(values)
    d_keys, d_values = jax.lax.fori_loop(0, group, add_head, sums)
    for ref, total in zip(d_ks, d_keys):
        ref[...] = total.astype(ref.dtype)
    if v is not None:
        d_v[...] = d_values.astype(d_v.dtype)


def queries_pass(options, qs, ks, v, segments, d_out, lse, delta):
    """Returns the gradients of the queries, a list like `qs`; arguments are as in `keys_pass`."""
    batch, length, heads, _ = qs[0].shape
    blocks = options.backward[1]
    tiles = length // blocks.queries
    by_query = by_tile(blocks.queries, tiles)
    numbers = row_numbers(blocks.queries, tiles)
    keys = by_head(length, heads // ks[0].shape[2])
    ranges = options.ranges(blocks, qs[0], segments)
    call = pallas(
        functools.partial(_queries_kernel, options, options.masked_ends(length, segments)),
        "attention_queries",
        options.interpret,
        blocks,
        grid=(tiles, batch, heads),
        in_specs=tile.block_specs(
            (ranges, range_of_tile(tiles)),
            (qs, by_query),
            (ks, keys),
            (v, keys),
            (d_out, by_query),
            (lse, numbers),
            (delta, numbers),
            (segments, whole_sequence),
        ),
        out_specs=[jax.tree.map(by_query, qs)],
        out_shape=[jax.tree.map(like, qs)],
    )
    return call(ranges, qs, ks, v, d_out, lse, delta, segments)[0]


def _queries_kernel(options, masked_ends, tile_range, qs, ks, v, d_out, lse, delta, segments, d_qs):
    """Computes the gradient of one tile of queries."""
    _, blocks = options.backward
    q = [ref[...] for ref in qs]
    do = d_out[...]
    row_lse = lse[...][:, None]
    row_delta = delta[...][:, None]
    rows = positions_of(last_first() * blocks.queries, blocks.queries, segments)

    def step(j, sums, masked):
        at = pl.ds(j * blocks.keys, blocks.keys)
        k = [ref[at, :] for ref in ks]
        values = k[0] if v is None else v[at, :]
        mask = None
        if masked:
            columns = positions_of(j * blocks.keys, blocks.keys, segments)
            mask = tile_mask(options, rows, columns)
        _, d_scores = tile.weights_and_d_scores(
            tile.scores(q, k),
            mask,
            row_lse,
            tile.dot(do, values, (1, 1)),
            row_delta,
            options.scale,
        )
        d_scores = d_scores.astype(k[0].dtype)
        return [total + tile.dot(d_scores, part) for total, part in zip(sums, k)]

    start = [jnp.zeros(part.shape, jnp.float32) for part in q]
    for ref, total in zip(d_qs, tile.walk(tile_range, step, start, masked_ends)):
        ref[...] = total.astype(ref.dtype)
