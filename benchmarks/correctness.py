"""Compares attention on this device with the reference in float64 on the host: relative errors.

  python benchmarks/correctness.py --output=results/correctness.jsonl
  python benchmarks/correctness.py --prepare=FOLDER      lowers kernels for an H200, without one
  python benchmarks/correctness.py --prepared=FOLDER --output=results/correctness.jsonl

Whole sequences with their gradients, and one token onto a cache, of an odd length: every
implementation with all its masks, head layouts and head widths, with two tensors and with K = V.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ours import arguments, record
from prepared import compile_all, prepare

from qkvjax.kernels import choice, dispatch
from qkvjax.kernels.stored import KeyOfState

LIMIT = {"float32": 2e-3, "bfloat16": 1e-2}  # of the relative error
BATCH = 2
HEADS = 4
MASKS = (
    dict(tied=True, kv_heads=1),
    dict(tied=False, kv_heads=2, packed=True),
    dict(tied=True, kv_heads=4, causal=False, packed=True),
    dict(tied=True, kv_heads=2, window=100, packed=True),
    dict(tied=False, kv_heads=4, causal=False, window=70),
    dict(tied=True, kv_heads=0),
    dict(tied=False, kv_heads=0, packed=True),
)
CACHES = (
    dict(tied=True, kv_heads=1),
    dict(tied=False, kv_heads=2, window=100),
    dict(tied=True, kv_heads=4, raw=True),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
      impl: implementation of attention.
      dtype: of the arrays.
      width: H, head width.
      length: T, tokens of a sequence or of a cache.
      tied: whether K = V.
      kv_heads: K; 0 means that the queries are the keys (Q = K).
      causal: whether a query sees earlier keys alone.
      window: keys that a query sees; None means all.
      packed: whether a sequence has several documents.
      decodes: whether it is one token onto a cache.
      raw: whether the cache has states without rotation, from which keys are made.
    """

    impl: str
    dtype: str
    width: int
    length: int
    tied: bool
    kv_heads: int
    causal: bool = True
    window: int | None = None
    packed: bool = False
    decodes: bool = False
    raw: bool = False

    @property
    def name(self) -> str:
        return "-".join(map(str, dataclasses.astuple(self)))


def cases(impls, widths, length: int) -> Iterator[Case]:
    """Yields what to compare for some implementations and head widths."""
    for impl, width, dtype in itertools.product(impls, widths, LIMIT):
        has_cache = impl not in dispatch.NO_CACHE
        if not has_cache and (dtype == "float32" or width < 64):
            continue
        for mask in MASKS:
            if impl == "cudnn":
                mask = mask | dict(packed=False, causal=True)
            if mask["kv_heads"] or impl == "triton":
                yield Case(impl, dtype, width, length, **mask)
        for cache in CACHES if has_cache else ():
            yield Case(impl, dtype, width, length, **cache, decodes=True)


def arrays(case: Case) -> list[jax.Array]:
    """Returns the arguments of `function`.

    Of sequences: the cotangent of the output, q, k, v; of one token onto a cache: q, k, v. Without
    k where Q = K, without v where K = V.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    heads = {"cotangent": HEADS, "q": HEADS, "k": case.kv_heads, "v": case.kv_heads or HEADS}
    values = {
        name: jax.random.normal(key, (BATCH, case.length, count, case.width), case.dtype)
        for (name, count), key in zip(heads.items(), keys)
    }
    if case.decodes:
        del values["cotangent"]
        values["q"] = values["q"][:, -1:]
    if case.kv_heads == 0:
        del values["k"]
    if case.tied:
        del values["v"]
    return list(values.values())


def segments(case: Case) -> jax.Array | None:
    """Returns the documents' numbers [B, T], about ten documents a sequence."""
    if not case.packed:
        return None
    ends = np.random.default_rng(0).random((BATCH, case.length)) < 10 / case.length
    return jnp.asarray(np.cumsum(ends, axis=1), jnp.int32)


def function(case: Case, impl: str) -> Callable:
    """Returns a function from the arrays of a case to (output, *gradients).

    Args:
      case: what to compute.
      impl: that of the case, or "reference".
    """
    return _decode(case, impl) if case.decodes else _attend(case, impl)


def _decode(case: Case, impl: str) -> Callable:
    """Returns one token onto a cache: its output alone."""
    options = {"positions": jnp.full((BATCH, 1), case.length - 1), "window": case.window}
    key = KeyOfState(1e4, case.width) if case.raw else None
    if impl == "reference" and case.raw:

        def decode_rotated(q, states):
            """The reference makes no keys from states, so they are made before."""
            keys = _rotated(states, key).astype(states.dtype)
            return (dispatch.decode_attention(q, keys, states, **options, impl=impl),)

        return decode_rotated
    decode = functools.partial(dispatch.decode_attention, impl=impl)
    if impl in dispatch.KERNELS:  # directly, without what dispatch does for meshes
        decode = choice.kernel(impl, decodes=True).decode
    return lambda *arrays: (decode(*arrays, **options, key=key),)


def _rotated(states: jax.Array, key: KeyOfState) -> jax.Array:
    """Returns the keys [B, T, K, H] of states, in float32 or wider."""
    dtype = jnp.promote_types(states.dtype, jnp.float32)
    cos, sin = (table[:, None] for table in key.at(states.shape[1], dtype))
    first, second = jnp.split(states.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attend(case: Case, impl: str) -> Callable:
    """Returns attention over sequences, with its gradients."""
    options = {"causal": case.causal, "window": case.window, "segment_ids": segments(case)}
    kernel = functools.partial(dispatch.attention, **options, impl=impl)
    if impl in dispatch.KERNELS:  # directly, without what dispatch does for meshes
        kernel = functools.partial(choice.kernel(impl).attention, **options)

    def attend(q, *rest):
        return kernel(q, q, *rest) if case.kv_heads == 0 else kernel(q, *rest)

    def with_gradients(cotangent, *arrays):
        output, backward = jax.vjp(attend, *arrays)
        return output, *backward(cotangent)

    return with_gradients


def truth(case: Case) -> list[np.ndarray]:
    """Returns output and gradients of `kernels.reference` in float64 on the CPU."""
    cpu = jax.devices("cpu")[0]
    inputs = [np.asarray(array, np.float64) for array in arrays(case)]
    with jax.enable_x64(True), jax.default_device(cpu):
        reference = jax.jit(function(case, "reference"))
        results = reference(*(jax.device_put(array, cpu) for array in inputs))
        return [np.asarray(array) for array in results]


def relative_error(result: jax.Array, expected: np.ndarray) -> float:
    """Returns the norm of the difference over the norm of the expected array."""
    difference = np.asarray(result, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def main() -> None:
    options = arguments(__doc__, length=1000, widths=["64", "128", "256"], prepare="", prepared="")
    widths = [int(width) for width in options.widths]
    if options.prepare:
        for case in cases(("hopper", "triton"), widths, options.length):
            shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays(case)]
            prepare(Path(options.prepare), case.name, function(case, case.impl), shapes)
        return
    impls = [name for name in dispatch.IMPLEMENTATIONS if not dispatch.missing(name)]
    chosen = list(cases(impls, widths, options.length))
    programs = {case.name: (function(case, case.impl), arrays(case)) for case in chosen}
    futures = compile_all(programs, Path(options.prepared) if options.prepared else None)
    worst = 0.0  # error over limit
    for case in chosen:
        results = futures[case.name].result()(*arrays(case))
        errors = [relative_error(*pair) for pair in zip(results, truth(case), strict=True)]
        limit = LIMIT[case.dtype]
        worst = max(worst, max(errors) / limit)
        values = dataclasses.asdict(case) | {"limit": limit, "errors": errors}
        record(options.output, benchmark="correctness", **values)
    if not worst < 1:  # also where it is nan
        raise SystemExit(f"an error exceeds its limit, {worst:.2f} times")


if __name__ == "__main__":
    main()
