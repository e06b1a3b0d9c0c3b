"""Times kernels alone: over tile sizes, and beside XLA, cuDNN and a plain copy of memory.

  python benchmarks/kernel_speed.py --part=ops --output=results/ops.jsonl
  python benchmarks/kernel_speed.py --part=ops --prepare=FOLDER     lowers for an H200, without one
  python benchmarks/kernel_speed.py --part=ops --prepared=FOLDER --output=results/ops.jsonl

Parts: ops (attention over sequences), caches (one token onto a cache), tiles and splits (which
sizes of tiles and how many splits of a cache are fastest). A case that does not compile or run is
recorded with its error.
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

FAILURES = (RuntimeError, ValueError, TypeError, UserError)
# Kinds of arguments of `kernel_cases.program`, and their dtypes.
DTYPES = {
    "random": jnp.bfloat16,
    "positions": jnp.int32,
    "segments": jnp.int32,
    "numbers": jnp.float32,
}
LARGE_CACHE = 2**21  # batch x tokens x key-value heads


def shape_of(shape, kind) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of an argument."""
    return jax.ShapeDtypeStruct(shape, DTYPES[kind])


@functools.lru_cache(maxsize=24)
def argument(shape, kind, number: int, length: int) -> jax.Array:
    """Returns an argument of a case.

    Args:
      shape: of the array.
      kind: key of DTYPES.
      number: of the argument within its case: the seed of random numbers.
      length: tokens of a sequence.
    """
    if kind == "random":
        return jax.jit(lambda: jax.random.normal(jax.random.key(number), shape, jnp.bfloat16))()
    if kind == "segments":  # three documents
        return jnp.broadcast_to(3 * jnp.arange(shape[1]) // shape[1], shape).astype(jnp.int32)
    value = length - 1 if kind == "positions" else 10
    return jnp.full(shape, value, DTYPES[kind])


def seconds_of(call, at_least: float = 0.02, rounds: int = 3) -> float:
    """Returns the median over rounds of the seconds of one call.

    Args:
      call: returns arrays.
      at_least: seconds that the calls of a round take together, about.
      rounds: how often to measure.
    """
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    repetitions = max(2, min(2000, int(at_least / (time.perf_counter() - began))))
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(repetitions):
            result = call()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - began) / repetitions)
    return float(np.median(seconds))


def copy_rate(count: int) -> float:
    """Returns the gigabytes per second, read and written, of x + 1 for `count` numbers."""
    x = jnp.ones(count, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds_of(lambda: copy(x)) / 1e9


def measure(case: Case, compiled) -> dict:
    """Times a case; returns its seconds, and the rate that it reads or computes at."""
    if case.batch * case.length * case.kv_heads > LARGE_CACHE:
        argument.cache_clear()  # frees GPU memory: such caches need most of it
    numbers = itertools.count()
    _, inputs = program(case, lambda shape, kind: argument(shape, kind, next(numbers), case.length))
    seconds = seconds_of(lambda: compiled(*inputs))
    if case.what == "decode":
        caches = inputs[2:]  # one per layer
        num_bytes = sum(array.nbytes for cache in caches for array in cache)
        return {
            "seconds": seconds / len(caches),
            "gigabytes_per_second": num_bytes / seconds / 1e9,
        }
    flops = 2 * case.batch * case.heads * case.length**2 * case.width * WORK[case.what]
    return {"seconds": seconds, "teraflops": flops / seconds / 1e12}


def prepare_all(chosen: dict[str, Case], folder: Path) -> None:
    """Lowers every case for an H200 and writes it to the folder."""
    for name, case in chosen.items():
        if case.impl == "cudnn":  # can be traced only where the library is
            continue
        try:
            prepare(folder, name, *program(case, shape_of), kernel=case.impl != "xla")
        except FAILURES as error:  # such as tiles that are too large
            print(f"{name} is left out: {str(error)[:120]}")


def main() -> None:
    options = arguments(__doc__, part="ops", prepare="", prepared="", mini=0, limit=400.0)
    chosen = {case.name: case for case in cases(options.part, bool(options.mini))}
    if options.prepare:
        prepare_all(chosen, Path(options.prepare))
        return
    save = functools.partial(record, options.output, benchmark="kernel_speed", part=options.part)
    save(what="copy", gigabytes_per_second=copy_rate(2**20 if options.mini else 2**30))
    folder = Path(options.prepared) if options.prepared else None
    programs = {name: program(case, shape_of) for name, case in chosen.items()}
    began = time.perf_counter()
    futures = compile_all(programs, folder)
    print(f"compiled {len(futures)} programs in {time.perf_counter() - began:.0f} s")
    for name, future in futures.items():
        if time.perf_counter() - began > options.limit:
            print(f"stopped after {options.limit} s")
            break
        try:
            result = measure(chosen[name], future.result())
        except FAILURES as error:
            result = {"error": str(error)[:200]}
        save(**dataclasses.asdict(chosen[name]), **result)


if __name__ == "__main__":
    main()
