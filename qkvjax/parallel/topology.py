"""Hardware that is not here, to compile for: names such as "v5e-16", "h200-8" and "cpu:8"."""

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
    """One device of a kind, by its maker's data sheet.

    Attributes:
      memory: bytes.
      peak_flops: dense bfloat16 FLOP/s.
      bandwidth: of its memory, bytes a second.
      slices: number in the name -> the platform's own topology string.
    """

    memory: int
    peak_flops: float
    bandwidth: float
    slices: dict[int, str]


def _grids(*shapes: str, cores: int = 1) -> dict[int, str]:
    """Named by chips, or by the cores of which each has so many."""
    return {cores * _chips(shape): shape for shape in shapes}


def _chips(grid: str) -> int:
    return math.prod(map(int, grid.split("x")))


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
# A v4 or v5p slice is named by its cores, two a chip; a program sees chips.
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.23e12, _grids(*_CUBES, cores=2)),
    "v5e": Chip(16 * GIB, 197e12, 0.82e12, _grids(*_FLAT)),
    "v5p": Chip(95 * GIB, 459e12, 2.77e12, _grids(*_CUBES, cores=2)),
    "v6e": Chip(32 * GIB, 918e12, 1.64e12, _grids(*_FLAT)),
    "h200": Chip(141 * 10**9, 989e12, 4.8e12, {n: f"1x1x{n}" for n in (1, 2, 4, 8)}),
}
# What the compiler wants to know of an NVIDIA H200.
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
    """Devices to compile for; `chip` is None for "cpu:N", virtual devices of this machine."""

    name: str
    count: int
    chip: Chip | None = None


def read(name: str) -> Topology:
    """The topology of that name, without asking any compiler.

    Raises:
      UserError: there is none; the message lists the real ones.
    """
    if found := re.fullmatch(r"cpu:([1-9]\d{0,3})", name):
        return Topology(name, int(found[1]))
    kind, _, number = name.partition("-")
    chip = CHIPS.get(kind)
    if chip is None or not number.isdecimal() or int(number) not in chip.slices:
        names = [f"{kind}-{n}" for kind, chip in CHIPS.items() for n in chip.slices]
        listed = "; ".join(f"{k}-" + ", -".join(map(str, c.slices)) for k, c in CHIPS.items())
        raise UserError(
            f"--topology={name} does not exist: use one of {listed}; or cpu:N, N virtual devices"
            f" of this machine{did_you_mean(name, names)}"
        )
    return Topology(name, _chips(chip.slices[int(number)]), chip)


def devices(topology: Topology) -> list:
    """Its devices, which compile and do not compute.

    Raises:
      UserError: their compiler is not installed.
    """
    import jax

    if topology.chip is None:
        try:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", topology.count)
        except RuntimeError:
            pass  # jax has begun already; what it has is seen below
        if len(jax.devices("cpu")) < topology.count:
            raise UserError(
                f"--topology={topology.name} wants a process in which jax has not begun: run"
                " qkvjax plan by itself"
            )
        return jax.devices("cpu")[: topology.count]
    from jax.experimental import topologies

    kind, _, number = topology.name.partition("-")
    grid = topology.chip.slices[int(number)]
    xla_flags.add("gpu" if kind == "h200" else "tpu")  # as on the hardware itself
    # There is no metadata server to ask for the names of workers.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"} | os.environ
    # Without a GPU jax's plugin asks the driver in vain and is then left out.
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"} | os.environ
    # A program for devices that are not here can be kept, but not read again.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        if kind == "h200":
            found = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=grid)
        else:
            found = topologies.get_topology_desc(f"{kind}:{grid}", platform="tpu")
    except (ImportError, RuntimeError, ValueError) as error:
        extra = "cuda" if kind == "h200" else "tpu"
        raise UserError(
            f"--topology={topology.name}: its compiler is not here, or busy with another process"
            f" ({type(error).__name__}: {str(error).splitlines()[0][:120]}): pip install"
            f" 'qkvjax[{extra}]', which needs no such device"
        ) from None
    return list(found.devices)
