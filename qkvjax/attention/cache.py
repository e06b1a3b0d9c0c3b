"""The decode cache: contiguous, one or two tensors a layer.

A cache is a dict of arrays [B, K, S, H] with the keys of a layer's entries: {"k", "v"} in
layout "kv", {"kv"} in layout "shared". Slot s holds position s. Heads come first: what a head
reads for a token then lies in one piece, which is several times faster on a CPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qkvjax.attention.layer import Attention, Entry
from qkvjax.attention.spec import AttentionSpec
from qkvjax.kernels import dispatch


def empty(
    spec: AttentionSpec, batch: int, length: int, dtype=jnp.float32, layout: str | None = None
) -> Entry:
    """A cache of zeros; its bytes are batch * length * spec.cache_bytes_per_token exactly."""
    names = ("kv",) if spec.check_layout(layout) == "shared" else ("k", "v")
    shape = (batch, spec.num_kv_heads, length, spec.head_dim)
    return {name: jnp.zeros(shape, dtype) for name in names}


def num_bytes(cache) -> int:
    """Bytes of the arrays that are really there, over any tree of caches."""
    return sum(array.nbytes for array in jax.tree.leaves(cache))


def attend(
    layer: Attention, x, cache: Entry, start: jax.Array, *, impl: str = "auto"
) -> tuple[jax.Array, Entry]:
    """Attention of new tokens onto the cache, which they join.

    Args:
      layer: the attention layer.
      x: [B, T, D] the new tokens.
      cache: the layer's cache, with room behind `start`.
      start: int scalar, the position of the first new token.

    Returns:
      [B, T, D] and the cache with the new entries.
    """
    batch, length, _ = x.shape
    layout = "shared" if "kv" in cache else "kv"
    positions = jnp.broadcast_to(start + jnp.arange(length), (batch, length))
    q, entry = layer.project(x, positions, layout)
    cache = {
        name: jax.lax.dynamic_update_slice(
            cache[name], _turned(entry[name]).astype(cache[name].dtype), (0, 0, start, 0)
        )
        for name in cache
    }
    held = {name: _turned(array).astype(x.dtype) for name, array in cache.items()}
    slots = jnp.arange(next(iter(cache.values())).shape[2])
    key = layer.key_of_state() if layout == "shared" else None
    if key is None:
        k, v = layer.expand(held, slots[None])  # the same slots in each sequence
    elif dispatch.makes_keys(impl, key, layer.spec.head_dim):
        k, v = held["kv"], None
    else:
        k, v, key = _keys_by_head(layer, held["kv"], slots), held["kv"], None
    out = dispatch.decode_attention(
        q, k, v, positions=positions, window=layer.spec.window, key=key, impl=impl,
        **layer.columns(q, k, slots[None]),
    )  # fmt: skip
    return layer.finish(out, positions), cache


def _turned(array: jax.Array) -> jax.Array:
    """[B, S, K, H] <-> [B, K, S, H]."""
    return array.transpose(0, 2, 1, 3)


def _keys_by_head(layer: Attention, state: jax.Array, slots: jax.Array) -> jax.Array:
    """Keys of a shared state, both [B, S, K, H], where they do not depend on the head: heads count
    as sequences of `layer.expand`, so that the state is read as it is stored."""
    stored = _turned(state)
    batch, heads, length, width = stored.shape
    key, _ = layer.expand({"kv": stored.reshape(batch * heads, length, 1, width)}, slots[None])
    return _turned(key.reshape(stored.shape))
