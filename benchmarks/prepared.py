"""Lowers programs on a machine without a GPU, and compiles them on the GPU's, several at a time.

Lowering a kernel takes seconds of one core, and time on a borrowed GPU is short. Each program is a
file in a folder; only the version of jax that wrote it can read it.
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

# Custom calls that kernels lower to; jax.export refuses ones that it does not know as stable.
KERNEL_CALLS = ("mosaic_gpu", "mosaic_gpu_v2", "__gpu$xla.gpu.triton", "triton_kernel_call")


def prepare(folder: Path, name: str, function, arguments, kernel: bool = True) -> None:
    """Lowers a program for an H200 and writes it to a file.

    Args:
      folder: gets the file NAME.gz.
      name: of the program.
      function: to lower.
      arguments: of the function, as shapes.
      kernel: whether the function has kernels, whose lowering reads the kind of device.
    """
    device_fields = {"device_kind": "NVIDIA H200", "num_cores": None}
    if "platform" in AbstractDevice.__dataclass_fields__:  # depends on the version of jax
        device_fields["platform"] = "gpu"
    device = AbstractDevice(**device_fields)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    unchecked = [export.DisabledSafetyCheck.custom_call(call) for call in KERNEL_CALLS]
    with use_abstract_mesh(mesh) if kernel else contextlib.nullcontext():
        lower = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=unchecked)
        program = lower(*arguments)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.gz").write_bytes(gzip.compress(program.serialize()))


def compile_all(programs: dict, folder: Path | None) -> dict[str, concurrent.futures.Future]:
    """Compiles programs in threads; returns {name: future with the compiled program or the error}.

    Args:
      programs: name -> (function, arguments).
      folder: where `prepare` put lowered programs; those that are not in it are lowered here.
    """

    def compile_one(name, function, arguments):
        file = folder and folder / f"{name}.gz"
        if file and file.exists():
            function = export.deserialize(bytearray(gzip.decompress(file.read_bytes()))).call
        return jax.jit(function).lower(*arguments).compile()

    num_threads = max(1, (os.cpu_count() or 2) - 2)
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        return {
            name: pool.submit(compile_one, name, *program) for name, program in programs.items()
        }
