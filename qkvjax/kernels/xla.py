"""Attention that leaves the fusing to XLA: products in the given dtype, softmax in float32.

Letters: B sequences, T query places, S key places, K key-value heads, G query heads for each of
them, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# A causal sequence is computed in up to so many tiles of queries, each against the keys it can
# see: of four, 5/8 of the pairs are left. Smaller tiles than this cost more than they save.
TILES, SMALLEST_TILE = 4, 64


def attention(
    q, k, v=None, *, mask, causal=False, window=None, scale=None, softcap=None, q_pe=None, k_pe=None
) -> jax.Array:
    """The same as `reference.attention`; arguments and result are described there."""
    if q_pe is not None:  # one longer dot product instead of two score tensors
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        v = k if v is None else v
        q, k = jnp.concatenate([q, q_pe], -1), jnp.concatenate([k, k_pe], -1)
    batch, length, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, length, k.shape[2], -1, width)
    # Heads first: XLA's CPU multiplies batches of matrices three times as fast when they lie whole.
    q_BKGTH = q.transpose(0, 2, 3, 1, 4)
    k_BKSH = k.transpose(0, 2, 1, 3)
    v_BKSH = k_BKSH if v is None else v.transpose(0, 2, 1, 3)
    size = max(SMALLEST_TILE, -(-length // TILES)) if causal else length
    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    tiles = []
    for start in range(0, length, size):
        first = max(0, start - window + 1) if causal and window else 0
        last = start + size if causal else k.shape[1]
        rows, seen = slice(start, start + size), slice(first, last)
        scores = jnp.einsum(
            "bkgth,bksh->bkgts", q_BKGTH[..., rows, :], k_BKSH[:, :, seen],
            preferred_element_type=accumulator,
        )  # fmt: skip
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        visible = mask[:, None, None, rows, seen]
        scores = jnp.where(visible, scores, jnp.finfo(accumulator).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        tiles.append(jnp.einsum("bkgts,bksh->bkgth", weights, v_BKSH[:, :, seen]))
    out = tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, v_BKSH.shape[-1])
