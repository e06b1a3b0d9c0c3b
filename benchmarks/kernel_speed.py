"""Kernels timed alone: over tile sizes, and beside XLA, cuDNN and a plain copy of memory.

  python benchmarks/kernel_speed.py --part=ops --output=results/ops.jsonl
  python benchmarks/kernel_speed.py --part=ops --prepare=FOLDER     lowers all for an H200, here
  python benchmarks/kernel_speed.py --part=ops --prepared=FOLDER --output=results/ops.jsonl

Parts: ops (attention over sequences), caches (a token onto a cache), and tiles and splits, which
look for their sizes. A case that does not compile or run is recorded with its error.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import WORK, Case, cases, program
from ours import arguments, record
from prepared import compile_all, prepare

from qkvjax.errors import UserError

FAILURES = RuntimeError, ValueError, TypeError, UserError
KINDS = {"random": jnp.bfloat16, "places": jnp.int32, "segments": jnp.int32, "numbers": jnp.float32}


def shape_of(shape, kind) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, KINDS[kind])


@functools.lru_cache(maxsize=24)
def made(shape, kind, number: int, longest: int) -> jax.Array:
    """An argument; `number` tells apart those of one case."""
    if kind == "random":
        return jax.jit(lambda: jax.random.normal(jax.random.key(number), shape, jnp.bfloat16))()
    if kind == "segments":  # three documents
        return jnp.broadcast_to(3 * jnp.arange(shape[1]) // shape[1], shape).astype(jnp.int32)
    return jnp.full(shape, longest - 1 if kind == "places" else 10, KINDS[kind])


def seconds_of(call, at_least: float = 0.02, rounds: int = 3) -> float:
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


def copy_rate(count: int) -> float:
    """Gigabytes a second, read and written, of XLA's x + 1."""
    x = jnp.ones(count, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds_of(lambda: copy(x)) / 1e9


def timed(case: Case, compiled) -> dict:
    """Seconds of a call, and what follows from them."""
    if case.batch * case.length * case.kv_heads > 2**21:
        made.cache_clear()  # such caches fill the GPU
    count = itertools.count()
    _, given = program(case, lambda shape, kind: made(shape, kind, next(count), case.length))
    seconds = seconds_of(lambda: compiled(*given))
    if case.what == "decode":
        layers, size = len(given) - 2, sum(x.nbytes for cache in given[2:] for x in cache)
        return {"seconds": seconds / layers, "gigabytes_per_second": size / seconds / 1e9}
    flops = 2 * case.batch * case.heads * case.length**2 * case.width * WORK[case.what]
    return {"seconds": seconds, "teraflops": flops / seconds / 1e12}


def main() -> None:
    given = arguments(__doc__, part="ops", prepare="", prepared="", mini=0, limit=400.0)
    chosen = {case.name: case for case in cases(given.part, bool(given.mini))}
    if given.prepare:
        for name, case in chosen.items():
            if case.impl == "cudnn":  # which has to be there to be traced
                continue
            try:
                prepare(Path(given.prepare), name, *program(case, shape_of), case.impl != "xla")
            except FAILURES as error:  # of tiles that are too large
                print(f"{name} is left out: {str(error)[:120]}")
        return
    kept = functools.partial(record, given.output, benchmark="kernel_speed", part=given.part)
    kept(what="copy", gigabytes_per_second=copy_rate(2**20 if given.mini else 2**30))
    folder = Path(given.prepared) if given.prepared else None
    programs = {name: program(case, shape_of) for name, case in chosen.items()}
    began = time.perf_counter()
    futures = compile_all(programs, folder)
    print(f"compiled {len(futures)} programs in {time.perf_counter() - began:.0f} s")
    for name, future in futures.items():
        if time.perf_counter() - began > given.limit:
            print(f"stopped after {given.limit} s")
            break
        try:
            found = timed(chosen[name], future.result())
        except FAILURES as error:
            found = {"error": str(error)[:200]}
        kept(**dataclasses.asdict(chosen[name]), **found)


if __name__ == "__main__":
    main()
