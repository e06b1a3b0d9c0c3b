"""Devices that this machine need not have, to compile for: "v5e-16", "h200-8", "cpu:8"."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import NamedTuple

from qkvjax.errors import UserError, did_you_mean
from qkvjax.parallel import xla_flags

GIB = 2**30


class Chip(NamedTuple):
    """One kind of device, with figures from its maker's data sheet.

    Attributes:
      memory: bytes.
      peak_flops: dense bfloat16 FLOP/s.
      bandwidth: of the memory, bytes a second.
      slices: the number in a topology's name -> the platform's topology string, such as "2x4".
    """

    memory: int
    peak_flops: float
    bandwidth: float
    slices: dict[int, str]


def _grids(*shapes: str, cores: int = 1) -> dict[int, str]:
    """Returns topology strings by their number of cores; `cores` is the number in each chip."""
    return {cores * _chips(shape): shape for shape in shapes}


def _chips(grid: str) -> int:
    """Returns the number of chips of a topology string."""
    return math.prod(map(int, grid.split("x")))


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
# The number in the name of a v4 or v5p slice counts cores, two in each chip; a program sees chips.
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.23e12, _grids(*_CUBES, cores=2)),
    "v5e": Chip(16 * GIB, 197e12, 0.82e12, _grids(*_FLAT)),
    "v5p": Chip(95 * GIB, 459e12, 2.77e12, _grids(*_CUBES, cores=2)),
    "v6e": Chip(32 * GIB, 918e12, 1.64e12, _grids(*_FLAT)),
    "h200": Chip(141 * 10**9, 989e12, 4.8e12, {n: f"1x1x{n}" for n in (1, 2, 4, 8)}),
}
# An NVIDIA H200 as XLA's compiler describes it (GpuTargetConfigProto, text format).
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: such as "v5e-16".
      count: devices.
      chip: None for "cpu:N", virtual devices of this machine.
    """

    name: str
    count: int
    chip: Chip | None = None


def read(name: str) -> Topology:
    """Returns the topology of this name, without calling a compiler.

    Raises:
      UserError: there is no such topology; the message lists those there are.
    """
    if match := re.fullmatch(r"cpu:([1-9]\d{0,3})", name):
        return Topology(name, int(match[1]))
    kind, _, number = name.partition("-")
    chip = CHIPS.get(kind)
    if chip is None or not number.isdecimal() or int(number) not in chip.slices:
        names = [f"{kind}-{n}" for kind, chip in CHIPS.items() for n in chip.slices]
        listed = "; ".join(
            f"{kind}-" + ", -".join(map(str, chip.slices)) for kind, chip in CHIPS.items()
        )
        raise UserError(
            f"--topology={name} does not exist: use one of {listed}; or cpu:N, N virtual devices"
            f" of this machine{did_you_mean(name, names)}"
        )
    return Topology(name, _chips(chip.slices[int(number)]), chip)


def devices(topology: Topology) -> list:
    """Returns the devices of a topology.

    Programs can be compiled for them. Only virtual CPU devices can run programs.

    Raises:
      UserError: their compiler is not installed.
    """
    return _cpu_devices(topology) if topology.chip is None else _described_devices(topology)


def _cpu_devices(topology: Topology) -> list:
    """Returns virtual devices of this machine's processors."""
    import jax

    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", topology.count)
    except RuntimeError:
        pass  # jax has started already; the check below decides whether it has enough devices
    if len(jax.devices("cpu")) < topology.count:
        raise UserError(
            f"--topology={topology.name} needs a process in which jax has not started yet: run"
            " qkvjax plan by itself"
        )
    return jax.devices("cpu")[: topology.count]


def _described_devices(topology: Topology) -> list:
    """Returns accelerators that exist as a description for their compiler alone."""
    import jax
    from jax.experimental import topologies

    kind, _, number = topology.name.partition("-")
    grid = topology.chip.slices[int(number)]
    xla_flags.add("gpu" if kind == "h200" else "tpu")  # as on the hardware itself
    # Outside Google Cloud there is no metadata server that knows the names of workers.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"} | os.environ
    # jax's plugin checks for a driver, and without one it would not register its compiler.
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"} | os.environ
    # A program for such devices can be written to the compilation cache, but not read from it.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        if kind == "h200":
            description = topologies.get_topology_desc(
                platform="cuda", target_config=H200, topology=grid
            )
        else:
            description = topologies.get_topology_desc(f"{kind}:{grid}", platform="tpu")
    except (ImportError, RuntimeError, ValueError) as error:
        extra = "cuda" if kind == "h200" else "tpu"
        raise UserError(
            f"--topology={topology.name}: its compiler is not installed, or another process uses it"
            f" ({type(error).__name__}: {str(error).splitlines()[0][:120]}): pip install"
            f" 'qkvjax[{extra}]', which needs no such device"
        ) from None
    return list(description.devices)
