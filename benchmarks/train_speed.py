"""Training speed of every sharing, side by side in one process, on random ids.

  python benchmarks/train_speed.py --size=124m --dtype=bfloat16 --output=results/train.jsonl

Variants take turns; ratios are to the first. A batch that does not fit is halved.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from ours import arguments, record, spec_of, train_call
from sizes import SIZES

from qkvjax.attention.spec import SHARINGS
from qkvjax.costs.measure import interleaved, ratio, repeat
from qkvjax.parallel import host


def main() -> None:
    given = arguments(
        __doc__, size="shakespeare", dtype="float32", attention="auto", sharings=list(SHARINGS)
    )
    host.keep_freed_memory()
    size = SIZES[given.size]
    while True:
        try:
            calls = {s: train_call(size, s, given.dtype, given.attention) for s in given.sharings}
            timers = {s: repeat(call, 0.5) for s, (call, _) in calls.items()}
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or size.batch == 1:
                raise
            calls = None  # frees what was allocated
            size = dataclasses.replace(size, batch=size.batch // 2)
            print(f"out of memory: trying a batch of {size.batch}", flush=True)
    seconds = interleaved(timers)
    first, peak = given.sharings[0], host.peak_flops()
    tokens = size.batch * size.length
    for sharing in given.sharings:
        step = float(np.median(seconds[sharing]))
        flops = 6 * spec_of(size, sharing).forward_macs(size.length) / size.length
        record(
            given.output,
            benchmark="train_speed",
            data="random ids",
            size=given.size,
            batch=size.batch,
            length=size.length,
            dtype=given.dtype,
            sharing=sharing,
            attention=given.attention,
            step_seconds=step,
            tokens_per_second=tokens / step,
            mfu=None if peak is None else tokens / step * flops / peak,
            ratio=ratio(seconds[sharing], seconds[first]),
            peak_bytes=calls[sharing][1],
        )


if __name__ == "__main__":
    main()
