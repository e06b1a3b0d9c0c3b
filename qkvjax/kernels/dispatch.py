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

"auto" takes what `choice` decides for the device that the program is compiled for. A named
implementation that cannot run raises.

Letters: B sequences, T query positions, S slots of a cache, N query heads, K key-value heads, H
head width, P width of a second part of the scores; n pages of a sequence.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qkvjax.errors import UserError
from qkvjax.kernels import IMPLEMENTATIONS, choice, reference
from qkvjax.kernels.choice import KERNELS, NO_CACHE, candidates, choose, missing, settle
from qkvjax.kernels.stored import KeyOfState, Stored, in_order, swap_slots_and_heads, widen
from qkvjax.kernels.trial import Problem, trial_length
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


# ---- whole sequences --------------------------------------------------------------------------


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"] | None = None,
    v: Float[Array, "B S K V"] | None = None,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    q_pe: Float[Array, "B T N P"] | None = None,
    k_pe: Float[Array, "B S K P"] | None = None,
    impl: str = "auto",
) -> Float[Array, "B T N _"]:
    """Computes attention of whole sequences onto themselves.

    Args:
      q: [B, T, N, H] queries.
      k: [B, T, K, H] keys, each for N / K query heads; None says that they are the queries,
        whose two gradients a kernel may then compute as one.
      v: [B, T, K, H] values; None says that the key tile is the value tile, which a kernel
        may then load once.
      causal: a query sees keys at or before its position.
      segment_ids: int [B, T]; a query sees its own segment.
      window: a query sees keys fewer than `window` positions away; None means all.
      scale: of the scores; None means 1 / sqrt(H).
      q_pe, k_pe: [B, T, N, P] and [B, T, K, P], a second part of the scores.
      impl: "auto" or a name.

    Returns:
      [B, T, N, H] in the dtype of q.

    Raises:
      UserError: segment_ids of another shape, or `impl` cannot compute this.
    """
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise UserError(
            f"segment_ids of shape {segment_ids.shape} do not fit queries of shape {q.shape}: give"
            f" one for each token, {q.shape[:2]}"
        )
    k, v, k_pe = (None if x is None else rules.spread_heads(x, q.shape[2]) for x in (k, v, k_pe))
    name = choose(impl, _problem(q, k, v, causal, window, segment_ids, q_pe))
    k = rules.gather_sequence(q) if k is None else k
    if name in KERNELS:
        options = {"causal": causal, "window": window, "scale": scale}
        arrays = {"k": k, "v": v, "segment_ids": segment_ids, "q_pe": q_pe, "k_pe": k_pe}
        run = functools.partial(choice.kernel(name).attention, **options)
        return local.on_each_device(run, q, arrays)
    positions = jnp.arange(q.shape[1])[None]
    mask = reference.visible(
        positions,
        positions,
        causal=causal,
        window=window,
        q_segments=segment_ids,
        k_segments=None if segment_ids is None else rules.gather_sequence(segment_ids),
    )
    return PLAIN[name](
        q,
        k,
        v,
        mask=mask,
        # Skipping hidden pairs cuts the queries into tiles. Where a mesh cuts them already, these
        # tiles would cross devices.
        causal=causal and not rules.shards_sequence(),
        window=window,
        scale=scale,
        q_pe=q_pe,
        k_pe=k_pe,
    )


def _problem(q, k, v, causal: bool, window: int | None, segment_ids, q_pe) -> Problem:
    """Returns a call of `attention`, as far as it decides which kernel may compute it."""
    length, window = trial_length(q.shape[1], window)
    values = q if k is None else k
    values = values if v is None else v
    return Problem(
        dtype=str(q.dtype),
        width=q.shape[3],
        value_width=values.shape[3],
        group=1 if k is None else q.shape[2] // k.shape[2],
        length=length,
        causal=causal,
        window=window,
        packed=segment_ids is not None,
        keys_are_queries=k is None,
        values_are_keys=v is None,
        second=0 if q_pe is None else q_pe.shape[3],
        whole=not rules.shards_sequence(),
    )


# ---- a cache ----------------------------------------------------------------------------------


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Stored,
    v: Stored | None = None,
    *,
    positions: Int[Array, "B T"],
    window: int | None = None,
    scale: float | None = None,
    q_pe: Float[Array, "B T N P"] | None = None,
    k_pe: Float[Array, "B S K P"] | None = None,
    key: KeyOfState | None = None,
    table: Int[Array, "B n"] | None = None,
    impl: str = "auto",
) -> Float[Array, "B T N _"]:
    """Computes causal attention of a few new tokens onto a cache that already holds them.

    Args:
      q: [B, T, N, H] queries of the new tokens.
      k: [B, S, K, H] the cache's keys, slot s holding position s; slots behind the last
        position may hold anything finite. With a table, pages [P, E, K, H].
      v: values like the keys; None says that the keys are the values.
      positions: int [B, T], of the queries.
      window, scale: as in `attention`.
      q_pe, k_pe: [B, T, N, P] and [B, S, K, P], a second part of the scores.
      key: `k` holds states that are the values; this makes their keys. `makes_keys` says which
        implementations can.
      table: int [B, n], the block table of a cache in pages.
      impl: "auto" or a name.

    Returns:
      [B, T, N, H] in the dtype of q.

    Raises:
      UserError: `impl` cannot compute this.
    """
    page = None if table is None else k.shape[1]
    name = choose(impl, _problem_of_a_cache(q, k.shape[2], window, v is None, q_pe, page))
    if name in KERNELS:
        options = {"window": window, "scale": scale}
        if table is not None:
            # The table names a page behind the pool where a sequence needs no page. No kernel uses
            # it, but its copies may fetch it, so it has to exist.
            table = jnp.minimum(table, k.shape[0] - 1)
        arrays = {
            "k": k,
            "v": v,
            "positions": positions,
            "q_pe": q_pe,
            "k_pe": k_pe,
            "key": key,
            "table": table,
        }
        run = functools.partial(choice.kernel(name, decodes=True).decode, **options)
        return local.on_each_device(run, q, arrays)
    k, v = (None if x is None else _read(x, table, q.dtype) for x in (k, v))
    slots = jnp.arange(k.shape[1])[None]
    mask = reference.visible(positions, slots, causal=True, window=window)
    if name == "reference":
        if key is not None:
            raise UserError("the reference makes no keys from states: make them first")
        return reference.attention(q, k, v, mask=mask, scale=scale, q_pe=q_pe, k_pe=k_pe)
    return xla_decode.decode(q, k, v, mask=mask, key=key, scale=scale, q_pe=q_pe, k_pe=k_pe)


def makes_keys(
    impl: str, q: Float[Array, "B T N H"], num_kv_heads: int, key: KeyOfState, page=None
) -> bool:
    """Returns whether `impl` makes keys from stored states while it reads them.

    Args:
      q: queries of the new tokens.
      page: slots of a page, if the cache is in pages.
    """
    name = choose(impl, _problem_of_a_cache(q, num_kv_heads, None, True, None, page))
    if name in KERNELS:
        return not choice.kernel(name, decodes=True).cannot_make(key, q.shape[-1])
    few = q.shape[1] * q.shape[2] // num_kv_heads <= xla_decode.FEW
    return name == "xla" and few and q.shape[-1] % 2 == 0


def _problem_of_a_cache(q, num_kv_heads: int, window, tied: bool, q_pe, page) -> Problem:
    """Returns a call of `decode_attention`, as far as it decides which kernel may compute it."""
    length, window = trial_length(q.shape[1], window)
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
    """Returns a cached tensor in order and in a floating dtype, [B, S, K, H]."""
    as_stored = swap_slots_and_heads(x)
    return swap_slots_and_heads(widen(in_order(as_stored, table), dtype))
