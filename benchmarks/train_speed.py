"""Training speed of every sharing, side by side in one process, on random ids.

  python benchmarks/train_speed.py --size=124m --dtype=bfloat16 --output=results/train.jsonl

The variants are timed in turn, round by round; ratios are to the first. If the batch does not fit
into memory, it is halved.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import numpy as np
from ours import arguments, record, spec_of, train_call
from sizes import SIZES, Size

from qkvjax.attention.spec import SHARINGS
from qkvjax.costs.measure import interleaved, ratio, repeat
from qkvjax.parallel import host


def main() -> None:
    options = arguments(
        __doc__, size="shakespeare", dtype="float32", attention="auto", sharings=list(SHARINGS)
    )
    host.keep_freed_memory()
    size, timers, peaks = largest_batch(options)
    seconds = interleaved(timers)
    device_flops = host.peak_flops()
    tokens = size.batch * size.length
    for sharing in options.sharings:
        step = float(np.median(seconds[sharing]))
        flops = 6 * spec_of(size, sharing).forward_macs(size.length) / size.length
        record(
            options.output,
            benchmark="train_speed",
            data="random ids",
            size=options.size,
            batch=size.batch,
            length=size.length,
            dtype=options.dtype,
            sharing=sharing,
            attention=options.attention,
            step_seconds=step,
            tokens_per_second=tokens / step,
            mfu=None if device_flops is None else tokens / step * flops / device_flops,
            ratio=ratio(seconds[sharing], seconds[options.sharings[0]]),
            peak_bytes=peaks[sharing],
        )


def largest_batch(options: argparse.Namespace) -> tuple[Size, dict, dict[str, int]]:
    """Compiles the train step of every sharing, with a batch that fits for all of them.

    Returns:
      (size, timer of each sharing, peak bytes of each sharing); `size` has that batch.
    """
    size = SIZES[options.size]
    while True:
        try:
            calls = {}
            peaks = {}
            for sharing in options.sharings:
                calls[sharing], peaks[sharing] = train_call(
                    size, sharing, options.dtype, options.attention
                )
            timers = {sharing: repeat(call, 0.5) for sharing, call in calls.items()}
            return size, timers, peaks
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or size.batch == 1:
                raise
            calls = None  # frees the arrays of the models
            size = dataclasses.replace(size, batch=size.batch // 2)
            print(f"out of memory: trying a batch of {size.batch}", flush=True)


if __name__ == "__main__":
    main()
