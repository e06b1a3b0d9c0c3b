"""What each variant costs on this machine, measured side by side in one process.

Machines are noisy and drift, so variants take turns: in each round every variant is timed
once, and what is reported is its time over the baseline's in the same round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.generation.decode import empty_caches, sample_tokens
from qkvjax.models.build import build
from qkvjax.parallel import host
from qkvjax.report import statistics
from qkvjax.training.fits import peak_bytes
from qkvjax.training.run import Run, prepare_run

ROUNDS = 15
DECODE_BATCH = 8
DECODE_TOKENS = 32


def measure(points: Mapping[str, object], log: Callable[[str], None] = print) -> dict:
    """Times a train step and the decoding of a token for each labelled config.

    Args:
      points: label -> config; the first is the baseline.

    Returns:
      The content of `measurements.json`.
    """
    host.keep_freed_memory()
    trains, decodes, peaks, runs = {}, {}, {}, {}
    for label, config in points.items():
        run = prepare_run(config, log=lambda line: None)
        with jax.set_mesh(run.mesh):
            trains[label], peaks[label] = _train_timer(run)
        decodes[label] = _decode_timer(run)
        runs[label] = run
        log(f"compiled {label}")
    steps = interleaved(trains)
    tokens = interleaved(decodes)
    baseline = next(iter(points))
    run = runs[baseline]
    decode = {
        "batch": DECODE_BATCH,
        "length": _decode_length(run),
        "cache_dtype": run.config.train.compute_dtype,
    }
    rows = [
        {
            "label": label,
            "step_seconds": float(np.median(steps[label])),
            "step_ratio": ratio(steps[label], steps[baseline]),
            "peak_bytes": peaks[label],
            "decode_seconds": float(np.median(tokens[label])),
            "decode_ratio": ratio(tokens[label], tokens[baseline]),
        }
        for label in points
    ]
    return {
        "date": host.now(),
        "device": host.device_name(),
        "environment": host.environment(),
        "rounds": ROUNDS,
        "tokens_per_step": run.tokens_per_step,
        "steps": run.durations.steps,
        "decode": decode,
        "rows": rows,
    }


def interleaved(timers: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Seconds of each timer in each round, after one round of warming up."""
    for timer in timers.values():
        timer()
    rounds = [{label: timer() for label, timer in timers.items()} for _ in range(ROUNDS)]
    return {label: [times[label] for times in rounds] for label in timers}


def ratio(times: list[float], baseline: list[float]) -> list[float]:
    """[ratio, low, high]: geometric mean over rounds of the paired ratio, 95 % t interval."""
    logs = [math.log(a / b) for a, b in zip(times, baseline, strict=True)]
    return [math.exp(value) for value in statistics.interval(logs)]


def repeat(call: Callable[[], object], at_least: float = 0.15) -> Callable[[], float]:
    """A timer of one `call`, repeated until it takes long enough to be timed."""
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    times = max(1, math.ceil(at_least / (time.perf_counter() - began)))

    def timer() -> float:
        began = time.perf_counter()
        for _ in range(times):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / times

    return timer


def _train_timer(run: Run) -> tuple[Callable[[], float], int | None]:
    """(timer of a train step, its peak bytes)."""
    state = run.init()
    compiled = run.compile_step(state)
    held = {"leaves": jax.tree.leaves(state)}
    batch = run.batch(0)

    def step():
        held["leaves"], metrics = compiled(held["leaves"], batch)
        return metrics["loss"]

    return repeat(step), peak_bytes(compiled)


def _decode_length(run: Run) -> int:
    """Four training sequences, or the one that a bounded model has positions for."""
    seq_len = run.config.data.seq_len
    return seq_len if run.spec.bounded else 4 * seq_len


def _decode_timer(run: Run) -> Callable[[], float]:
    """Timer of one decoded token of DECODE_BATCH sequences, onto a full-length cache."""
    model = build(run.spec, run.config.seed)
    dtype = jnp.dtype(run.config.train.compute_dtype)
    length = _decode_length(run)
    layers = model.stack.layers()
    count = min(DECODE_TOKENS, length)
    num_ids = run.dataset.tokenizer.num_ids
    held = {"cache": empty_caches(model, DECODE_BATCH, length, dtype)}
    logits = jnp.zeros((DECODE_BATCH, run.spec.vocab_size))
    arguments = (jnp.int32(length - count), jax.random.key(0), jnp.float32(1))
    options = {"dtype": dtype, "max_tokens": count, "num_ids": num_ids, "greedy": True}
    lowered = sample_tokens.lower(model, layers, held["cache"], logits, *arguments, **options)
    compiled = lowered.compile()

    def tokens():
        ids, held["cache"] = compiled(model, layers, held["cache"], logits, *arguments)
        return ids

    timer = repeat(tokens)
    return lambda: timer() / count
