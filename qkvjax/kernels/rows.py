"""New tokens of all query heads of a key-value head as the rows of one matrix, for decoding.

Letters: B sequences, T new tokens, N query heads, K key-value heads, G = N / K, H head width,
R >= G T rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def packed(x: jax.Array, kv_heads: int, rows: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, R, H], zeros behind the tokens."""
    batch, length, heads, width = x.shape
    group = heads // kv_heads
    x = x.reshape(batch, length, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
    x = x.reshape(batch, kv_heads, length * group, width)
    return jnp.pad(x, [(0, 0), (0, 0), (0, rows - length * group), (0, 0)])


def unpacked(x: jax.Array, length: int, heads: int) -> jax.Array:
    """[B, K, R, H] -> [B, T, N, H]."""
    batch, kv_heads, _, width = x.shape
    group = heads // kv_heads
    x = x[:, :, : length * group].reshape(batch, kv_heads, length, group, width)
    return x.transpose(0, 2, 1, 3, 4).reshape(batch, length, heads, width)


def places(positions: jax.Array, group: int, rows: int) -> jax.Array:
    """Positions int [B, T] of the rows, int32 [B, R]."""
    found = jnp.repeat(positions.astype(jnp.int32), group, axis=1)
    return jnp.pad(found, [(0, 0), (0, rows - found.shape[1])], mode="edge")


def spans(positions: jax.Array, window: int | None, size: int) -> jax.Array:
    """As `tile.spans`, which tiles of `size` slots tokens at int [B, T] see: int32 [B, 4]."""
    first, last = jnp.min(positions, axis=1), jnp.max(positions, axis=1)
    up = lambda slots: -(-slots // size)  # noqa: E731
    end, rest = up(last + 1), (first + 1) // size
    begin = whole = jnp.zeros_like(end)
    if window is not None:
        begin = jnp.maximum(first - window + 1, 0) // size
        whole = up(jnp.maximum(last - window + 1, 0))
    whole = jnp.clip(whole, begin, end)
    return jnp.stack([begin, whole, jnp.clip(rest, whole, end), end], axis=1).astype(jnp.int32)
