"""What decides whether a run goes on to the last bit, and what the log says about it."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

from qkvjax.parallel import host
from qkvjax.parallel.distributed import program
from qkvjax.training.implementation import settle_attention

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def surroundings(run) -> dict[str, object]:
    """What a step's last bits depend on beside the state: equal means bitwise the same."""
    flags = os.environ.get("LIBTPU_INIT_ARGS")
    return (
        program()
        | ({"LIBTPU_INIT_ARGS": flags} if flags else {})
        | {
            "attention": settle_attention(run),
            "device": host.device_name(),
            "mesh": "x".join(str(size) for size in run.mesh.shape.values()),
            "processes": jax.process_count(),
        }
    )


def continuation(then: Mapping, now: Mapping) -> str:
    """Whether a run saved in the surroundings `then` goes on bitwise in those of `now`, and why."""
    then = {"attention": "xla"} | dict(then)  # which older checkpoints did not tell
    changed = [
        f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(then | now)
        if then.get(name) != now.get(name)
    ]
    if changed:
        return f"equal within rounding, not bitwise ({'; '.join(changed)})"
    if jax.default_backend() == "gpu" and DETERMINISTIC not in str(now["XLA_FLAGS"]):
        return f"equal within rounding, not bitwise (XLA_FLAGS lack {DETERMINISTIC})"
    return "bitwise as if it had never stopped (same program, devices and processes)"
