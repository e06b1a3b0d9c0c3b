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
    q = q * jnp.asarray(scale, q.dtype)
    v = k if v is None else v
    # Heads first: XLA's CPU multiplies batches of matrices twice as fast when they lie whole. A
    # cache is stored so, and its transpositions cancel.
    q_BKGTH = q.transpose(0, 2, 1, 3).reshape(batch, k.shape[2], -1, length, width)
    k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (k, v))
    tiles = []
    for rows, seen in tiles_of(length, causal, window):
        tile = q_BKGTH[..., rows, :], k_BKSH[:, :, seen], v_BKSH[:, :, seen], mask[:, rows, seen]
        tiles.append(_attend(*tile, softcap))
    out = tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=3)
    return out.reshape(batch, heads, length, v.shape[-1]).transpose(0, 2, 1, 3)


def tiles_of(length: int, causal: bool, window: int | None) -> list[tuple[slice, slice]]:
    """The queries of each tile and the keys it is computed with; none is skipped unless causal."""
    if not causal:
        return [(slice(0, length), slice(0, length))]
    size = max(SMALLEST_TILE, -(-length // TILES))
    starts, behind = range(0, length, size), window - 1 if window else length
    ends = [min(length, start + size) for start in starts]
    return [(slice(a, b), slice(max(0, a - behind), b)) for a, b in zip(starts, ends)]


def _attend(q, k, v, mask, softcap):
    """Scores, softmax and values of scaled queries [B, K, G, T, H] and keys [B, K, S, H].

    A group of one has no axis: it would cost XLA's CPU copies, 5 % of a small train step.
    """
    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    group, g = q.shape[2], "" if q.shape[2] == 1 else "g"
    q = q if g else q.reshape(*q.shape[:2], *q.shape[3:])
    scores = jnp.einsum(f"bk{g}th,bksh->bk{g}ts", q, k, preferred_element_type=accumulator)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = mask[:, None, None] if g else mask[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(accumulator).min), axis=-1)
    out = jnp.einsum(f"bk{g}ts,bksh->bk{g}th", weights.astype(q.dtype), v)
    return out.reshape(*out.shape[:2], group, *out.shape[-2:])
