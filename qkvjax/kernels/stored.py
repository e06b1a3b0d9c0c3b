"""How a cache stores its numbers: as they are or in int8, contiguous or in pages; and how keys are
made from stored states.

A cached tensor is an array or an `Int8`. Contiguous, each sequence has its slots in one piece; in
pages, a block table says where they are:

    contiguous [B, K, S, H]             sequence 0: | slots 0 .............. S - 1 |

    pages [P, K, E, H]                  page 0      page 1      page 2      page 3
                                        | E slots | | E slots | | E slots | | E slots |
    block table [B, n] = [[2, 0], ...]  sequence 0: slots 0 ... E - 1 are page 2,
                                        slots E ... 2 E - 1 are page 0

Letters: B sequences, S slots, K heads, H head width; P pages of E slots, of which the block table
int [B, n] names those of each sequence, in order.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
# (cos, sin), each [positions, rotated width / 2].
Rotation = tuple[jax.Array, jax.Array]


# ---- int8 -------------------------------------------------------------------------------------


def quantize(x: Float[Array, "*lead H"]) -> Int8:
    """Returns x in int8, with the scale max |x| / 127 of its last axis, rounded to bfloat16.

    The error of a number is at most half a scale, for scales that bfloat16 holds with all its bits.
    """
    wide = x.astype(jnp.float32)
    scales = (jnp.max(jnp.abs(wide), axis=-1) / 127).astype(jnp.bfloat16)
    # Codes are made with the scale as it is stored. With the unrounded one, a number that is read
    # would be off by another 2^-9 of itself, a quarter of a scale at code 127.
    step = jnp.where(scales == 0, 1, scales).astype(jnp.float32)[..., None]
    codes = jnp.clip(jnp.round(wide / step), -127, 127)
    return Int8(codes.astype(jnp.int8), scales)


def widen(x: Stored, dtype) -> jax.Array:
    """Returns a cached tensor [..., H] in a floating dtype."""
    if not isinstance(x, Int8):
        return x.astype(dtype)
    return (x.codes.astype(jnp.float32) * x.scales.astype(jnp.float32)[..., None]).astype(dtype)


# ---- slots ------------------------------------------------------------------------------------


def in_order(x: Stored, table: Int[Array, "B n"] | None) -> Stored:
    """Returns pages [P, K, E, ...] as the sequences [B, K, n * E, ...] of the block table."""
    if table is None:
        return x

    def gather(pages):
        # A table names page P where a sequence needs no page. There jax reads the last page, whose
        # slots are masked.
        gathered = jnp.swapaxes(pages[table], 1, 2)  # [B, K, n, E, ...]
        return gathered.reshape(*gathered.shape[:2], -1, *gathered.shape[4:])

    return jax.tree.map(gather, x)


def write(
    x: Stored,
    new: Float[Array, "B T K H"],
    start: Int[Array, ""] | Int[Array, " B"],
    table: Int[Array, "B n"] | None,
) -> Stored:
    """Returns the cached tensor with new tokens in the slots from `start` on.

    Args:
      x: [B, K, S, H], or pages [P, K, E, H] with a block table.
      new: the tokens.
      start: the first token's slot, the same in every sequence or one for each.
      table: of a cache in pages; None for a contiguous one.
    """
    new = quantize(new) if isinstance(x, Int8) else new.astype(x.dtype)
    return jax.tree.map(lambda old, new: _put(old, new, start, table), x, new)


def merged(x: jax.Array) -> jax.Array:
    """Returns [B, K, ...] as [B K, ...], without that axis where it has one row.

    A cache that one token changes in place is read in the very shape in which it is changed: for
    any other, even one without an axis of size 1, XLA's CPU copies all of it four times.
    """
    rows = x.shape[0] * x.shape[1]
    return x.reshape(x.shape[2:] if rows == 1 else (rows, *x.shape[2:]))


def swap_slots_and_heads(tree):
    """Returns [B, S, K, ...] as [B, K, S, ...], and the reverse, for every array of a tree."""
    return jax.tree.map(lambda array: jnp.swapaxes(array, 1, 2), tree)


def _put(old, new, start, table):
    """Returns `old` [B, K, S, ...] or [P, K, E, ...] with `new` [B, T, K, ...] in it."""
    if table is None and jnp.ndim(start) == 0:
        # One slice for all sequences: XLA changes it in place.
        flat = merged(old)
        new = merged(jnp.swapaxes(new, 1, 2))
        slot_axis = 0 if old.shape[0] * old.shape[1] == 1 else 1
        updated = jax.lax.dynamic_update_slice_in_dim(flat, new, start, slot_axis)
        return updated.reshape(old.shape)
    batch, length = new.shape[:2]
    slots = jnp.broadcast_to(jnp.reshape(start, (-1, 1)) + jnp.arange(length), (batch, length))
    row = jnp.arange(batch)[:, None]
    if table is None:
        return old.at[row, :, slots].set(new)
    # A write to page P, which a table names where a sequence needs no page, is dropped.
    size = old.shape[2]
    return old.at[table[row, slots // size], :, slots % size].set(new)


# ---- keys of states ---------------------------------------------------------------------------


def rotation_table(base: float, width: int, length: int, dtype) -> Rotation:
    """Returns (cos, sin) of the rotary angles of positions 0, ..., length - 1.

    Args:
      base, width: of `attention.position.rotate`.

    Returns:
      Two arrays [length, width / 2].
    """
    half = width // 2
    angles = jnp.arange(length, dtype=dtype)[:, None]
    angles = angles * base ** (-jnp.arange(half, dtype=dtype) / half)
    return jnp.cos(angles), jnp.sin(angles)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["gain", "rotation"],
    meta_fields=["base", "width"],
)
@dataclasses.dataclass(frozen=True)
class KeyOfState:
    """How the key of slot s is made from the stored state: RMSNorm, then rotation to position s.

    Attributes:
      base, width: of `attention.position.rotate`; the width is even, 0 without rotation.
      gain: [H] of the norm, or None without a norm.
      rotation: of `rotation_table` for all slots, if it was computed before; None computes it
        when it is needed.
    """

    base: float
    width: int
    gain: jax.Array | None = None
    rotation: Rotation | None = None

    def at(self, length: int, dtype) -> Rotation:
        """Returns (cos, sin) of slots 0, ..., length - 1."""
        return self.rotation or rotation_table(self.base, self.width, length, dtype)
