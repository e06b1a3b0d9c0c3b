"""Attention kernels timed over tile sizes, beside cuDNN and a plain copy of memory.

  python benchmarks/tune.py fit --output=candidates.jsonl        here: which sizes compile
  python benchmarks/tune.py time --candidates=candidates.jsonl --output=tuned.jsonl

`fit` compiles for an H200 that is not there (jax-cuda13-plugin, nvidia-cuda-nvcc) and keeps what
neither spills nor needs more shared memory than there is. `time` runs those on this GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.kernels import triton, triton_decode
from qkvjax.kernels.triton import Blocks

HEADS = {64: 32, 128: 16, 256: 8}


@dataclasses.dataclass(frozen=True)
class Case:
    """One timed call: what is computed, its shape, by whom and in which tiles."""

    what: str  # forward, keys, queries, decode
    impl: str
    width: int
    tied: bool
    batch: int
    length: int
    heads: int
    kv_heads: int
    blocks: tuple[int, ...] | None = None
    splits: int | None = None
    segments: bool = False


def shapes(case):
    q = (case.batch, case.length, case.heads, case.width)
    kv = (case.batch, case.length, case.kv_heads, case.width)
    return q, kv


def flops(case):
    per = 2 * case.batch * case.heads * case.length**2 * case.width  # causal, two products
    return per * {"forward": 1, "keys": 2, "queries": 1.5, "backward": 2.5}[case.what]


def call_of(case, make):
    """(function, arguments) of a case; `make(shape, dtype)` makes an argument."""
    q, kv = shapes(case)
    blocks = None if case.blocks is None else Blocks(*case.blocks)
    values = [] if case.tied else [make(kv, jnp.bfloat16)]
    numbers = (case.batch, case.heads, case.length)
    if case.what == "decode":
        held = (case.batch, case.kv_heads, case.length, case.width)
        layers = max(1, min(8, int(3e8 / (2 * np.prod(held)))))

        def decode(q, positions, *held):
            for k, *v in held:
                k, *v = (jnp.swapaxes(x, 1, 2) for x in (k, *v))
                q = triton_decode.decode(
                    q, k, *v, positions=positions, block=blocks, splits=case.splits
                )
            return q

        caches = [
            [make(held, jnp.bfloat16) for _ in range(1 if case.tied else 2)] for _ in range(layers)
        ]
        one = (case.batch, 1, case.heads, case.width)
        return decode, (make(one, jnp.bfloat16), make((case.batch, 1), "places"), *caches)
    segments = make((case.batch, case.length), "segments") if case.segments else None
    if case.impl == "cudnn":
        f = functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
        )
        if case.what == "forward":
            return (lambda q, k, v=None: f(q, k, k if v is None else v)), (
                make(q, jnp.bfloat16), make(kv, jnp.bfloat16), *values)  # fmt: skip

        def both(do, q, k, v=None):
            if v is None:
                return jax.vjp(lambda q, k: f(q, k, k), q, k)[1](do)
            return jax.vjp(f, q, k, v)[1](do)

        return both, (make(q, jnp.bfloat16), make(q, jnp.bfloat16), make(kv, jnp.bfloat16), *values)
    given = {"causal": True, "window": None, "scale": None, "interpret": False}

    def options(q, v):
        return triton.settings(
            q, v, forward=blocks if case.what == "forward" else None,
            backward=None if case.what == "forward" else blocks, **given,
        )  # fmt: skip

    if case.what == "forward":
        return (
            lambda q, k, segments, v=None: triton.forward_pass(
                options(q, v), (q,), (k,), v, segments
            )[0],
            (make(q, jnp.bfloat16), make(kv, jnp.bfloat16), segments, *values),
        )

    def backward(q, k, segments, out, do, normaliser, v=None):
        dqs, dks, dv, _ = triton._backward(
            options(q, v), ((q,), (k,), v, segments, out, normaliser), do
        )
        return {"keys": (dks, dv), "queries": dqs, "backward": (dqs, dks, dv)}[case.what]

    return backward, (
        make(q, jnp.bfloat16), make(kv, jnp.bfloat16), segments, make(q, jnp.bfloat16),
        make(q, jnp.bfloat16), make(numbers, "normaliser"), *values,
    )  # fmt: skip


def cases(part: str):
    """All that are tried."""
    for width, tied in itertools.product((64, 128, 256), (False, True)):
        if part == "train":
            whole = dict(width=width, tied=tied, batch=2, length=8192, heads=HEADS[width],
                         kv_heads=HEADS[width])  # fmt: skip
            for impl in ("cudnn",):
                yield Case("forward", impl, **whole)
                yield Case("backward", impl, **whole)
            for rows, columns, warps, stages in itertools.product(
                (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
            ):
                if (rows, columns) == (64, 128) or (width == 256 and columns == 128):
                    continue
                yield Case("forward", "triton", blocks=(rows, columns, warps, stages), **whole)
            for rows, columns, warps, stages in itertools.product(
                (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
            ):
                if rows * columns not in (2048, 4096, 8192) or (width < 256 and stages == 1):
                    continue
                for what in ("keys", "queries"):
                    yield Case(what, "triton", blocks=(rows, columns, warps, stages), **whole)
        if part == "decode" and width != 64:
            for columns, warps, stages in itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 5)):
                yield Case("decode", "triton", width, tied, 8, 32768, 32, 8,
                           (64, columns, warps, stages))  # fmt: skip


def fit(output: Path, part: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels"))
    from compile_for_h200 import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

    from qkvjax.parallel.topology import H200

    devices = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology="1x1x1"
    ).devices
    sharding = NamedSharding(jax.sharding.Mesh(devices[:1], ("x",)), PartitionSpec())
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)

    def make(shape, dtype):
        dtype = {"places": jnp.int32, "segments": jnp.int32, "normaliser": jnp.float32}.get(
            dtype if isinstance(dtype, str) else "", dtype
        )
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    with output.open("a") as lines:
        for case in cases(part):
            if case.impl == "cudnn":
                lines.write(json.dumps(dataclasses.asdict(case)) + "\n")
                continue
            function, arguments = call_of(case, make)
            try:
                with jax.sharding.use_abstract_mesh(mesh):
                    jax.jit(function).lower(*arguments).compile()
            except Exception as error:
                print(case.what, case.width, case.tied, case.blocks, str(error)[-150:], flush=True)
                continue
            lines.write(json.dumps(dataclasses.asdict(case)) + "\n")
            lines.flush()


@functools.cache
def made(shape, kind, number):
    if kind == "places":
        return jnp.full(shape, 10**9, jnp.int32)
    if kind == "segments":
        return jnp.ones(shape, jnp.int32)
    if kind == "normaliser":
        return jnp.full(shape, 10.0, jnp.float32)
    return jax.jit(lambda: jax.random.normal(jax.random.key(number), shape, kind))()


def seconds_of(call, at_least=0.02, rounds=3):
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    times = max(2, min(2000, int(at_least / (time.perf_counter() - began))))
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(times):
            out = call()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - began) / times)
    return float(np.median(found))


def timed(todo: list[Case], record, limit: float, workers: int = 14) -> None:
    """Compiles side by side, then times one after the other."""

    def compiled(case):
        counter = itertools.count()

        def make(shape, dtype):
            names = {"places": jnp.int32, "segments": jnp.int32, "normaliser": jnp.float32}
            return jax.ShapeDtypeStruct(shape, names.get(dtype, dtype) if isinstance(dtype, str) else dtype)

        function, arguments = call_of(case, make)
        return jax.jit(function).lower(*arguments).compile()

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(compiled, case) for case in todo]
        concurrent.futures.wait(futures)
    print(f"compiled {len(todo)} in {time.perf_counter() - began:.1f} s", flush=True)
    began = time.perf_counter()
    for case, future in zip(todo, futures):
        if time.perf_counter() - began > limit:
            print("time is over", flush=True)
            break
        try:
            run = future.result()
            counter = itertools.count()
            _, arguments = call_of(case, lambda shape, kind: made(shape, kind, next(counter)))
            found = seconds_of(lambda: run(*arguments))
        except Exception as error:  # a case that fails is a result as well
            record(dataclasses.asdict(case) | {"error": str(error)[:300]})
            continue
        facts = {"seconds": found}
        if case.what == "decode":
            layers = len(arguments) - 2
            size = sum(x.nbytes for cache in arguments[2:] for x in cache)
            facts = {"seconds": found / layers, "gigabytes_per_second": size / found / 1e9}
        else:
            facts["teraflops"] = flops(case) / found / 1e12
        record(dataclasses.asdict(case) | facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fit", "time"))
    parser.add_argument("--part", default="train")
    parser.add_argument("--candidates", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--limit", type=float, default=120)
    given = parser.parse_args()
    if given.what == "fit":
        return fit(given.output, given.part)
    todo = [json.loads(line) for line in given.candidates.read_text().splitlines()]
    todo = [Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in c.items()}) for c in todo]

    with given.output.open("a") as lines:
        def record(facts):
            lines.write(json.dumps(facts) + "\n")
            lines.flush()

        big = jnp.ones(2**30, jnp.bfloat16)
        copy = jax.jit(lambda x: x + 1)
        rate = 2 * big.nbytes / seconds_of(lambda: copy(big)) / 1e9
        record({"what": "copy", "gigabytes_per_second": rate, "device": jax.devices()[0].device_kind})
        del big
        timed(todo, record, given.limit)


if __name__ == "__main__":
    main()
