"""Decoding that leaves the fusing to XLA: a few new tokens onto a whole cache.

Letters: B sequences, T new tokens, S slots, N query heads, K key-value heads, G = N / K, H head
width, R = G T rows of a key-value head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qkvjax.kernels.stored import KeyOfState, merged


def decode(
    q, k, v=None, *, mask, key: KeyOfState | None = None, scale=None, q_pe=None, k_pe=None
) -> jax.Array:
    """As `reference.attention`; with `key`, k holds states that are the values.

    Keys of states are left in pieces, so that nothing is concatenated, and the norm's factor
    multiplies the scores, one number for each slot instead of H: three times as fast on a CPU as
    keys that are made first.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def rows(x):  # [B, T, N, P] -> [B K, R, P]
        x = x.reshape(batch, length, kv_heads, -1, x.shape[-1]).transpose(0, 2, 3, 1, 4)
        return merged(x.reshape(batch, kv_heads, -1, x.shape[-1]))

    def slots(x):  # [B, S, K, P] -> [B K, S, P], as a cache lies
        return merged(x.swapaxes(1, 2))

    def product(part, key):
        return jnp.einsum(
            "...rh,...sh->...rs", part, key.astype(part.dtype), preferred_element_type=wide
        )

    held = slots(k)
    if key is None:
        scores = product(rows(q), held)
    else:
        scores = _onto_states(rows(q), held, key, product, wide)
    if q_pe is not None:
        scores = scores + product(rows(q_pe), slots(k_pe))
    scores = scores * (width**-0.5 if scale is None else scale)
    mask = jnp.broadcast_to(mask[:, None, None], (batch, kv_heads, 1, *mask.shape[1:]))
    seen = merged(jnp.tile(mask[:, :, 0], (1, 1, heads // kv_heads, 1)))
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(wide).min), axis=-1)
    values = held if v is None else slots(v)
    out = jnp.einsum("...rs,...sh->...rh", weights.astype(q.dtype), values.astype(q.dtype))
    out = out.reshape(batch, kv_heads, -1, length, out.shape[-1])
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


def _onto_states(q, x, key: KeyOfState, product, wide):
    """Unscaled scores [..., R, S] of queries [..., R, H] and states [..., S, H]."""
    width, half = x.shape[-1], key.width // 2

    def split(array):
        return jnp.split(array, [half, key.width], axis=-1)

    a, b, rest = split(x)
    gains = split(jnp.ones(width, wide) if key.gain is None else key.gain.astype(wide))
    keys = [rest * gains[2]]
    if half:
        cos, sin = key.at(x.shape[-2], wide)
        keys = [
            a * (gains[0] * cos) - b * (gains[1] * sin),
            b * (gains[1] * cos) + a * (gains[0] * sin),
            *keys,
        ]
    queries = split(q) if half else [q]
    scores = sum(product(*pair) for pair in zip(queries, keys) if pair[0].shape[-1])
    if key.gain is None:
        return scores
    squares = jnp.mean(x.astype(wide) ** 2, axis=-1)
    return scores * jax.lax.rsqrt(squares + key.epsilon)[..., None, :]
