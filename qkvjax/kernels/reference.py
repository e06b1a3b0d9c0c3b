"""The truth: attention as twenty lines of float32 einsum.

Every other implementation is tested against this one, forward and gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(
    q_positions: Int[Array, "#B T"],
    k_positions: Int[Array, "#B S"],
    *,
    causal: bool,
    window: int | None = None,
    q_segments: Int[Array, "#B T"] | None = None,
    k_segments: Int[Array, "#B S"] | None = None,
) -> Bool[Array, "#B T S"]:
    """Returns which keys each query sees.

    Args:
      q_positions: of the queries in their sequences.
      k_positions: of the keys.
      causal: a query sees only keys at or before its position.
      window: a query sees only keys fewer than `window` positions away; its own position counts.
      q_segments, k_segments: a query sees only keys of its own segment.
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    mask = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if window is not None:
        mask &= abs(distance) < window
    if q_segments is not None:
        mask &= q_segments[:, :, None] == k_segments[:, None, :]
    return mask


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
    """Computes softmax(scale (Q K^T + Q_pe K_pe^T)) V in float32 (Vaswani et al. 2017, equation 1).

    Args:
      q: queries.
      k: keys; each serves N / K query heads.
      v: values; None means that the keys are the values.
      mask: True where the query sees the key.
      causal: promises that T = S and that the mask hides key s from query t < s, so that an
        implementation may skip those pairs. This one does not.
      window: with causal, promises that the mask hides pairs at least `window` apart.
      scale: None means 1 / sqrt(H).
      q_pe, k_pe: a second part of the scores, added before scaling.

    Returns:
      [B, T, N, width of the values] in the dtype of q.
    """

    def wide(x):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def grouped(x):
        return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3])

    scores = jnp.einsum("btkgh,bskh->bkgts", grouped(wide(q)), wide(k))
    if q_pe is not None:
        scores += jnp.einsum("btkgp,bskp->bkgts", grouped(wide(q_pe)), wide(k_pe))
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    values = wide(k if v is None else v)
    out = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1), values)
    return out.reshape(*q.shape[:3], values.shape[-1]).astype(q.dtype)
