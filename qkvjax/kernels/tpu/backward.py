"""Attention in Pallas for TPUs, through Mosaic: the gradients.

Two kernels. What one output tile adds up stays in VMEM while the tiles that it needs pass by
(`tpu.grid`). Each computes the weights P and the gradient dS of its tiles' scores anew, from the
forward pass's `lse`.

    attention_keys, point (b, n, j, head, step)      attention_queries, point (b, n, i, step)
      stays    K_j (and V_j)                           stays    Q_i, dO_i, lse_i, delta_i
      sums     dK_j (and dV_j), float32                sums     dQ_i, float32
      passes   Q_i, dO_i, lse_i, delta_i of            passes   K_j (and V_j)
               each query head of the group
      tile     [keys, queries]: S^T, P^T, dS^T         tile     [queries, keys]: S, dS
      a step   dK_j += dS^T Q_i                        a step   dQ_i += dS K_j
               dV_j += P^T dO_i
      writes   after the last step of the last head    writes   after the last step

With K = V the first kernel has one sum and one write, dKV = dS^T Q + P^T dO.

Letters: B sequences, T positions, N query heads, K key-value heads, G = N / K, H head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as lowering

from qkvjax.kernels import tile
from qkvjax.kernels.tpu.grid import (
    both_ways,
    keys_walk,
    pallas,
    queries_walk,
    segment_specs,
    tile_mask,
    transposed,
)


def _like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _sums(tree, size: int):
    """Returns float32 scratch for the gradients of a tile of each array."""
    return jax.tree.map(lambda x: lowering.VMEM((size, x.shape[-1]), jnp.float32), tree)


def _operand_specs(rows, columns, qs, ks, v, d_out, lse, delta) -> list:
    """Returns the block specs of what both kernels read."""
    return tile.block_specs(
        (qs, rows.tile),
        (ks, columns.tile),
        (v, columns.tile),
        (d_out, rows.tile),
        (lse, rows.numbers),
        (delta, rows.numbers),
    )


# ---- keys and values --------------------------------------------------------------------------


def keys_pass(options, qs, ks, v, segments, d_out, lse, delta):
    """Returns the gradients of the keys, a list like `ks`, and of the values, or None.

    Args:
      qs, ks: parts of the scores, [B, N, T, P] and [B, K, T, P] each.
      v: [B, K, T, H], or None.
      segments: int32 [B, T], or None.
      d_out: [B, N, T, H].
      lse, delta: float32 [B, N, 1, T].
    """
    batch, heads, length, _ = qs[0].shape
    num_kv_heads = ks[0].shape[1]
    blocks = options.backward
    group = heads // num_kv_heads
    rows, columns = keys_walk(blocks, group)
    # The tile is [keys, queries]: segments of the keys lie down it, those of the queries across.
    down, across = segment_specs(segments, columns, rows)
    segments_down, segments_across = both_ways(segments)
    return pallas(
        functools.partial(_keys_kernel, options),
        "attention_keys",
        options.interpret,
        options.ends(blocks, qs, segments, by_keys=True),
        grid=(
            batch,
            num_kv_heads,
            length // blocks.keys,
            group,
            options.steps(blocks.keys, blocks.queries),
        ),
        in_specs=[*_operand_specs(rows, columns, qs, ks, v, d_out, lse, delta), across, down],
        out_specs=tile.block_specs((ks, columns.tile), (v, columns.tile)),
        out_shape=[_like(ks), _like(v)],
        scratch_shapes=[_sums(ks, blocks.keys), _sums(v, blocks.keys)],
    )(qs, ks, v, d_out, lse, delta, segments_across, segments_down)


def _keys_kernel(
    options,
    begins,
    ends,
    qs,
    ks,
    v,
    d_out,
    lse,
    delta,
    row_segments,
    column_segments,
    d_ks,
    d_v,
    key_sums,
    value_sums,
):
    """Takes one step of the gradients of one tile of keys (and values)."""
    blocks = options.backward
    b, j, head, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    i = begins[b, j] + step
    sums = [*key_sums] if v is None else [*key_sums, value_sums]
    gradients = [*d_ks] if v is None else [*d_ks, d_v]

    @pl.when((head == 0) & (step == 0))
    def _start():
        for ref in sums:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    # Steps behind the end have the last tile once more, which must not count twice.
    @pl.when(i < ends[b, j])
    def _step():
        q = [ref[...] for ref in qs]
        k = [ref[...] for ref in ks]
        do = d_out[...]
        # With the keys down the tile, neither product below transposes it.
        mask = tile_mask(options, i, j, blocks, row_segments, column_segments, keys_down=True)
        weights, d_scores = tile.weights_and_d_scores(
            tile.scores(k, q),
            mask,
            lse[...],
            tile.dot(k[0] if v is None else v[...], do, (1, 1)),
            delta[...],
            options.scale,
        )
        d_scores = d_scores.astype(do.dtype)
        from_values = tile.dot(weights.astype(do.dtype), do)
        contributions = [tile.dot(d_scores, part) for part in q]
        if v is None:  # one sum: dKV = dS^T Q + P^T dO
            contributions[0] += from_values
        else:
            contributions.append(from_values)
        for ref, contribution in zip(sums, contributions):
            ref[...] += contribution

    @pl.when((head == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
    def _finish():
        for ref, total in zip(gradients, sums):
            ref[...] = total[...].astype(ref.dtype)


# ---- queries ----------------------------------------------------------------------------------


def queries_pass(options, qs, ks, v, segments, d_out, lse, delta):
    """Returns the gradients of the queries, a list like `qs`; arguments are as in `keys_pass`."""
    batch, heads, length, _ = qs[0].shape
    blocks = options.backward
    rows, columns = queries_walk(blocks, heads // ks[0].shape[1])
    [d_qs] = pallas(
        functools.partial(_queries_kernel, options),
        "attention_queries",
        options.interpret,
        options.ends(blocks, qs, segments),
        grid=(batch, heads, length // blocks.queries, options.steps(blocks.queries, blocks.keys)),
        in_specs=_operand_specs(rows, columns, qs, ks, v, d_out, lse, delta)
        + segment_specs(segments, rows, columns),
        out_specs=tile.block_specs((qs, rows.tile)),
        out_shape=[_like(qs)],
        scratch_shapes=[
            _sums(qs, blocks.queries),
            lowering.VMEM((blocks.queries, 1), jnp.float32),  # lse
            lowering.VMEM((blocks.queries, 1), jnp.float32),  # delta
        ],
    )(qs, ks, v, d_out, lse, delta, *both_ways(segments))
    return d_qs


def _queries_kernel(
    options,
    begins,
    ends,
    qs,
    ks,
    v,
    d_out,
    lse,
    delta,
    row_segments,
    column_segments,
    d_qs,
    sums,
    row_lse,
    row_delta,
):
    """Takes one step of the gradient of one tile of queries."""
    blocks = options.backward
    b, i, step = (pl.program_id(axis) for axis in (0, 2, 3))
    j = begins[b, i] + step

    @pl.when(step == 0)
    def _start():
        # Transposed once and not in every step: in memory they are rows, here columns.
        row_lse[...] = transposed(lse[...])
        row_delta[...] = transposed(delta[...])
        for ref in sums:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    # Steps behind the end have the last tile once more, which must not count twice.
    @pl.when(j < ends[b, i])
    def _step():
        k = [ref[...] for ref in ks]
        do = d_out[...]
        mask = tile_mask(options, i, j, blocks, row_segments, column_segments)
        _, d_scores = tile.weights_and_d_scores(
            tile.scores([ref[...] for ref in qs], k),
            mask,
            row_lse[...],
            tile.dot(do, k[0] if v is None else v[...], (1, 1)),
            row_delta[...],
            options.scale,
        )
        d_scores = d_scores.astype(do.dtype)
        for ref, part in zip(sums, k):
            ref[...] += tile.dot(d_scores, part)

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        for ref, total in zip(d_qs, sums):
            ref[...] = total[...].astype(ref.dtype)
