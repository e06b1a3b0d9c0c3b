"""Times of training steps and of decoding, measured side by side in one process.

Machines are noisy and drift, so variants take turns: in each round every variant is timed once, and
its time is divided by that of the baseline in the same round.
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
    """Times a training step and the decoding of a token for each labelled config.

    Args:
      points: label -> config; the first is the baseline.
      log: is called with a line for each variant that is compiled.

    Returns:
      The content of `measurements.json`.
    """
    host.keep_freed_memory()
    runs = {}
    step_timers = {}
    decode_timers = {}
    peaks = {}
    for label, config in points.items():
        run = prepare_run(config, log=lambda line: None)
        with jax.set_mesh(run.mesh):
            step_timers[label], peaks[label] = _step_timer(run)
        decode_timers[label] = _decode_timer(run)
        runs[label] = run
        log(f"compiled {label}")
    step_seconds = interleaved(step_timers)
    decode_seconds = interleaved(decode_timers)
    baseline = next(iter(points))
    rows = [
        {
            "label": label,
            "step_seconds": float(np.median(step_seconds[label])),
            "step_ratio": ratio(step_seconds[label], step_seconds[baseline]),
            "peak_bytes": peaks[label],
            "decode_seconds": float(np.median(decode_seconds[label])),
            "decode_ratio": ratio(decode_seconds[label], decode_seconds[baseline]),
        }
        for label in points
    ]
    run = runs[baseline]
    return {
        "date": host.now(),
        "device": host.device_name(),
        "environment": host.environment(),
        "rounds": ROUNDS,
        "tokens_per_step": run.tokens_per_step,
        "steps": run.durations.steps,
        "decode": {
            "batch": DECODE_BATCH,
            "length": _decode_length(run),
            "cache_dtype": run.config.train.compute_dtype,
        },
        "rows": rows,
    }


def interleaved(timers: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Returns the seconds of each timer in each of ROUNDS rounds, after one round to warm up."""
    for timer in timers.values():
        timer()
    rounds = [{label: timer() for label, timer in timers.items()} for _ in range(ROUNDS)]
    return {label: [times[label] for times in rounds] for label in timers}


def ratio(times: list[float], baseline: list[float]) -> list[float]:
    """Returns [ratio, low, high]: the geometric mean over rounds of the ratio within a round, with
    its 95 % t interval."""
    logs = [math.log(a / b) for a, b in zip(times, baseline, strict=True)]
    return [math.exp(value) for value in statistics.interval(logs)]


def repeat(call: Callable[[], object], at_least: float = 0.15) -> Callable[[], float]:
    """Returns a timer of one `call`, which repeats it to get a time that can be measured.

    Args:
      call: returns arrays; it is run twice at once, to compile and to choose how often to repeat.
      at_least: seconds that all repetitions together take, about.
    """
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    repetitions = max(1, math.ceil(at_least / (time.perf_counter() - start)))

    def timer() -> float:
        start = time.perf_counter()
        for _ in range(repetitions):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / repetitions

    return timer


def _step_timer(run: Run) -> tuple[Callable[[], float], int | None]:
    """Returns (timer of a training step, its peak bytes)."""
    state = run.init()
    compiled = run.compile_step(state)
    batch = run.batch(0)
    leaves = jax.tree.leaves(state)

    def step():
        nonlocal leaves  # the step donates its state, so each call needs that of the one before
        leaves, metrics = compiled(leaves, batch)
        return metrics["loss"]

    return repeat(step), peak_bytes(compiled)


def _decode_length(run: Run) -> int:
    """Returns the tokens in the cache: four training sequences; one where positions end there."""
    seq_len = run.config.data.seq_len
    return seq_len if run.spec.bounded else 4 * seq_len


def _decode_timer(run: Run) -> Callable[[], float]:
    """Returns a timer of one decoded token of DECODE_BATCH sequences, onto a full cache."""
    model = build(run.spec, run.config.seed)
    layers = model.stack.layers()
    dtype = jnp.dtype(run.config.train.compute_dtype)
    length = _decode_length(run)
    count = min(DECODE_TOKENS, length)
    cache = empty_caches(model, DECODE_BATCH, length, dtype)
    logits = jnp.zeros((DECODE_BATCH, run.spec.vocab_size))
    start = jnp.int32(length - count)
    temperature = jnp.float32(1)
    arguments = (start, jax.random.key(0), temperature)
    lowered = sample_tokens.lower(
        model,
        layers,
        cache,
        logits,
        *arguments,
        dtype=dtype,
        max_tokens=count,
        num_ids=run.dataset.tokenizer.num_ids,
        greedy=True,
    )
    compiled = lowered.compile()

    def decode():
        nonlocal cache  # donated as well
        ids, cache = compiled(model, layers, cache, logits, *arguments)
        return ids

    timer = repeat(decode)
    return lambda: timer() / count
