"""Attention in Pallas for NVIDIA GPUs from Ampere on, through Triton: arguments and forward pass.

A program holds one tile of queries of one head, and walks over the tiles of keys that it sees
(`tile.ranges`). `v=None` says that the key tile is the value tile, so that it is loaded once:

    program (i, b, n)         keys [T, H] of the head     v=None      two tensors
      registers: q tile         tile begin                K_j         K_j, V_j    loaded
                 row_max          ...                      |           |    |
                 row_sum          full_begin        S = q K_j^T     q K_j^T |     product 1
                 acc [r, H]       ...                      |           |    |
                                  full_end               P = online_softmax |
                                  ...                      |           |    |
                                end - 1             acc += P K_j     acc += P V_j product 2
                                                     (the same tile)
      at the end: out = acc / row_sum, lse = row_max + log2(row_sum)

Triton pipelines the loop in `stages`: it loads the next tiles while the current one is computed.

Scores may have several parts, S = sum of q_p k_p^T (`q_pe` and `k_pe`); values are their own tensor
or those of the first part. Letters: B sequences, T positions, N query heads, K key-value heads,
G = N / K, H head width, P width of the second part.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from qkvjax.errors import UserError
from qkvjax.kernels import limits, tile
from qkvjax.kernels.triton import backward as triton_backward
from qkvjax.kernels.triton.blocks import (
    DTYPES,
    FORWARD,
    KEYS,
    NARROWEST,
    QUERIES,
    SUPPORTED_WIDTHS,
    Blocks,
    pad_to_width,
    score_parts,
)
from qkvjax.kernels.triton.grid import (
    Options,
    by_head,
    by_tile,
    last_first,
    pallas,
    positions_of,
    range_of_tile,
    row_numbers,
    tile_mask,
    whole_sequence,
)


def refusal(q, v=None, **_) -> str | None:
    """Returns why these kernels do not support these arguments; None where they do."""
    return limits.refusal(q, v, SUPPORTED_WIDTHS, DTYPES)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"] | None = None,
    *,
    causal: bool = True,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    q_pe: Float[Array, "B T N P"] | None = None,
    k_pe: Float[Array, "B T K P"] | None = None,
    forward: Blocks | None = None,
    backward: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N _"]:
    """Computes `kernels.dispatch.attention`, whose arguments these are.

    Args:
      forward, backward: tile sizes, powers of two of at least 16; None takes those of `blocks`.
      interpret: run on any machine, slowly.

    Raises:
      UserError: for the reason that `refusal` returns, or a block is not such a power of two.
    """
    length = q.shape[1]
    value_width = (k if v is None else v).shape[-1]
    # The scale is that of the true width: padding must not change it.
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = pad_to_width(q)
    k = pad_to_width(k)
    v = None if v is None else pad_to_width(v)
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
    arrays = options.padded((score_parts(q, q_pe), score_parts(k, k_pe), v, segment_ids))
    return _attend(options, *arrays)[:, :length, :, :value_width]


def settings(q, v, *, causal, window, scale, forward, backward, interpret) -> Options:
    """Returns what `attention` compiles for these arguments; raises as it does."""
    reason = refusal(q, v)
    if reason:
        raise UserError(f"the triton kernel does not support these arguments: {reason}")
    length = q.shape[1]
    width = q.shape[-1]
    longest = max(NARROWEST, pl.next_power_of_2(length))

    def fit(blocks, defaults):
        blocks = blocks or defaults[max(width, 64), v is None]
        for size in (blocks.queries, blocks.keys):
            if size < NARROWEST or size & (size - 1):
                raise UserError(
                    f"a block of {size} does not fit the triton kernel: use powers of two from"
                    f" {NARROWEST} on"
                )
        return dataclasses.replace(
            blocks, queries=min(blocks.queries, longest), keys=min(blocks.keys, longest)
        )

    return Options(
        causal=causal,
        window=window,
        scale=width**-0.5 if scale is None else float(scale),
        length=length,
        forward=fit(forward, FORWARD),
        backward=(fit(backward, KEYS), fit(backward, QUERIES)),
        interpret=interpret,
    )


# ---- forward ----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, qs, ks, v, segments):
    return forward_pass(options, qs, ks, v, segments)[0]


def forward_pass(options, qs, ks, v, segments):
    """Returns (attention [B, T, N, H], the residuals of the backward pass) of padded sequences.

    Args:
      qs, ks: parts of the scores, [B, T, N, P] and [B, T, K, P] each.
      v: [B, T, K, H], or None.
      segments: int [B, T], or None.
    """
    batch, length, heads, _ = qs[0].shape
    group = heads // ks[0].shape[2]
    blocks = options.forward
    values = ks[0] if v is None else v
    tiles = length // blocks.queries
    queries = by_tile(blocks.queries, tiles)
    keys = by_head(length, group)
    ranges = options.ranges(blocks, qs[0], segments)
    out = jax.ShapeDtypeStruct((*qs[0].shape[:3], values.shape[-1]), qs[0].dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    call = pallas(
        functools.partial(_forward_kernel, options, options.masked_ends(length, segments)),
        "attention_forward",
        options.interpret,
        blocks,
        grid=(tiles, batch, heads),
        in_specs=tile.block_specs(
            (ranges, range_of_tile(tiles)),
            (qs, queries),
            (ks, keys),
            (v, keys),
            (segments, whole_sequence),
        ),
        out_specs=[queries(out), row_numbers(blocks.queries, tiles)(lse)],
        out_shape=[out, lse],
    )
    out, lse = call(ranges, qs, ks, v, segments)
    return out, (qs, ks, v, segments, out, lse)


def _forward_kernel(options, masked_ends, tile_range, qs, ks, v, segments, out, lse):
    """Computes one tile of queries of one head; see the picture of this module."""
    blocks = options.forward
    q = [ref[...] for ref in qs]  # loaded once, held in registers
    rows = positions_of(last_first() * blocks.queries, blocks.queries, segments)

    def step(j, state, masked):
        at = pl.ds(j * blocks.keys, blocks.keys)
        k = [ref[at, :] for ref in ks]
        mask = None
        if masked:
            # Only here are positions and segments of the keys computed: most tiles are full.
            columns = positions_of(j * blocks.keys, blocks.keys, segments)
            mask = tile_mask(options, rows, columns)
        # With K = V nothing is loaded for the second product: it takes the key tile again.
        values = k[0] if v is None else v[at, :]
        return tile.accumulate(state, tile.scores(q, k), mask, [values], options.scale)

    start = tile.empty_state(blocks.queries, [out.shape[-1]])
    row_max, row_sum, [acc] = tile.walk(tile_range, step, start, masked_ends)
    # Rows that pad the sequence may see no key. Their sum is 0.
    row_sum = jnp.maximum(row_sum, 1e-30)
    out[...] = (acc / row_sum[:, None]).astype(out.dtype)
    lse[...] = row_max + jnp.log2(row_sum)


# ---- backward ---------------------------------------------------------------------------------


def _backward(options, residuals, d_out):
    qs, ks, v, segments, out, lse = residuals
    rest = segments, d_out, lse, tile.delta(out, d_out, options.scale)
    d_qs = triton_backward.queries_pass(options, qs, ks, v, *rest)
    d_ks, d_v = triton_backward.keys_pass(options, qs, ks, v, *rest)
    return d_qs, d_ks, d_v, None


_attend.defvjp(forward_pass, _backward)
