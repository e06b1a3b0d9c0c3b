"""Attention kernels timed over tile sizes, beside cuDNN and a plain copy of memory.

  python benchmarks/tune.py fit --output=candidates.jsonl        here: which sizes compile
  python benchmarks/tune.py time --candidates=candidates.jsonl --output=tuned.jsonl

`fit` compiles for an H200 that is not there (jax-cuda13-plugin, nvidia-cuda-nvcc) and keeps what
neither spills nor needs more shared memory than there is. `time` runs those on this GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import gzip
import itertools
import json
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax import export

from qkvjax.kernels import hopper, hopper_backward, hopper_block, tile, triton, triton_decode
from qkvjax.kernels import dispatch, triton_symmetric
from qkvjax.kernels.stored import KeyOfState
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
    raw: bool = False


def shapes(case):
    q = (case.batch, case.length, case.heads, case.width)
    kv = (case.batch, case.length, case.kv_heads, case.width)
    return q, kv


def flops(case):
    per = 2 * case.batch * case.heads * case.length**2 * case.width  # causal, two products
    return (
        per
        * {
            "forward": 1,
            "keys": 2,
            "queries": 1.5,
            "backward": 2.5,
            "symmetric": 2.5,
            "out": 1,
            "both": 3.5,
        }[case.what]
    )


def call_of(case, make):
    """(function, arguments) of a case; `make(shape, dtype)` makes an argument."""
    q, kv = shapes(case)
    blocks = Blocks(*case.blocks) if case.impl == "triton" and case.blocks else None
    values = [] if case.tied else [make(kv, jnp.bfloat16)]
    numbers = (case.batch, case.heads, case.length)
    if case.what == "decode":
        held = (case.batch, case.kv_heads, case.length, case.width)
        layers = max(1, min(16, int(3e8 / (2 * np.prod(held)))))
        options = {"key": KeyOfState(1e4, case.width, None)} if case.raw else {}
        if case.impl == "triton":
            run = functools.partial(triton_decode.decode, block=blocks, splits=case.splits)
        else:
            run = functools.partial(dispatch.decode_attention, impl=case.impl)

        def decode(q, positions, *held):
            for k, *v in held:
                k, *v = (jnp.swapaxes(x, 1, 2) for x in (k, *v))
                q = run(q, k, *v, positions=positions, **options)
            return q

        caches = [
            [make(held, jnp.bfloat16) for _ in range(1 if case.tied else 2)] for _ in range(layers)
        ]
        one = (case.batch, 1, case.heads, case.width)
        return decode, (make(one, jnp.bfloat16), make((case.batch, 1), "places"), *caches)
    segments = make((case.batch, case.length), "segments") if case.segments else None
    if case.what in ("out", "both"):
        if case.impl == "cudnn":
            run = functools.partial(
                jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
            )
            f = lambda q, k, v=None: run(q, k, k if v is None else v)  # noqa: E731
        elif case.impl == "xla":
            f = functools.partial(dispatch.attention, impl="xla")
        else:
            f = {"hopper": hopper, "triton": triton}[case.impl].attention

        def both(slope, segments, *arrays):
            if case.impl != "cudnn":
                g = functools.partial(f, segment_ids=segments)
            else:
                g = f
            if case.what == "out":
                return g(*arrays)
            out, back = jax.vjp(g, *arrays)
            return out, back(slope)

        return both, (
            make(q, jnp.bfloat16), segments, make(q, jnp.bfloat16), make(kv, jnp.bfloat16), *values
        )  # fmt: skip
    if case.impl == "cudnn":
        f = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        if case.what == "forward":
            return (lambda q, k, v=None: f(q, k, k if v is None else v)), (
                make(q, jnp.bfloat16), make(kv, jnp.bfloat16), *values)  # fmt: skip

        def both(do, q, k, v=None):
            if v is None:
                return jax.vjp(lambda q, k: f(q, k, k), q, k)[1](do)
            return jax.vjp(f, q, k, v)[1](do)

        return both, (make(q, jnp.bfloat16), make(q, jnp.bfloat16), make(kv, jnp.bfloat16), *values)
    if case.impl == "hopper":
        which = case.width, case.tied
        defaults = {"forward": hopper.FORWARD, "keys": hopper.KEYS, "queries": hopper.QUERIES}
        sizes = hopper_block.Blocks(*case.blocks) if case.blocks else defaults[case.what][which]
        options = tile.Options(
            True, None, case.width**-0.5, case.length, sizes, (sizes, sizes), None
        )
        arrays = [make(q, jnp.bfloat16), make(kv, jnp.bfloat16), segments]
        if case.what == "forward":
            return (
                lambda q, k, segments, v=None: hopper.forward_pass(options, q, k, v, segments),
                (*arrays, *values),
            )
        run = getattr(hopper_backward, case.what + "_pass")

        def gradients(q, k, segments, slope, normaliser, delta, v=None):
            return run(options, q, k, v, segments, slope, normaliser, delta)

        rest = make(q, jnp.bfloat16), make(numbers, "normaliser"), make(numbers, "normaliser")
        return gradients, (*arrays, *rest, *values)
    if case.what == "symmetric":

        def symmetric(x, segments, out, do, normaliser, v=None):
            options = triton.settings(x, v, forward=None, backward=blocks, causal=True,
                                      window=None, scale=None, interpret=False)  # fmt: skip
            return triton_symmetric._backward(options, (x, v, segments, out, normaliser), do)

        array = lambda: make(q, jnp.bfloat16)  # noqa: E731
        arrays = array(), segments, array(), array(), make(numbers, "normaliser")
        return symmetric, (*arrays, *values)
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


def tried(width, tied):
    import ast

    best = ast.literal_eval(Path("/tmp/g/best").read_text())
    for what in ("forward", "keys", "queries"):
        for sizes in best[what, width, tied]:
            yield what, sizes
    for sizes in (
        (64, 64, 4, 2),
        (64, 64, 4, 1),
        (64, 64, 8, 2),
        (32, 64, 4, 2),
        (64, 32, 4, 2),
        (32, 32, 4, 2),
        (32, 32, 4, 1),
        (128, 64, 8, 2),
    ):
        yield "symmetric", sizes


def cases(part: str):
    """All that are tried."""
    for width, tied in itertools.product((128, 64, 256), (True, False)):
        whole = dict(width=width, tied=tied, batch=2, length=8192, heads=HEADS[width],
                     kv_heads=HEADS[width])  # fmt: skip
        tile_bytes, count = 2 * width, 1 if tied else 2
        if part == "cudnn":
            yield Case("forward", "cudnn", **whole)
            yield Case("backward", "cudnn", **whole)
        if part == "hopper":
            for keys, slots in itertools.product((64, 128, 256), (2, 3, 4)):
                if (128 + count * slots * keys) * tile_bytes < 228000:
                    yield Case("forward", "hopper", blocks=(64, keys, slots), **whole)
            for queries, keys, slots in itertools.product((64, 128), (64, 128), (2, 3, 4)):
                held = count * 2 * keys + 2 * slots * queries
                if held * tile_bytes < 228000 and queries + keys < 256:
                    yield Case("keys", "hopper", blocks=(queries, keys, slots), **whole)
                held = 4 * queries + count * slots * keys
                if held * tile_bytes < 228000 and queries == 64:
                    yield Case("queries", "hopper", blocks=(queries, keys, slots), **whole)
        if part == "triton":
            for what, sizes in tried(width, tied):
                yield Case(what, "triton", blocks=sizes, **whole)
        if part == "table":
            for batch, length in ((64, 256), (16, 1024), (4, 4096), (1, 16384)):
                shape = dict(width=width, tied=tied, batch=batch, length=length,
                             heads=HEADS[width], kv_heads=HEADS[width])  # fmt: skip
                for impl in ("hopper", "triton", "xla", "cudnn"):
                    if impl == "xla" and length > 4096:
                        continue
                    yield Case("out", impl, **shape)
                    yield Case("both", impl, **shape)
                    if impl != "cudnn" and length in (1024, 4096):
                        yield Case("both", impl, segments=True, **shape)
            if width == 128:
                shape = dict(width=width, tied=tied, batch=2, length=8192, heads=32, kv_heads=8)
                for impl in ("hopper", "triton", "cudnn"):
                    yield Case("both", impl, **shape)
            if width == 64:
                for narrow, length in ((32, 256), (32, 1024), (64, 64), (64, 128), (128, 128)):
                    shape = dict(width=narrow, tied=tied, batch=16384 // length, length=length,
                                 heads=12, kv_heads=12, segments=True)  # fmt: skip
                    for impl in ("hopper", "triton", "xla"):
                        if impl != "hopper" or narrow > 32:
                            yield Case("both", impl, **shape)
            for what, table in (("keys", hopper.KEYS), ("queries", hopper.QUERIES)):
                if (width, tied) in table:
                    yield Case(what, "hopper", **whole)
                yield Case(what, "triton", **whole)
        if part == "caches" and width == 128:
            for batch, length, kv_heads in itertools.product((1, 8, 64), (4096, 32768), (1, 8, 32)):
                shape = dict(width=width, batch=batch, length=length, heads=32, kv_heads=kv_heads)
                yield Case("decode", "triton", tied=tied, **shape)
                yield Case("decode", "xla", tied=tied, **shape)
                if tied:
                    yield Case("decode", "triton", tied=True, raw=True, **shape)
        if part == "decode" and width == 128:
            shapes = (1, 32768, 8, 33), (8, 32768, 8, 4), (8, 32768, 8, 8), (64, 32768, 8, 1)
            for batch, length, kv_heads, splits in (*shapes, (64, 4096, 8, 1), (8, 32768, 32, 1)):
                for sizes in itertools.product((64, 128, 256), (4, 8), (2, 3)):
                    yield Case("decode", "triton", width, tied, batch, length, 32, kv_heads,
                               (64, *sizes), splits)  # fmt: skip


def fit(output: Path, part: str, check: bool) -> None:
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

    from qkvjax.parallel.topology import H200

    devices = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology="1x1x1"
    ).devices
    sharding = NamedSharding(jax.sharding.Mesh(devices[:1], ("x",)), PartitionSpec())
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    names = ("mosaic_gpu", "mosaic_gpu_v2", "__gpu$xla.gpu.triton")
    unchecked = [export.DisabledSafetyCheck.custom_call(name) for name in names]
    output.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases(part)):
        name = f"{part}{number:03}"
        (output / f"{name}.json").write_text(json.dumps(dataclasses.asdict(case)))
        if case.impl == "cudnn":  # which needs the library to be traced
            continue
        try:
            function, arguments = call_of(case, functools.partial(shaped, sharding=sharding))
            ours = jax.sharding.use_abstract_mesh(mesh)
            with contextlib.nullcontext() if case.impl == "xla" else ours:
                if check:
                    jax.jit(function).lower(*arguments).compile()
                _, arguments = call_of(case, shaped)
                run = export.export(
                    jax.jit(function), platforms=["cuda"], disabled_checks=unchecked
                )(*arguments)
        except Exception as error:
            print(dataclasses.astuple(case), str(error)[:150], flush=True)
            (output / f"{name}.json").unlink()
            continue
        (output / f"{name}.bin").write_bytes(gzip.compress(run.serialize()))


KINDS = {"places": jnp.int32, "segments": jnp.int32, "normaliser": jnp.float32}


def shaped(shape, kind, sharding=None):
    dtype = KINDS.get(kind, kind) if isinstance(kind, str) else kind
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


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


def timed(todo: list[tuple[Case, Path]], record, limit: float, workers: int = 14) -> None:
    """Compiles side by side, then times one after the other."""

    def compiled(case, file):
        function, arguments = call_of(case, shaped)
        if file is not None:
            function = export.deserialize(bytearray(gzip.decompress(file.read_bytes()))).call
        return jax.jit(function).lower(*arguments).compile()

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(compiled, *each) for each in todo]
        concurrent.futures.wait(futures)
    print(f"compiled {len(todo)} in {time.perf_counter() - began:.1f} s", flush=True)
    began = time.perf_counter()
    for (case, _), future in zip(todo, futures):
        if time.perf_counter() - began > limit:
            print("time is over", flush=True)
            break
        try:
            run = future.result()
            if case.batch * case.length * case.kv_heads > 2**22:
                made.cache_clear()
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("fit", "time"))
    parser.add_argument("--part", default="train")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--candidates", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--limit", type=float, default=120)
    given = parser.parse_args()
    if given.what == "fit":
        return fit(given.output, given.part, given.check)
    todo = []
    for file in sorted(given.candidates.glob(f"{given.part}*.json")):
        case = {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in json.loads(file.read_text()).items()
        }
        blob = file.with_suffix(".bin")
        todo.append((Case(**case), blob if blob.exists() else None))

    with given.output.open("a") as lines:

        def record(facts):
            lines.write(json.dumps(facts) + "\n")
            lines.flush()

        big = jnp.ones(2**30, jnp.bfloat16)
        copy = jax.jit(lambda x: x + 1)
        rate = 2 * big.nbytes / seconds_of(lambda: copy(big)) / 1e9
        record(
            {"what": "copy", "gigabytes_per_second": rate, "device": jax.devices()[0].device_kind}
        )
        del big
        timed(todo, record, given.limit)


if __name__ == "__main__":
    main()
