"""Attention on this device against the reference in float64 on the host: relative errors.

  python benchmarks/correctness.py --output=results/correctness.jsonl
  python benchmarks/correctness.py --prepare=FOLDER      lowers the kernels for an H200, here
  python benchmarks/correctness.py --prepared=FOLDER --output=results/correctness.jsonl

Output and gradients of whole sequences, and a token's output onto a cache, of an odd length: every
implementation with all its masks, head layouts and head widths, with two tensors and with K = V.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ours import arguments, record
from prepared import compile_all, prepare

from qkvjax.kernels import choice, dispatch
from qkvjax.kernels.stored import KeyOfState

LIMIT = {"float32": 2e-3, "bfloat16": 1e-2}
BATCH, HEADS = 2, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """K = 0 says that the queries are the keys."""

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


def cases(impls, widths, length: int):
    masks = [
        dict(tied=True, kv_heads=1),
        dict(tied=False, kv_heads=2, packed=True),
        dict(tied=True, kv_heads=4, causal=False, packed=True),
        dict(tied=True, kv_heads=2, window=100, packed=True),
        dict(tied=False, kv_heads=4, causal=False, window=70),
        dict(tied=True, kv_heads=0),
        dict(tied=False, kv_heads=0, packed=True),
    ]
    caches = [
        dict(tied=True, kv_heads=1),
        dict(tied=False, kv_heads=2, window=100),
        dict(tied=True, kv_heads=4, raw=True),
    ]
    for impl, width, dtype in itertools.product(impls, widths, LIMIT):
        if impl in dispatch.NO_CACHE and (dtype == "float32" or width < 64):
            continue
        for mask in masks:
            if impl == "cudnn":
                mask = mask | dict(packed=False, causal=True)
            if mask["kv_heads"] or impl == "triton":
                yield Case(impl, dtype, width, length, **mask)
        for cache in caches if impl not in dispatch.NO_CACHE else []:
            yield Case(impl, dtype, width, length, **cache, decodes=True)


def arrays(case: Case) -> list[jax.Array]:
    """(slope, q, k, v), without what there is not; of a token's attention without slope."""
    count = [HEADS, HEADS, case.kv_heads, case.kv_heads or HEADS]
    wanted = [not case.decodes, True, case.kv_heads > 0, not case.tied]
    keys = jax.random.split(jax.random.key(0), 4)
    found = [
        jax.random.normal(key, (BATCH, case.length, heads, case.width), case.dtype)
        for key, heads, want in zip(keys, count, wanted)
        if want
    ]
    return [found[0][:, -1:], *found[1:]] if case.decodes else found


def segments(case: Case) -> jax.Array | None:
    """About ten documents a sequence."""
    if not case.packed:
        return None
    ends = np.random.default_rng(0).random((BATCH, case.length)) < 10 / case.length
    return jnp.asarray(np.cumsum(ends, axis=1), jnp.int32)


def function(case: Case, impl: str):
    """(output, *gradients) of a case's arrays."""
    if case.decodes:
        options = {"positions": jnp.full((BATCH, 1), case.length - 1), "window": case.window}
        key = KeyOfState(1e4, case.width) if case.raw else None
        if impl == "reference" and case.raw:  # which makes no keys as it reads

            def decode(q, k):
                wide = jnp.promote_types(k.dtype, jnp.float32)
                cos, sin = (t[:, None] for t in key.at(case.length, wide))
                a, b = jnp.split(k.astype(wide), 2, axis=-1)
                turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
                return dispatch.decode_attention(q, turned.astype(k.dtype), k, **options, impl=impl)

            return lambda *arrays: (decode(*arrays),)
        run = functools.partial(dispatch.decode_attention, impl=impl)
        if impl in dispatch.KERNELS:
            run = choice.kernel(impl, decodes=True).decode
        return lambda *arrays: (run(*arrays, **options, key=key),)
    options = {"causal": case.causal, "window": case.window, "segment_ids": segments(case)}
    attend = functools.partial(dispatch.attention, **options, impl=impl)
    if impl in dispatch.KERNELS:  # without what dispatch does for meshes
        attend = functools.partial(choice.kernel(impl).attention, **options)
    if not case.kv_heads:
        several = attend
        attend = lambda x, v=None: several(x, x, v)  # noqa: E731

    def all_of(slope, *arrays):
        out, back = jax.vjp(attend, *arrays)
        return out, *back(slope)

    return all_of


def truth(case: Case) -> list[np.ndarray]:
    """By `kernels.reference` in float64 on the CPU."""
    cpu = jax.devices("cpu")[0]
    given = [np.asarray(x, np.float64) for x in arrays(case)]
    with jax.enable_x64(True), jax.default_device(cpu):
        found = jax.jit(function(case, "reference"))(*(jax.device_put(x, cpu) for x in given))
        return [np.asarray(x) for x in found]


def main() -> None:
    given = arguments(__doc__, length=1000, widths=["64", "128", "256"], prepare="", prepared="")
    widths = [int(width) for width in given.widths]
    if given.prepare:
        for case in cases(("hopper", "triton"), widths, given.length):
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(case)]
            prepare(Path(given.prepare), case.name, function(case, case.impl), shapes)
        return
    impls = [name for name in dispatch.IMPLEMENTATIONS if not dispatch.missing(name)]
    chosen = list(cases(impls, widths, given.length))
    programs = {case.name: (function(case, case.impl), arrays(case)) for case in chosen}
    futures = compile_all(programs, Path(given.prepared) if given.prepared else None)
    worst = 0.0
    for case in chosen:
        found = futures[case.name].result()(*arrays(case))
        pairs = [(np.asarray(a, np.float64), b) for a, b in zip(found, truth(case), strict=True)]
        errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]
        worst = max(worst, max(errors) / LIMIT[case.dtype])
        facts = dataclasses.asdict(case) | {"limit": LIMIT[case.dtype], "errors": errors}
        record(given.output, benchmark="correctness", **facts)
    if not worst < 1:
        raise SystemExit(f"an error exceeds its limit, {worst:.2f} times")


if __name__ == "__main__":
    main()
