"""The decode cache: one or two tensors a layer, contiguous or in pages, also in int8.

A layer's cache is a dict of `kernels.stored` tensors with the keys of a layer's entries:
{"k", "v"} in layout "kv", {"kv"} in layout "shared". Contiguous ones are [B, K, S, H], and slot s
holds position s. In pages they are [P, K, E, H], and a block table says which pages hold a
sequence; all layers share the table. Heads come before slots: what a head reads for a token then
lies in one piece, which is several times faster on a CPU.

A layer that sees a window of W tokens keeps W slots, a ring: slot s holds the newest position that
is s modulo W. A cache in pages has no rings: it keeps all tokens, as pages are handed out for all
layers at once.

Over a mesh, sequences are sharded over the axes of "batch" where these divide their number, and
heads over those of "heads": where K does not divide, heads are repeated until it does
(`rules.spread_heads`), so that a device keeps the few heads that its queries read. What follows
the projections then needs nothing of other devices. A pool of pages is sharded like the sequences
that it serves, and a block table names pages of the part of the pool that lies with its sequence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.attention.layer import Attention
from qkvjax.attention.spec import AttentionSpec
from qkvjax.errors import UserError
from qkvjax.kernels import dispatch, stored
from qkvjax.kernels.stored import Int8, Stored, in_order, widen, write
from qkvjax.parallel import local, placed, rules

Cache = dict[str, Stored]
# (base, width) of a rotation -> its (cos, sin) of every slot.
Turns = dict[tuple[float, int], tuple[jax.Array, jax.Array]]


def empty(
    spec: AttentionSpec,
    batch: int,
    length: int,
    dtype=jnp.float32,
    layout: str | None = None,
    sequences: int | None = None,
) -> Cache:
    """Makes a cache of zeros; its bytes are batch * spec.cache_bytes(length) exactly where no mesh
    repeats heads, and those of batch * length tokens in pages.

    Args:
      batch, length: sequences and tokens of each, or pages and slots of each.
      dtype: of a float, or int8.
      sequences: of a cache in pages, how many sequences it serves; None for a contiguous one.
    """
    names = ("kv",) if spec.check_layout(layout) == "shared" else ("k", "v")
    slots = spec.cache_slots(length) if sequences is None else length
    shape = (batch, rules.num_spread_heads(spec.num_kv_heads), slots, spec.head_dim)
    place = rules.cache_spec(batch if sequences is None else sequences)

    def zeros(shape, dtype):
        return jnp.zeros(shape, dtype, out_sharding=place)

    def tensor():
        if jnp.dtype(dtype) != jnp.int8:
            return zeros(shape, dtype)
        return Int8(zeros(shape, jnp.int8), zeros(shape[:-1], jnp.bfloat16))

    return {name: tensor() for name in names}


def num_bytes(cache) -> int:
    """Bytes of the arrays that are really there, over any tree of caches and over all devices."""
    return sum(placed.allocated_bytes(array) for array in jax.tree.leaves(cache))


def block_table(lengths: Sequence[int], page_size: int, num_pages: int) -> np.ndarray:
    """Pages for sequences of these lengths, int32 [B, n], handed out in order.

    n is what the longest needs; what a shorter one does not need names page `num_pages`, which is
    not there: what is written to it is dropped.

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


def turns(layers: Sequence[AttentionSpec], num_slots: int) -> Turns:
    """Angles of the layers whose keys are made of stored states, computed once.

    Inside a loop over tokens XLA would compute sines and cosines anew for every cached number.
    """
    wanted = {
        (spec.rotary_base, spec.rotary_dim)
        for spec in layers
        if spec.rope
        and spec.shares_kv
        and not spec.values_are_keys
        and (spec.window is None or spec.window > num_slots)  # a ring's slots hold other positions
    }
    return {key: stored.turns(*key, num_slots, jnp.float32) for key in wanted}


def carried(cache, table: jax.Array | None = None):
    """A tree of caches as a loop over tokens should carry it, to be changed in place."""
    if table is not None:
        return cache
    return jax.tree.map(local.merged if rules.has_mesh() else stored.merged, cache)


def restored(cache, like):
    """What `carried` gave, in the shapes of `like` again."""

    def whole(array, like):
        if array.shape == like.shape:
            return array
        return local.unmerged(array, like) if rules.has_mesh() else array.reshape(like.shape)

    return jax.tree.map(whole, cache, like)


def attend(
    layer: Attention,
    x,
    cache: Cache,
    start: jax.Array,
    *,
    table: jax.Array | None = None,
    turns: Turns | None = None,
    impl: str | None = None,
) -> tuple[jax.Array, Cache]:
    """Attention of new tokens onto the cache, which they join.

    Args:
      layer: the attention layer.
      x: [B, T, D] the new tokens.
      cache: the layer's cache, with room behind `start`.
      start: int, the position of the first new token, or [B] of each sequence's.
      table: the block table int [B, n] of a cache in pages.
      turns: of `turns`, for a loop over tokens; None computes what is needed.
      impl: what computes it, see `kernels.dispatch`; None means the spec's.

    Returns:
      [B, T, D] and the cache with the new entries.
    """
    shape, layout = x.shape[:2], "shared" if "kv" in cache else "kv"
    new = jnp.reshape(start, (-1, 1)) + jnp.arange(shape[1])
    positions = rules.shard_rows_like(jnp.broadcast_to(new, shape), x)
    q, entry = layer.project(x, positions, layout)
    entry = {name: rules.spread_heads(entry[name], layer.spec.num_heads) for name in cache}
    first = start if jnp.ndim(start) == 0 else positions[:, 0]
    table = None if table is None else rules.shard_rows_like(table, x)
    onto = functools.partial(_onto_cache, impl=impl or layer.spec.implementation)
    out, cache = local.map_shards(
        onto, (q, cache), layer.with_spread_heads(), q, entry, cache, positions, first, table, turns
    )
    return layer.finish(out, positions), cache


def _onto_cache(layer: Attention, q, entry, cache: Cache, positions, start, table, turns, *, impl):
    """`attend` between the projections: (attention's output [B, T, N, H], the cache)."""
    if table is None and cache_slots(cache) == layer.spec.window:
        return _onto_ring(layer, q, entry, cache, positions, start, impl)
    spec, layout = layer.spec, "shared" if "kv" in cache else "kv"
    cache = {name: write(cache[name], entry[name], start, table) for name in cache}
    k, v, held, key = cache.get("kv", cache.get("k")), cache.get("v"), table, None
    num_kv_heads = k.shape[1]
    page = None if table is None else k.shape[2]
    slots = jnp.arange(k.shape[2] * (1 if table is None else table.shape[1]))
    if layout == "shared" and not spec.values_are_keys:  # keys are made on read
        key, v = layer.key_of_state(), None
        if key and dispatch.makes_keys(impl, q, num_kv_heads, key, page):
            known = (turns or {}).get((key.base, key.width))
            key = dataclasses.replace(key, turns=known)
        else:
            v = widen(in_order(k, table), q.dtype)
            # Where keys do not depend on the head, heads count as sequences: v is read as it lies.
            split = v.shape[:2] if key is None else (-1, 1)
            made = layer.expand({"kv": _turned(v.reshape(*split, *v.shape[2:]))}, slots[None])[0]
            k, held, key = _turned(made).reshape(v.shape), None, None
    out = dispatch.decode_attention(
        q,
        _turned(k),
        _turned(v),
        positions=positions,
        window=spec.window,
        key=key,
        table=held,
        impl=impl,
        **layer.columns(q, slots[None], num_kv_heads),
    )
    return out, cache


def cache_slots(cache: Cache) -> int:
    """Slots of each sequence of a contiguous cache, or of each page."""
    return next(iter(cache.values())).shape[2]


def _onto_ring(layer: Attention, q, entry, cache: Cache, positions, start, impl):
    """`_onto_cache` for a layer whose window W is the number of its slots.

    One new token replaces the one that its query no longer sees, and then sees every slot that was
    written. Several tokens push out what the first of them still see: so they attend to the ring
    and themselves in the order of positions, and join the ring afterwards.
    """
    size, length = cache_slots(cache), q.shape[1]
    start = jnp.broadcast_to(start, q.shape[:1])
    slots = jnp.arange(size)
    if length == 1:
        cache = {name: write(cache[name], entry[name], start % size, None) for name in cache}
        seen, window = cache, None
        # Slots that were not written yet lie behind the query's position, and are hidden.
        query_slots, at = positions, positions - (positions - slots) % size
    else:
        seen = {name: _in_line(cache[name], entry[name], start) for name in cache}
        cache = {name: _into_ring(cache[name], entry[name], start) for name in cache}
        first = jnp.maximum(start - size, 0)[:, None]
        at, window = first + jnp.arange(size + length), size
        query_slots = positions - first
    at = jnp.maximum(at, 0)
    k, v = seen.get("kv", seen.get("k")), seen.get("v")
    if "kv" in seen and not layer.spec.values_are_keys:  # keys are made on read
        v = widen(k, q.dtype)
        k = _turned(layer.expand({"kv": _turned(v)}, at)[0])
    num_kv_heads = k.shape[1]
    out = dispatch.decode_attention(
        q,
        _turned(k),
        _turned(v),
        positions=query_slots,
        window=window,
        impl=impl,
        **layer.columns(q, at, num_kv_heads),
    )
    return out, cache


def _in_line(ring: Stored, new: jax.Array, start: jax.Array) -> Stored:
    """The tokens of a ring and T new ones in the order of positions, [B, K, W + T, ...].

    Slot j holds position max(start - W, 0) + j; those behind the new tokens hold anything.

    Args:
      ring: [B, K, W, H], before the new tokens are written.
      new: [B, T, K, H].
      start: int [B], the position of the first new token.
    """
    size, length = ring.shape[2], new.shape[1]
    new = stored.quantize(new) if isinstance(ring, Int8) else new.astype(ring.dtype)
    at = jnp.maximum(start - size, 0)[:, None] + jnp.arange(size + length)
    behind = size + jnp.minimum(at - start[:, None], length - 1)
    source = jnp.where(at < start[:, None], at % size, behind)

    def line(old, new):
        joined = jnp.concatenate([old, jnp.swapaxes(new, 1, 2)], axis=2)
        shape = (*source.shape, *(1 for _ in old.shape[3:]))
        return jnp.take_along_axis(joined, source.reshape(shape)[:, None], axis=2)

    return jax.tree.map(line, ring, new)


def _into_ring(ring: Stored, new: jax.Array, start: jax.Array) -> Stored:
    """The ring with the last W of the new tokens in it; arguments as in `_in_line`."""
    size, length = ring.shape[2], new.shape[1]
    kept = min(size, length)
    new = new[:, length - kept :]
    new = stored.quantize(new) if isinstance(ring, Int8) else new.astype(ring.dtype)
    slots = (start[:, None] + jnp.arange(length - kept, length)) % size
    row = jnp.arange(len(start))[:, None]
    return jax.tree.map(lambda old, new: old.at[row, :, slots].set(new), ring, new)


def _turned(x):
    """[B, S, K, ...] <-> [B, K, S, ...] of any tree."""
    return jax.tree.map(lambda array: jnp.swapaxes(array, 1, 2), x)
