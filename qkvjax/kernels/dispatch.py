"""One op for every implementation of attention.

`impl` is "auto" or a name of IMPLEMENTATIONS:

    xla        plain operations that XLA fuses; every machine
    reference  the 20-line truth, in float32; every machine
    hopper     our kernels for NVIDIA's Hopper GPUs, through Mosaic; one tile for K = V
    triton     the same for NVIDIA GPUs from Ampere on
    cudnn      NVIDIA's own, of two tensors, for the same GPUs; a cache is read by triton
    tpu        the same for TPUs, through Mosaic

"auto" takes what a door's --attention names, else the first of MEASURED for the device that the
program is compiled for (`parallel.target`) which takes the arguments and passes a trial. A device
that is not here runs no trial; the kernel is then taken untried, and the message says so. A device
that was not measured takes xla: a guess is no reason to prefer a kernel. A named implementation
that cannot run raises.
"""

from __future__ import annotations

import functools
import importlib
import sys

import jax
import jax.numpy as jnp

from qkvjax import kernels
from qkvjax.errors import UserError, did_you_mean
from qkvjax.kernels import IMPLEMENTATIONS, reference, trial, xla, xla_decode
from qkvjax.kernels.stored import KeyOfState, Stored, in_order, widen
from qkvjax.parallel import local, rules
from qkvjax.parallel.target import target

PLAIN = {"xla": xla.attention, "reference": reference.attention}
# Kernels: the modules of whole sequences, and of a cache.
KERNELS = {
    "hopper": ("hopper", "triton_decode"), "triton": ("triton", "triton_decode"),
    "cudnn": ("cudnn", "triton_decode"), "tpu": ("tpu", "tpu_decode"),
}  # fmt: skip
NO_CACHE = ("hopper", "cudnn")  # triton's kernel reads it for them
# What "auto" tries for numbers of 16 bits, the fastest first, by compute capability (platform where
# there is none) and whether K = V: benchmarks/results/h200/tiles.jsonl, forward and backward
# together. Whatever is missing here takes xla.
MEASURED = {
    ("9.0", True): ("hopper", "triton", "cudnn", "xla"),
    ("9.0", False): ("cudnn", "hopper", "triton", "xla"),
}


def kernel(impl: str, decodes: bool = False):
    """A module of KERNELS. Loaded when it is wanted: Pallas takes a quarter of a start."""
    return importlib.import_module(f"qkvjax.kernels.{KERNELS[impl][decodes]}")


def missing(impl: str) -> str | None:
    """What the target device lacks for an implementation; None where it runs."""
    if impl not in KERNELS:
        return None
    device = target()
    if impl == "tpu":
        return None if device.platform == "tpu" else "a TPU"
    wanted, fits = "8.0 or newer", device.major >= 8
    if impl == "hopper":
        wanted, fits = "9.0", device.major == 9
    return None if fits else f"an NVIDIA GPU of compute capability {wanted}"


def candidates(impl: str = "auto", tied: bool = True, dtype="bfloat16") -> tuple[str, ...]:
    """What to try for `impl`, the best first; raises UserError for one that is not here."""
    impl = kernels.preferred if impl == "auto" else impl
    if impl == "auto":
        device = target()
        known = MEASURED if jnp.dtype(dtype).itemsize == 2 else {}
        return known.get((device.capability or device.platform, tied), ("xla",))
    here = [name for name in IMPLEMENTATIONS if not missing(name)]
    if impl not in IMPLEMENTATIONS:
        raise UserError(
            f"attention implementation {impl!r} is unknown: this machine has"
            f" {', '.join(here)}{did_you_mean(impl, here)}"
        )
    if missing(impl):
        raise UserError(
            f"attention implementation {impl!r} needs {missing(impl)}: this machine has"
            f" {', '.join(here)}"
        )
    return (impl,)


def choose(impl: str, q: jax.Array, v: jax.Array | None, *, decodes=False, **others) -> str:
    """The first of `candidates` that takes such arguments; says once why not one before it.

    Raises:
      UserError: none does.
    """
    refused, names, device = {}, candidates(impl, v is None, q.dtype), target()
    if decodes and len(names) > 1:
        names = [name for name in names if name not in NO_CACHE]
    for name in names:
        why = None
        if name in KERNELS:
            module = kernel(name, decodes)
            why = module.refusal(q, v, **others)
            if why is None and rules.shards_sequence():
                why = "it wants whole sequences (mesh.context=1)"
            if why is None and len(names) > 1 and device.here:
                run = module.decode if decodes else module.attention
                packed = others.get("segment_ids") is not None
                why = trial.failure(run, decodes, packed, q.shape[-1], str(q.dtype), v is None)
        if why is None:
            untried = name in KERNELS and not device.here
            _tell(name, tuple(refused.items()), device.kind if untried else None)
            return name
        refused[name] = why
    [(name, why)] = refused.items()
    raise UserError(f"attention implementation {name!r} cannot compute this: {why}; use auto")


@functools.cache
def _tell(chosen: str, refused: tuple, absent: str | None = None) -> None:
    """Says once, where there is a choice, what was chosen and why.

    Args:
      absent: the device that the chosen kernel could not be tried on.
    """
    others = [name for name in KERNELS if missing(name) is None]
    if not others or kernels.preferred != "auto":
        return
    why = [f"not {name}: {reason}" for name, reason in refused]
    why += [
        f"{name} could run here but was not measured against it, so it is taken only when it is"
        f" named (--attention={name})"
        for name in others if chosen == "xla" and not refused
    ]  # fmt: skip
    if absent:
        why.append(f"not tried, because no {absent} is here")
    print("; ".join([f"attention: {chosen}", *why]), file=sys.stderr, flush=True)


def makes_keys(impl: str, q: jax.Array, num_kv_heads: int, key: KeyOfState, page=None) -> bool:
    """Whether decoding queries [B, T, N, H] by `impl` makes keys of stored states while reading.

    Args:
      page: slots of a page, of a cache in pages.
    """
    name = choose(impl, q, None, decodes=True, page=page)
    if name in KERNELS:
        return not kernel(name, decodes=True).cannot_make(key, q.shape[-1])
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
    masks = {"causal": causal, "segment_ids": segment_ids, "window": window}
    name = choose(impl, q, v, **masks, softcap=softcap, q_pe=q_pe)
    k, v, k_pe = (None if x is None else rules.spread_heads(x, q.shape[2]) for x in (k, v, k_pe))
    if name in KERNELS:
        options = {"causal": causal, "window": window, "scale": scale}
        if name == "triton" and k is None and q_pe is None:
            from qkvjax.kernels import triton_symmetric

            run = functools.partial(triton_symmetric.attention, **options)
            return local.on_each_device(run, q, {"v": v, "segment_ids": segment_ids})
        k = rules.gather_sequence(q) if k is None else k
        arrays = {"k": k, "v": v, "segment_ids": segment_ids, "q_pe": q_pe, "k_pe": k_pe}
        run = functools.partial(kernel(name).attention, **options)
        return local.on_each_device(run, q, arrays)
    k = rules.gather_sequence(q) if k is None else k
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
        q, k, v, mask=mask, causal=skips, window=window, scale=scale, softcap=softcap, q_pe=q_pe,
        k_pe=k_pe,
    )  # fmt: skip


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
    name = choose(impl, q, v, decodes=True, page=None if table is None else k.shape[1])
    if name in KERNELS:
        options = {"window": window, "scale": scale}
        # A page that a sequence does not need is used nowhere, but may be fetched.
        there = None if table is None else jnp.minimum(table, k.shape[0] - 1)
        arrays = {
            "k": k, "v": v, "positions": positions, "q_pe": q_pe, "k_pe": k_pe, "key": key,
            "table": there,
        }  # fmt: skip
        run = functools.partial(kernel(name, decodes=True).decode, **options)
        return local.on_each_device(run, q, arrays)
    k, v = (None if x is None else _read(x, table, q.dtype) for x in (k, v))
    slots = jnp.arange(k.shape[1])[None]
    mask = reference.visible(positions, slots, causal=True, window=window)
    if name == "reference":
        if key is not None:
            raise UserError("the reference makes no keys of states: make them first")
        return reference.attention(q, k, v, mask=mask, scale=scale, q_pe=q_pe, k_pe=k_pe)
    return xla_decode.decode(q, k, v, mask=mask, key=key, scale=scale, q_pe=q_pe, k_pe=k_pe)


def _read(x: Stored, table: jax.Array | None, dtype) -> jax.Array:
    """[B, S, K, H] of a cached tensor, in order and in a floating dtype."""
    by_head = jax.tree.map(lambda array: jnp.swapaxes(array, 1, 2), x)
    return jnp.swapaxes(widen(in_order(by_head, table), dtype), 1, 2)
