"""Decoding that leaves the fusing to XLA: a few new tokens onto a whole cache.

Letters: B sequences, T new tokens, S slots, N query heads, K key-value heads, G = N / K, H head
width, R = G T rows of a key-value head.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from qkvjax.kernels.rows import packed, unpacked
from qkvjax.kernels.stored import NORM_EPSILON, KeyOfState, merged

# Up to so many rows of queries (G T) it pays to turn them to each state; for more, as a prompt has,
# keys are better made first (`dispatch.makes_keys`).
FEW = 8


def decode(
    q, k, v=None, *, mask, key: KeyOfState | None = None, scale=None, q_pe=None, k_pe=None
) -> jax.Array:
    """As `reference.attention`; with `key`, k holds states that are the values.

    Keys of states are never written: inside the sum each query is turned to each slot instead,
    q R_s x = (R_-s q) x, which costs a CPU little more than reading x. The norm's factor, one
    number for each slot, multiplies the scores.
    """
    batch, length, heads, width = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def rows(x):  # [B, T, N, P] -> [B K, R, P]
        return merged(packed(x, kv_heads, length * group))

    def slots(x):  # [B, S, K, P] -> [B K, S, P], as a cache lies
        return merged(x.swapaxes(1, 2))

    def product(part, key):
        return jnp.einsum(
            "...rh,...sh->...rs", part, key.astype(part.dtype), preferred_element_type=wide
        )

    held, asking = slots(k), rows(q)
    scores = product(asking, held) if key is None else _onto_states(asking.astype(wide), held, key)
    if q_pe is not None:
        scores = scores + product(rows(q_pe), slots(k_pe))
    scores = scores * (width**-0.5 if scale is None else scale)
    mask = jnp.repeat(mask, group, axis=1)[:, None]
    seen = merged(jnp.broadcast_to(mask, (batch, kv_heads, *mask.shape[2:])))
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(wide).min), axis=-1)
    values = held if v is None else slots(v)
    out = jnp.einsum("...rs,...sh->...rh", weights.astype(q.dtype), values.astype(q.dtype))
    return unpacked(out.reshape(batch, kv_heads, *out.shape[-2:]), length, heads)


def _onto_states(q, x, key: KeyOfState):
    """Unscaled scores [..., R, S] of queries [..., R, H] and states [..., S, H]; H is even."""
    gain = jnp.ones(x.shape[-1], q.dtype) if key.gain is None else key.gain.astype(q.dtype)
    turns = key.at(x.shape[-2], q.dtype) if key.width else None
    found = [
        _sums(q[..., part], x[..., part], gain[part], turned, normed=key.gain is not None)
        for part, turned in ((slice(key.width), turns), (slice(key.width, None), None))
        if gain[part].size
    ]
    scores, squares = map(sum, zip(*found))
    if key.gain is None:
        return scores
    return scores * jax.lax.rsqrt(squares / x.shape[-1] + NORM_EPSILON)


def _sums(q, x, gain, turns, normed: bool):
    """q R_s (gain x) and, where there is a norm, x x: [..., R, S] each.

    With c and s the cosines and sines of slot and frequency, halves a and b, gain g,

        q R_s (g x) = sum c (q_a g_a x_a + q_b g_b x_b) + s (q_b g_a x_a - q_a g_b x_b)

    Always two sums at a time, over 4 lanes each: XLA's CPU fuses a pair of sums with what they add,
    and writes out what a single one adds.
    """
    half = x.shape[-1] // 2
    lanes = math.gcd(half, 4)

    def pieces(array):
        return array.astype(q.dtype).reshape(*array.shape[:-1], -1, lanes)

    def halves(array):
        return map(pieces, jnp.split(array, 2, axis=-1))

    # Products of matrices, since factors would be multiplied again for each cached number.
    scaled = functools.partial(jnp.matmul, b=jnp.diag(gain), precision="highest")
    rows = q[..., None, :]
    (q_a, q_b), (a, b) = halves(scaled(rows)), halves(x[..., None, :, :])
    sums = q_a * a, q_b * b
    if turns is not None:
        crossed_a, crossed_b = halves(scaled(jnp.roll(rows, half, -1)))
        cos, sin = map(pieces, turns)
        sums = cos * sum(sums), sin * (crossed_a * a - crossed_b * b)
    if normed:
        sums = sum(sums), jnp.broadcast_to(a * a + b * b, sums[0].shape)
    zero, axis = jnp.zeros((), q.dtype), sums[0].ndim - 2
    for _ in range(2):  # the pieces; then the lanes, which have moved to their axis
        sums = jax.lax.reduce(sums, (zero, zero), lambda x, y: tuple(map(jnp.add, x, y)), (axis,))
    return sums if normed else (sum(sums), 0)
