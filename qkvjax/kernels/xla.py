"""Attention that leaves the fusing to XLA: products in the given dtype, softmax in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(q, k, v=None, *, mask, scale=None, softcap=None, q_pe=None, k_pe=None) -> jax.Array:
    """The same as `reference.attention`; arguments and result are described there."""
    if q_pe is not None:  # one longer dot product instead of two score tensors
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        v = k if v is None else v
        q, k = jnp.concatenate([q, q_pe], -1), jnp.concatenate([k, k_pe], -1)
    batch, length, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    q_BTKGH = (q * jnp.asarray(scale, q.dtype)).reshape(batch, length, k.shape[2], -1, width)
    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k, preferred_element_type=accumulator)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(accumulator).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    values = k if v is None else v
    out = jnp.einsum("bkgts,bskh->btkgh", weights, values)
    return out.reshape(batch, length, heads, values.shape[-1])
