"""Programs lowered here for a GPU that is not here, and compiled there side by side.

Lowering a kernel takes seconds of one core, and time on a borrowed GPU is short. A folder holds a
file a program, which only the same version of jax reads.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gzip
import os
from pathlib import Path

import jax
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

TARGETS = ("mosaic_gpu", "mosaic_gpu_v2", "__gpu$xla.gpu.triton", "triton_kernel_call")


def prepare(folder: Path, name: str, function, arguments, kernel: bool = True) -> None:
    """Lowers function(*arguments), given as shapes, for an H200; `kernel` says whether it holds
    a kernel, whose lowering asks what device it is for."""
    device = {"device_kind": "NVIDIA H200", "num_cores": None}
    if "platform" in AbstractDevice.__dataclass_fields__:
        device["platform"] = "gpu"
    device = AbstractDevice(**device)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    unchecked = [export.DisabledSafetyCheck.custom_call(name) for name in TARGETS]
    with use_abstract_mesh(mesh) if kernel else contextlib.nullcontext():
        lower = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=unchecked)
        program = lower(*arguments)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.gz").write_bytes(gzip.compress(program.serialize()))


def compile_all(programs: dict, folder: Path | None) -> dict[str, concurrent.futures.Future]:
    """name -> (function, arguments) becomes name -> its compiled program in time; from the folder
    where it holds the name."""

    def compiled(name, function, arguments):
        file = folder and folder / f"{name}.gz"
        if file and file.exists():
            function = export.deserialize(bytearray(gzip.decompress(file.read_bytes()))).call
        return jax.jit(function).lower(*arguments).compile()

    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
        return {name: pool.submit(compiled, name, *program) for name, program in programs.items()}
