"""Attention that leaves the fusing to XLA: products in the given dtype, softmax in float32.

A causal sequence is cut into tiles of queries. Each tile is multiplied with all keys up to its own
last position, in one product; the pairs behind are never computed:

    keys          0 . . . . . . . S
    queries 0     # . . . . . . .      #  computed, then masked where needed
    queries 1     # # # . . . . .      .  skipped
    queries 2     # # # # # . . .
    queries 3     # # # # # # # #

Letters: B sequences, T query positions, S key positions, K key-value heads, G query heads for each
of them, N = K G, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# A causal sequence is computed in up to TILES tiles of queries, each with the keys that it can see:
# with four, 5/8 of the pairs are left. Tiles smaller than SMALLEST_TILE cost more than they save.
TILES = 4
SMALLEST_TILE = 64


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"] | None = None,
    *,
    mask: Bool[Array, "#B T S"],
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    q_pe: Float[Array, "B T N P"] | None = None,
    k_pe: Float[Array, "B S K P"] | None = None,
) -> Float[Array, "B T N _"]:
    """Computes what `reference.attention` does; arguments and result are described there."""
    if q_pe is not None:  # one longer dot product instead of two score tensors
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        v = k if v is None else v
        q = jnp.concatenate([q, q_pe], -1)
        k = jnp.concatenate([k, k_pe], -1)
    batch, length, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    q = q * jnp.asarray(scale, q.dtype)
    v = k if v is None else v
    # Heads first: XLA's CPU multiplies batches of matrices twice as fast where each matrix is
    # contiguous. A cache is stored so, and its transpositions cancel.
    q_BKGTH = q.transpose(0, 2, 1, 3).reshape(batch, k.shape[2], -1, length, width)
    k_BKSH = k.transpose(0, 2, 1, 3)
    v_BKSH = v.transpose(0, 2, 1, 3)
    outputs = [
        _attend_tile(
            q_BKGTH[..., rows, :],
            k_BKSH[:, :, columns],
            v_BKSH[:, :, columns],
            mask[:, rows, columns],
        )
        for rows, columns in tiles_of(length, causal, window)
    ]
    out = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)
    return out.reshape(batch, heads, length, v.shape[-1]).transpose(0, 2, 1, 3)


def tiles_of(length: int, causal: bool, window: int | None) -> list[tuple[slice, slice]]:
    """Returns the queries of each tile, and the keys that they are multiplied with.

    Without a causal mask there is one tile of all pairs.
    """
    if not causal:
        return [(slice(0, length), slice(0, length))]
    size = max(SMALLEST_TILE, -(-length // TILES))
    reach = window - 1 if window else length
    tiles = []
    for start in range(0, length, size):
        end = min(length, start + size)
        tiles.append((slice(start, end), slice(max(0, start - reach), end)))
    return tiles


def _attend_tile(q, k, v, mask):
    """Computes scores, softmax and weighted values of one tile of queries.

    Args:
      q: [B, K, G, T, H], scaled.
      k, v: [B, K, S, H].
      mask: bool [B or 1, T, S].

    Returns:
      [B, K, G, T, H].
    """
    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    group = q.shape[2]
    # A group of one head has no axis: that would cost XLA's CPU copies, 5 % of a small train step.
    g = "" if group == 1 else "g"
    q = q if g else q.reshape(*q.shape[:2], *q.shape[3:])
    scores = jnp.einsum(f"bk{g}th,bksh->bk{g}ts", q, k, preferred_element_type=accumulator)
    mask = mask[:, None, None] if g else mask[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(accumulator).min), axis=-1)
    out = jnp.einsum(f"bk{g}ts,bksh->bk{g}th", weights.astype(q.dtype), v)
    return out.reshape(*out.shape[:2], group, *out.shape[-2:])
