"""Decoding that leaves the fusing to XLA: a few new tokens onto a whole cache.

Where the cache holds states, keys are never written. Each query is rotated to each slot instead:

    q . R_s x  =  (R_-s q) . x            x the state of slot s, R_s its rotation

    cache [S, H]  -- read once -->  scores [R, S] --> softmax --> weights [R, S] -- cache --> out
                                    ^
    queries [R, H], rotated to slot s inside the sum over H

Letters: B sequences, T new tokens, S slots, N query heads, K key-value heads, G = N / K, H head
width, R = G T rows of a key-value head.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qkvjax.kernels.rows import packed, unpacked
from qkvjax.kernels.stored import NORM_EPSILON, KeyOfState, merged

# Up to so many rows of queries (G T) it pays to rotate them to each state. For more, as a prompt
# has, keys are better made first (`dispatch.makes_keys`).
FEW = 8


def decode(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"] | None = None,
    *,
    mask: Bool[Array, "#B T S"],
    key: KeyOfState | None = None,
    scale: float | None = None,
    q_pe: Float[Array, "B T N P"] | None = None,
    k_pe: Float[Array, "B S K P"] | None = None,
) -> Float[Array, "B T N _"]:
    """Computes what `reference.attention` does; with `key`, k holds states that are the values.

    Rotating queries costs a CPU little more than reading the states. The norm of a key is one
    factor for each slot, and multiplies the scores.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def rows(x):  # [B, T, N, P] -> [B K, R, P]
        return merged(packed(x, kv_heads, length * group))

    def slots(x):  # [B, S, K, P] -> [B K, S, P], as a cache is stored
        return merged(x.swapaxes(1, 2))

    def product(queries, keys):
        return jnp.einsum(
            "...rh,...sh->...rs",
            queries,
            keys.astype(queries.dtype),
            preferred_element_type=wide,
        )

    states = slots(k)
    queries = rows(q)
    if key is None:
        scores = product(queries, states)
    else:
        scores = _scores_of_states(queries.astype(wide), states, key)
    if q_pe is not None:
        scores = scores + product(rows(q_pe), slots(k_pe))
    scores = scores * (width**-0.5 if scale is None else scale)
    mask = jnp.repeat(mask, group, axis=1)[:, None]
    mask = merged(jnp.broadcast_to(mask, (batch, kv_heads, *mask.shape[2:])))
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(wide).min), axis=-1)
    values = states if v is None else slots(v)
    out = jnp.einsum("...rs,...sh->...rh", weights.astype(q.dtype), values.astype(q.dtype))
    return unpacked(out.reshape(batch, kv_heads, *out.shape[-2:]), length, heads)


def _scores_of_states(q, x, key: KeyOfState):
    """Returns unscaled scores [..., R, S] of queries [..., R, H] and states [..., S, H]; H is even.

    The rotated numbers of a head and the others are summed separately.
    """
    normed = key.gain is not None
    gain = key.gain.astype(q.dtype) if normed else jnp.ones(x.shape[-1], q.dtype)
    rotation = key.at(x.shape[-2], q.dtype) if key.width else None
    parts = [(slice(key.width), rotation), (slice(key.width, None), None)]
    sums = [
        _sums(q[..., part], x[..., part], gain[part], part_rotation, normed=normed)
        for part, part_rotation in parts
        if gain[part].size
    ]
    scores, squares = map(sum, zip(*sums))
    if not normed:
        return scores
    return scores * jax.lax.rsqrt(squares / x.shape[-1] + NORM_EPSILON)


def _sums(q, x, gain, rotation, normed: bool):
    """Returns q . R_s (gain x) and, where there is a norm, x . x: [..., R, S] each.

    With c and s the cosines and sines of slot and frequency, halves a and b, gain g,

        q . R_s (g x) = sum c (q_a g_a x_a + q_b g_b x_b) + s (q_b g_a x_a - q_a g_b x_b)

    Always two sums at a time, over 4 lanes each: XLA's CPU fuses a pair of sums with the products
    that they add, and writes those of a single sum to memory.
    """
    half = x.shape[-1] // 2
    lanes = math.gcd(half, 4)

    def pieces(array):
        return array.astype(q.dtype).reshape(*array.shape[:-1], -1, lanes)

    def halves(array):
        return map(pieces, jnp.split(array, 2, axis=-1))

    # A matrix product and not a plain factor: XLA would fuse the factor with the sum, and multiply
    # again for each cached number.
    times_gain = functools.partial(jnp.matmul, b=jnp.diag(gain), precision="highest")
    rows = q[..., None, :]
    q_a, q_b = halves(times_gain(rows))
    a, b = halves(x[..., None, :, :])
    sums = q_a * a, q_b * b
    if rotation is not None:
        crossed_a, crossed_b = halves(times_gain(jnp.roll(rows, half, -1)))
        cos, sin = map(pieces, rotation)
        sums = cos * sum(sums), sin * (crossed_a * a - crossed_b * b)
    if normed:
        sums = sum(sums), jnp.broadcast_to(a * a + b * b, sums[0].shape)
    zero = jnp.zeros((), q.dtype)
    axis = sums[0].ndim - 2
    for _ in range(2):  # over the pieces; then over the lanes, which have moved to their axis
        sums = jax.lax.reduce(sums, (zero, zero), lambda x, y: tuple(map(jnp.add, x, y)), (axis,))
    return sums if normed else (sum(sums), 0)
