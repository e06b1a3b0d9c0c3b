"""The decode cache: one or two tensors a layer, contiguous or in pages, also in int8.

A layer's cache is a dict of `kernels.stored` tensors with the keys of a layer's entries:
{"k", "v"} in layout "kv", {"kv"} in layout "shared". Contiguous ones are [B, K, S, H], and slot s
holds position s. In pages they are [P, K, E, H], and a block table says which pages hold a
sequence; all layers share the table. Heads come before slots: what a head reads for a token is
then contiguous, which is several times faster on a CPU.

A layer that sees a window of W tokens keeps W slots, a ring (`attention.ring`). A cache in pages
has no rings: it keeps all tokens, because pages are handed out for all layers at once.

Over a mesh, sequences are sharded over the axes of "batch" where these divide their number, and
heads over those of "heads". Where these do not divide K, heads are repeated until they do
(`rules.spread_heads`), so that a device keeps the few heads that its queries read. What follows
the projections then needs nothing from other devices. A pool of pages is sharded like the sequences
that it serves, and a block table names pages of the part of the pool on the device of its sequence.

Letters: B sequences, T new tokens, S slots, D model width, N query heads, K key-value heads, H head
width; P pages of E slots, n pages of a sequence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qkvjax.attention import ring
from qkvjax.attention.layer import Attention, Cache, Entry
from qkvjax.attention.spec import AttentionSpec
from qkvjax.errors import UserError
from qkvjax.kernels import dispatch, stored
from qkvjax.kernels.stored import (
    Int8,
    KeyOfState,
    Rotation,
    Stored,
    in_order,
    swap_slots_and_heads,
    widen,
    write,
)
from qkvjax.parallel import local, placed, rules

# (base, width) of a rotation -> its (cos, sin) of every slot.
Rotations = dict[tuple[float, int], Rotation]


# ---- an empty cache ---------------------------------------------------------------------------


def empty(
    spec: AttentionSpec,
    batch: int,
    length: int,
    dtype=jnp.float32,
    layout: str | None = None,
    sequences: int | None = None,
) -> Cache:
    """Returns a cache of zeros.

    It has batch * spec.cache_bytes(length) bytes where no mesh repeats heads; in pages, those of
    batch * length tokens.

    Args:
      batch, length: sequences and tokens of each, or pages and slots of each.
      dtype: of a float, or int8.
      layout: "kv" or "shared"; None means the smallest one.
      sequences: of a cache in pages, how many sequences it serves; None for a contiguous one.
    """
    names = ("kv",) if spec.check_layout(layout) == "shared" else ("k", "v")
    slots = spec.cache_slots(length) if sequences is None else length
    shape = (batch, rules.num_spread_heads(spec.num_kv_heads), slots, spec.head_dim)
    sharding = rules.cache_spec(batch if sequences is None else sequences)

    def zeros(shape, dtype):
        return jnp.zeros(shape, dtype, out_sharding=sharding)

    def tensor() -> Stored:
        if jnp.dtype(dtype) != jnp.int8:
            return zeros(shape, dtype)
        return Int8(zeros(shape, jnp.int8), zeros(shape[:-1], jnp.bfloat16))

    return {name: tensor() for name in names}


def num_bytes(cache) -> int:
    """Returns the bytes of the arrays of a tree of caches that exist, over all devices."""
    return sum(placed.allocated_bytes(array) for array in jax.tree.leaves(cache))


def block_table(lengths: Sequence[int], page_size: int, num_pages: int) -> np.ndarray:
    """Returns pages for sequences of these lengths, int32 [B, n], handed out in order.

    n is what the longest needs. What a shorter one does not need names page `num_pages`, which does
    not exist: what is written to it is dropped.

    Raises:
      UserError: the pool has too few pages.
    """
    needed = [-(-length // page_size) for length in lengths]
    if sum(needed) > num_pages:
        raise UserError(
            f"sequences of {', '.join(f'{n:,}' for n in lengths[:8])} tokens need {sum(needed):,}"
            f" pages of {page_size}, and the pool has {num_pages:,}: give it more, or decode fewer"
            " sequences at a time"
        )
    table = np.full((len(lengths), max(needed)), num_pages, np.int32)
    ends = np.cumsum(needed)
    for row, end, count in zip(table, ends, needed, strict=True):
        row[:count] = np.arange(end - count, end)
    return table


# ---- a loop over tokens -----------------------------------------------------------------------


def rotations(layers: Sequence[AttentionSpec], num_slots: int) -> Rotations:
    """Returns the rotations of the layers whose keys are made from stored states, computed once.

    Inside a loop over tokens XLA would compute sines and cosines anew for every cached number.
    """
    kinds = {
        (spec.rotary_base, spec.rotary_dim)
        for spec in layers
        if spec.rope
        and spec.shares_kv
        and not spec.values_are_keys
        and (spec.window is None or spec.window > num_slots)  # a ring's slots hold other positions
    }
    return {kind: stored.rotation_table(*kind, num_slots, jnp.float32) for kind in kinds}


def carried(cache, table: jax.Array | None = None):
    """Returns a tree of caches as a loop over tokens should carry it, to be changed in place."""
    if table is not None:
        return cache
    return jax.tree.map(local.merged if rules.has_mesh() else stored.merged, cache)


def restored(cache, like):
    """Returns what `carried` returned, in the shapes of `like` again."""

    def restore(array, like):
        if array.shape == like.shape:
            return array
        return local.unmerged(array, like) if rules.has_mesh() else array.reshape(like.shape)

    return jax.tree.map(restore, cache, like)


# ---- new tokens -------------------------------------------------------------------------------


def attend(
    layer: Attention,
    x: Float[Array, "B T D"],
    cache: Cache,
    start: Int[Array, ""] | Int[Array, " B"],
    *,
    table: Int[Array, "B n"] | None = None,
    rotations: Rotations | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Computes attention of new tokens onto the cache, which they join.

    Args:
      layer: the attention layer.
      x: [B, T, D] the new tokens.
      cache: the layer's cache, with room behind `start`.
      start: int, the position of the first new token, or [B] of each sequence's.
      table: the block table int [B, n] of a cache in pages.
      rotations: of `rotations`, for a loop over tokens; None computes what is needed.
      impl: what computes it, see `kernels.dispatch`; None means the spec's.

    Returns:
      [B, T, D] and the cache with the new entries.
    """
    shape = x.shape[:2]
    layout = "shared" if "kv" in cache else "kv"
    positions = jnp.reshape(start, (-1, 1)) + jnp.arange(shape[1])
    positions = rules.shard_rows_like(jnp.broadcast_to(positions, shape), x)
    q, entry = layer.project(x, positions, layout)
    entry = {name: rules.spread_heads(entry[name], layer.spec.num_heads) for name in cache}
    first = start if jnp.ndim(start) == 0 else positions[:, 0]
    table = None if table is None else rules.shard_rows_like(table, x)
    # From here to the output projection each device works on its own sequences and heads.
    out, cache = local.map_shards(
        functools.partial(_attend_shard, impl=impl or layer.spec.implementation),
        (q, cache),
        layer.with_spread_heads(),
        q,
        entry,
        cache,
        positions,
        first,
        table,
        rotations,
    )
    return layer.finish(out, positions), cache


def _attend_shard(
    layer: Attention,
    q,
    entry: Entry,
    cache: Cache,
    positions,
    start,
    table,
    rotations: Rotations | None,
    *,
    impl: str,
):
    """Returns (attention's output [B, T, N, H], the cache), on one device's part of all arrays."""
    if table is None and cache_slots(cache) == layer.spec.window:
        return ring.attend(layer, q, entry, cache, positions, start, impl)
    cache = {name: write(cache[name], entry[name], start, table) for name in cache}
    k = cache.get("kv", cache.get("k"))
    v = cache.get("v")
    num_kv_heads = k.shape[1]
    page = None if table is None else k.shape[2]
    slots = jnp.arange(k.shape[2] * (1 if table is None else table.shape[1]))
    key = None
    if "kv" in cache and not layer.spec.values_are_keys:
        key = layer.key_of_state()
        if key and dispatch.makes_keys(impl, q, num_kv_heads, key, page):
            # The kernel makes keys while it reads the states.
            known = (rotations or {}).get((key.base, key.width))
            key = dataclasses.replace(key, rotation=known)
        else:
            # The states are put in order, and all their keys are made, before the kernel starts.
            v = widen(in_order(k, table), q.dtype)
            k = _keys_of_states(layer, v, slots, key)
            table = key = None
    out = dispatch.decode_attention(
        q,
        swap_slots_and_heads(k),
        swap_slots_and_heads(v),
        positions=positions,
        window=layer.spec.window,
        key=key,
        table=table,
        impl=impl,
        **layer.columns(q, slots[None], num_kv_heads),
    )
    return out, cache


def _keys_of_states(layer: Attention, states, slots, key: KeyOfState | None):
    """Returns the keys [B, K, S, H] of states [B, K, S, H].

    Args:
      slots: int [S].
      key: of `layer.key_of_state`.
    """
    # Where keys do not depend on the head, heads count as sequences: the states are then read in
    # the order in which they are stored.
    lead = states.shape[:2] if key is None else (-1, 1)
    by_row = states.reshape(*lead, *states.shape[2:])
    keys, _ = layer.expand({"kv": swap_slots_and_heads(by_row)}, slots[None])
    return swap_slots_and_heads(keys).reshape(states.shape)


def cache_slots(cache: Cache) -> int:
    """Returns the slots of each sequence of a contiguous cache, or of each page."""
    return next(iter(cache.values())).shape[2]
