"""The truth: attention as twenty lines of float32 einsum.

Every other implementation is tested against this one, forward and gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def visible(
    q_positions: jax.Array,
    k_positions: jax.Array,
    *,
    causal: bool,
    window: int | None = None,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
) -> jax.Array:
    """Which keys each query sees: bool [B or 1, T, S].

    Args:
      q_positions: int [B or 1, T], places of the queries in the sequence.
      k_positions: int [B or 1, S], places of the keys.
      causal: only keys at or before the query.
      window: only keys fewer than `window` places away (the query's own place counts).
      q_segments, k_segments: int [B, T] and [B, S]; queries see keys of their own segment.
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    mask = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if window is not None:
        mask &= abs(distance) < window
    if q_segments is not None:
        mask &= q_segments[:, :, None] == k_segments[:, None, :]
    return mask


def attention(
    q, k, v=None, *, mask, causal=False, window=None, scale=None, softcap=None, q_pe=None, k_pe=None
) -> jax.Array:
    """softmax(scale (Q K^T + Q_pe K_pe^T)) V in float32 (Vaswani et al. 2017, equation 1).

    Args:
      q: [B, T, N, H] queries.
      k: [B, S, K, H] keys; each serves N / K query heads.
      v: [B, S, K, H'] values; None means that the keys are the values.
      mask: bool [B or 1, T, S], True where the query sees the key.
      causal: promises that T = S and that the mask hides key s from query t < s, so that an
        implementation may skip those pairs (this one does not).
      window: with causal, promises the same of pairs at least `window` apart.
      scale: None means 1 / sqrt(H).
      softcap: scores become softcap * tanh(scores / softcap).
      q_pe, k_pe: [B, T, N, P] and [B, S, K, P], added to the scores before scaling.

    Returns:
      [B, T, N, H'] in the dtype of q.
    """
    f32 = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
    group = lambda x: x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3])  # noqa: E731
    scores = jnp.einsum("btkgh,bskh->bkgts", group(f32(q)), f32(k))
    if q_pe is not None:
        scores += jnp.einsum("btkgp,bskp->bkgts", group(f32(q_pe)), f32(k_pe))
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    values = f32(k if v is None else v)
    out = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1), values)
    return out.reshape(*q.shape[:3], values.shape[-1]).astype(q.dtype)
