"""One op for every implementation of attention.

`impl` is "auto" or a name of IMPLEMENTATIONS:

    xla        plain operations that XLA fuses; every machine; memory grows with the square of a
               sequence's length
    reference  the 20-line truth, in float32; every machine
    hopper     our kernels for NVIDIA's Hopper GPUs, through Mosaic; one tile for K = V
    triton     the same for NVIDIA GPUs from Ampere on
    cudnn      NVIDIA's library, of two tensors, for the same GPUs; a cache is read by triton
    splash     jax's splash attention, of two tensors, for TPUs; a cache is read by tpu
    tpu        our kernels for TPUs, through Mosaic; one tile for K = V

"auto" takes what a command's --attention names, else what `choice` decides for the device that the
program is compiled for. A named implementation that cannot run raises.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qkvjax.errors import UserError
from qkvjax.kernels import IMPLEMENTATIONS, choice, reference
from qkvjax.kernels.choice import KERNELS, NO_CACHE, candidates, choose, missing, settle
from qkvjax.kernels.stored import KeyOfState, Stored, in_order, widen
from qkvjax.kernels.trial import Problem, tried
from qkvjax.kernels.xla import attention as xla
from qkvjax.kernels.xla import decode as xla_decode
from qkvjax.parallel import local, rules

__all__ = [
    "IMPLEMENTATIONS",
    "KERNELS",
    "NO_CACHE",
    "attention",
    "candidates",
    "decode_attention",
    "makes_keys",
    "missing",
    "settle",
]
PLAIN = {"xla": xla.attention, "reference": reference.attention}


def makes_keys(impl: str, q: jax.Array, num_kv_heads: int, key: KeyOfState, page=None) -> bool:
    """Whether decoding queries [B, T, N, H] by `impl` makes keys of stored states while reading.

    Args:
      page: slots of a page, of a cache in pages.
    """
    name = choose(impl, _of_a_cache(q, num_kv_heads, None, True, None, page))
    if name in KERNELS:
        return not choice.kernel(name, decodes=True).cannot_make(key, q.shape[-1])
    few = q.shape[1] * q.shape[2] // num_kv_heads <= xla_decode.FEW
    return name == "xla" and few and q.shape[-1] % 2 == 0


def attention(
    q: jax.Array,
    k: jax.Array | None = None,
    v: jax.Array | None = None,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_pe: jax.Array | None = None,
    k_pe: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Attention of a whole sequence onto itself.

    Args:
      q: [B, T, N, H] queries.
      k: [B, T, K, H] keys, each for N / K query heads; None says that they are the queries,
        whose two gradients a kernel may then compute as one.
      v: [B, T, K, H] values; None says that the key tile is the value tile, which a kernel
        may then load once.
      causal: a query sees keys at or before its place.
      segment_ids: int [B, T]; a query sees its own segment.
      window: a query sees keys fewer than `window` places away.
      scale: of the scores; None means 1 / sqrt(H).
      softcap: bound of the scores by tanh.
      q_pe, k_pe: [B, T, N, P] and [B, T, K, P], a second part of the scores.
      impl: "auto" or a name.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise UserError(f"segment_ids {segment_ids.shape}: give one a token, {q.shape[:2]}")
    k, v, k_pe = (None if x is None else rules.spread_heads(x, q.shape[2]) for x in (k, v, k_pe))
    length, window_tried = tried(q.shape[1], window)
    problem = Problem(
        dtype=str(q.dtype),
        width=q.shape[3],
        value_width=(q if v is None and k is None else k if v is None else v).shape[3],
        group=1 if k is None else q.shape[2] // k.shape[2],
        length=length,
        causal=causal,
        window=window_tried,
        packed=segment_ids is not None,
        keys_are_queries=k is None,
        values_are_keys=v is None,
        second=0 if q_pe is None else q_pe.shape[3],
        capped=softcap is not None,
        whole=not rules.shards_sequence(),
    )
    name = choose(impl, problem)
    k = rules.gather_sequence(q) if k is None else k
    if name in KERNELS:
        options = {"causal": causal, "window": window, "scale": scale}
        arrays = {"k": k, "v": v, "segment_ids": segment_ids, "q_pe": q_pe, "k_pe": k_pe}
        run = functools.partial(choice.kernel(name).attention, **options)
        return local.on_each_device(run, q, arrays)
    places = jnp.arange(q.shape[1])[None]
    mask = reference.visible(
        places,
        places,
        causal=causal,
        window=window,
        q_segments=segment_ids,
        k_segments=None if segment_ids is None else rules.gather_sequence(segment_ids),
    )
    skips = causal and not rules.shards_sequence()  # tiles of queries would cross devices
    return PLAIN[name](
        q,
        k,
        v,
        mask=mask,
        causal=skips,
        window=window,
        scale=scale,
        softcap=softcap,
        q_pe=q_pe,
        k_pe=k_pe,
    )


def decode_attention(
    q: jax.Array,
    k: Stored,
    v: Stored | None = None,
    *,
    positions: jax.Array,
    window: int | None = None,
    scale: float | None = None,
    q_pe: jax.Array | None = None,
    k_pe: jax.Array | None = None,
    key: KeyOfState | None = None,
    table: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Causal attention of a few new tokens onto a cache that already holds them.

    Args:
      q: [B, T, N, H] queries of the new tokens.
      k: [B, S, K, H] the cache's keys, slot s holding position s; slots behind the last
        position may hold anything finite. With a table, pages [P, E, K, H].
      v: values like the keys; None says that the keys are the values.
      positions: int [B, T], the queries' places.
      q_pe, k_pe: [B, T, N, P] and [B, S, K, P], a second part of the scores.
      key: `k` holds states that are the values; this makes their keys (`makes_keys` says which
        implementations can).
      table: int [B, n], the block table of a cache in pages.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    page = None if table is None else k.shape[1]
    problem = _of_a_cache(q, k.shape[2], window, v is None, q_pe, page)
    name = choose(impl, problem)
    if name in KERNELS:
        options = {"window": window, "scale": scale}
        # A page that a sequence does not need is used nowhere, but may be fetched.
        there = None if table is None else jnp.minimum(table, k.shape[0] - 1)
        arrays = {
            "k": k,
            "v": v,
            "positions": positions,
            "q_pe": q_pe,
            "k_pe": k_pe,
            "key": key,
            "table": there,
        }
        run = functools.partial(choice.kernel(name, decodes=True).decode, **options)
        return local.on_each_device(run, q, arrays)
    k, v = (None if x is None else _read(x, table, q.dtype) for x in (k, v))
    slots = jnp.arange(k.shape[1])[None]
    mask = reference.visible(positions, slots, causal=True, window=window)
    if name == "reference":
        if key is not None:
            raise UserError("the reference makes no keys of states: make them first")
        return reference.attention(q, k, v, mask=mask, scale=scale, q_pe=q_pe, k_pe=k_pe)
    return xla_decode.decode(q, k, v, mask=mask, key=key, scale=scale, q_pe=q_pe, k_pe=k_pe)


def _of_a_cache(q, num_kv_heads: int, window, tied: bool, q_pe, page) -> Problem:
    """New tokens [B, T, N, H] onto a cache, as what decides about a kernel."""
    length, window = tried(q.shape[1], window)
    return Problem(
        dtype=str(q.dtype),
        width=q.shape[3],
        value_width=q.shape[3],
        group=q.shape[2] // num_kv_heads,
        length=length,
        window=window,
        values_are_keys=tied,
        second=0 if q_pe is None else q_pe.shape[3],
        decodes=True,
        page=page,
    )


def _read(x: Stored, table: jax.Array | None, dtype) -> jax.Array:
    """[B, S, K, H] of a cached tensor, in order and in a floating dtype."""
    by_head = jax.tree.map(lambda array: jnp.swapaxes(array, 1, 2), x)
    return jnp.swapaxes(widen(in_order(by_head, table), dtype), 1, 2)
