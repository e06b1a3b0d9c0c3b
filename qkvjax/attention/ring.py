"""The ring cache of a layer with a window of W tokens: it has W slots, and no more.

Slot s holds the newest position that is s modulo W. With W = 4, after positions 0 to 5:

    slot        0   1   2   3
    position    4   5   2   3        the window of position 5 is 2, 3, 4, 5: all slots

One new token (position 6) replaces the one that its query no longer sees (2), and then sees every
slot. Several new tokens would push out what the first of them still see. So they attend to a line
of the old tokens and themselves in the order of positions, and join the ring afterwards:

    ring (old)    4   5   2   3        new    6   7   8
    line          2   3   4   5   6   7   8           attention with a window of W
    ring (new)    8   5   6   7

Letters: B sequences, T new tokens, N query heads, K key-value heads, H head width, W slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qkvjax.attention.layer import Attention, Cache, Entry
from qkvjax.kernels import dispatch, stored
from qkvjax.kernels.stored import Int8, Stored, swap_slots_and_heads, widen, write


def attend(
    layer: Attention, q, entry: Entry, cache: Cache, positions, start, impl: str
) -> tuple[jax.Array, Cache]:
    """Computes attention of new tokens onto a ring, which they join.

    Args:
      q: [B, T, N, H] queries.
      entry: of the new tokens.
      cache: the ring.
      positions: int [B, T] of the new tokens.
      start: int scalar or [B], the first of them.
      impl: what computes it.

    Returns:
      (attention's output [B, T, N, H], the ring with the new tokens).
    """
    size = next(iter(cache.values())).shape[2]
    length = q.shape[1]
    start = jnp.broadcast_to(start, q.shape[:1])
    slots = jnp.arange(size)
    # `query_slots` and `key_positions` say where queries and keys are: queries in the order of the
    # keys' slots, for the mask, and keys in the order of positions, for their rotation.
    if length == 1:
        cache = {name: write(cache[name], entry[name], start % size, None) for name in cache}
        read = cache
        window = None  # the ring holds nothing older
        # Slots that were not written yet come behind the query's position, and are masked.
        query_slots = positions
        key_positions = positions - (positions - slots) % size
    else:
        read = {name: _in_line(cache[name], entry[name], start) for name in cache}
        cache = {name: _into_ring(cache[name], entry[name], start) for name in cache}
        window = size
        first = jnp.maximum(start - size, 0)[:, None]
        query_slots = positions - first
        key_positions = first + jnp.arange(size + length)
    key_positions = jnp.maximum(key_positions, 0)
    k = read.get("kv", read.get("k"))
    v = read.get("v")
    if "kv" in read and not layer.spec.values_are_keys:  # keys are made from the states first
        v = widen(k, q.dtype)
        made = layer.expand({"kv": swap_slots_and_heads(v)}, key_positions)[0]
        k = swap_slots_and_heads(made)
    num_kv_heads = k.shape[1]
    out = dispatch.decode_attention(
        q,
        swap_slots_and_heads(k),
        swap_slots_and_heads(v),
        positions=query_slots,
        window=window,
        impl=impl,
        **layer.columns(q, key_positions, num_kv_heads),
    )
    return out, cache


def _in_line(ring: Stored, new: jax.Array, start: jax.Array) -> Stored:
    """Returns the tokens of a ring and T new ones in the order of positions, [B, K, W + T, ...].

    Slot j holds position max(start - W, 0) + j; those behind the new tokens hold anything.

    Args:
      ring: [B, K, W, H], before the new tokens are written.
      new: [B, T, K, H].
      start: int [B], the position of the first new token.
    """
    size = ring.shape[2]
    length = new.shape[1]
    new = stored.quantize(new) if isinstance(ring, Int8) else new.astype(ring.dtype)
    positions = jnp.maximum(start - size, 0)[:, None] + jnp.arange(size + length)
    # Where each position is in [ring, new tokens].
    of_new = size + jnp.minimum(positions - start[:, None], length - 1)
    source = jnp.where(positions < start[:, None], positions % size, of_new)

    def line(old, new):
        joined = jnp.concatenate([old, jnp.swapaxes(new, 1, 2)], axis=2)
        shape = (*source.shape, *(1 for _ in old.shape[3:]))
        return jnp.take_along_axis(joined, source.reshape(shape)[:, None], axis=2)

    return jax.tree.map(line, ring, new)


def _into_ring(ring: Stored, new: jax.Array, start: jax.Array) -> Stored:
    """Returns the ring with the last W of the new tokens in it; arguments as in `_in_line`."""
    size = ring.shape[2]
    length = new.shape[1]
    kept = min(size, length)
    new = new[:, length - kept :]
    new = stored.quantize(new) if isinstance(ring, Int8) else new.astype(ring.dtype)
    slots = (start[:, None] + jnp.arange(length - kept, length)) % size
    row = jnp.arange(len(start))[:, None]
    return jax.tree.map(lambda old, new: old.at[row, :, slots].set(new), ring, new)
