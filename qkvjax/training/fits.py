"""Whether compiled programs fit into the memory of a device, before any of them runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax

from qkvjax.errors import UserError
from qkvjax.parallel import host

REMEDY = (
    "take a smaller data.batch_size or more train.accumulation, train.remat=block, a larger"
    " mesh.fsdp, mesh.tensor or mesh.context, or train.compute_dtype=bfloat16"
)


def peak_bytes(compiled) -> int | None:
    """Peak device memory of a compiled program: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    return None if memory is None else memory.argument_size_in_bytes + added_bytes(compiled)


def added_bytes(compiled) -> int:
    """Bytes that a run of a compiled program takes beside its arguments; 0 where not known."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return results + memory.temp_size_in_bytes


def check_arrays(what: str, arrays, remedy: str) -> None:
    """Raises UserError when arrays would not fit into the memory that a device has free.

    Args:
      what: the arrays, such as "the train state".
      arrays: a tree of ShapeDtypeStructs with shardings.
      remedy: what the user can do.
    """
    needed = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arrays)
    )
    free = host.free_device_memory()
    if free is not None and needed > free:
        raise UserError(
            f"{what} does not fit: it takes {needed / 2**30:.2f} GiB of a device, which has"
            f" {free / 2**30:.2f} GiB free, {(needed - free) / 2**30:.2f} GiB too little: {remedy}"
        )


def compile_all(compile_each: Mapping[str, Callable[[], Sequence]]) -> dict[str, Sequence]:
    """Compiles lists of programs by name, such as "the train step", and checks that each can run.

    Call it when what they take as arguments, the train state, lies on the devices.

    Raises:
      UserError: one needs more memory than is free; the message says how much.
    """
    programs = {}
    for name, compile_one in compile_each.items():
        try:
            programs[name] = compile_one()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{name} does not fit a device ({reason}): {REMEDY}") from None
    free = host.free_device_memory()
    for name, compiled in programs.items():
        needed = max(map(added_bytes, compiled), default=0)
        if free is not None and needed > free:
            raise UserError(
                f"{name} does not fit: a device needs {needed / 2**30:.2f} GiB beside the train"
                f" state and has {free / 2**30:.2f} GiB free, {(needed - free) / 2**30:.2f} GiB too"
                f" little: {REMEDY}"
            )
    return programs
