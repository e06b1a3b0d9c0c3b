"""How a cache keeps its numbers: in int8 or as they are, in pages or in one piece a sequence.

A cached tensor is an array or an `Int8`. Letters: B sequences, S slots, K heads, H head width;
P pages of E slots, of which a block table int [B, n] names those of each sequence, in order.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Int8(NamedTuple):
    """Numbers codes * scales, with one scale for each head of each slot.

    Attributes:
      codes: int8 [..., H].
      scales: bfloat16 [...].
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


Stored = jax.Array | Int8


def quantize(x: jax.Array) -> Int8:
    """[..., H] in int8, off by at most half a step of its block's largest number / 127."""
    wide = x.astype(jnp.float32)
    scales = (jnp.max(jnp.abs(wide), axis=-1) / 127).astype(jnp.bfloat16)
    step = jnp.where(scales == 0, 1, scales).astype(jnp.float32)[..., None]
    codes = jnp.clip(jnp.round(wide / step), -127, 127)
    return Int8(codes.astype(jnp.int8), scales)


def widen(x: Stored, dtype) -> jax.Array:
    """[..., H] in a floating dtype."""
    if not isinstance(x, Int8):
        return x.astype(dtype)
    return (x.codes.astype(jnp.float32) * x.scales.astype(jnp.float32)[..., None]).astype(dtype)


def in_order(x: Stored, table: jax.Array | None) -> Stored:
    """Pages [P, K, E, ...] as the sequences [B, K, n * E, ...] that the block table names."""
    if table is None:
        return x

    def gather(pages):
        taken = jnp.swapaxes(pages[table], 1, 2)  # [B, K, n, E, ...]
        return taken.reshape(*taken.shape[:2], -1, *taken.shape[4:])

    return jax.tree.map(gather, x)


def write(x: Stored, new: jax.Array, start: jax.Array, table: jax.Array | None) -> Stored:
    """The tensor with new tokens in the slots from `start` on.

    Args:
      x: [B, K, S, H], or pages [P, K, E, H] with a block table.
      new: [B, T, K, H].
      start: int, the first token's slot in every sequence, or [B] of them.
    """
    new = quantize(new) if isinstance(x, Int8) else new.astype(x.dtype)
    return jax.tree.map(lambda old, new: _put(old, new, start, table), x, new)


def _put(old, new, start, table):
    if table is None and jnp.ndim(start) == 0:
        at = (0, 0, start) + (0,) * (old.ndim - 3)
        return jax.lax.dynamic_update_slice(old, jnp.swapaxes(new, 1, 2), at)
    batch, length = new.shape[:2]
    slots = jnp.broadcast_to(jnp.reshape(start, (-1, 1)) + jnp.arange(length), (batch, length))
    row = jnp.arange(batch)[:, None]
    if table is None:
        return old.at[row, :, slots].set(new)
    size = old.shape[2]
    return old.at[table[row, slots // size], :, slots % size].set(new)
