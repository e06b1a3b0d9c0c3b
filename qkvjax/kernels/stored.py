"""How a cache keeps its numbers: in int8 or as they are, in pages or in one piece a sequence, and
how keys are made of them where it keeps states.

A cached tensor is an array or an `Int8`. Letters: B sequences, S slots, K heads, H head width;
P pages of E slots, of which a block table int [B, n] names those of each sequence, in order.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

NORM_EPSILON = 1e-6  # of every RMSNorm


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
        # [B, K, n, E, ...]; for a page that is not there jax takes the last, which no one needs.
        taken = jnp.swapaxes(pages[table], 1, 2)
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


def merged(x: jax.Array) -> jax.Array:
    """[B, K, ...] as [B K, ...], without that axis where it has one row.

    A cache that one token changes in place is read in the very shape in which it is changed: for
    any other, be it without an axis of size 1, XLA's CPU copies all of it four times.
    """
    rows = x.shape[0] * x.shape[1]
    return x.reshape(x.shape[2:] if rows == 1 else (rows, *x.shape[2:]))


def _put(old, new, start, table):
    if table is None and jnp.ndim(start) == 0:
        flat, new = merged(old), merged(jnp.swapaxes(new, 1, 2))
        slots = 0 if old.shape[0] * old.shape[1] == 1 else 1
        return jax.lax.dynamic_update_slice_in_dim(flat, new, start, slots).reshape(old.shape)
    batch, length = new.shape[:2]
    slots = jnp.broadcast_to(jnp.reshape(start, (-1, 1)) + jnp.arange(length), (batch, length))
    row = jnp.arange(batch)[:, None]
    if table is None:
        return old.at[row, :, slots].set(new)
    size = old.shape[2]
    return old.at[table[row, slots // size], :, slots % size].set(new)


def turns(base: float, width: int, length: int, dtype) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [length, width / 2], of the angles by which rotary positions turn."""
    half = width // 2
    angles = jnp.arange(length, dtype=dtype)[:, None]
    angles = angles * base ** (-jnp.arange(half, dtype=dtype) / half)
    return jnp.cos(angles), jnp.sin(angles)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["gain", "turns"],
    meta_fields=["base", "width"],
)
@dataclasses.dataclass(frozen=True)
class KeyOfState:
    """How the key of slot s is made from the stored state: RMSNorm, then rotation by s.

    Attributes:
      base, width: of `attention.position.rotate`; the width is even, 0 without rotation.
      gain: [H] of the norm, or None without a norm.
      turns: of `turns`, where they were computed before; None means when they are needed.
    """

    base: float
    width: int
    gain: jax.Array | None = None
    turns: tuple[jax.Array, jax.Array] | None = None

    def at(self, length: int, dtype) -> tuple[jax.Array, jax.Array]:
        """(cos, sin) of slots 0, ..., length - 1."""
        return self.turns or turns(self.base, self.width, length, dtype)
