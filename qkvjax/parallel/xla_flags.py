"""Flags of the compiler for accelerators, in one place: they let collectives run beside products.

XLA reads $XLA_FLAGS and libtpu reads $LIBTPU_INIT_ARGS once, when jax starts, so `add` comes before
that. A flag that a user has set stays as it is; QKVJAX_XLA_FLAGS=off leaves all of them out. A flag
that a compiler does not know would end the process, so `add` looks its name up in the compiler's
library. Tested with jaxlib 0.10.2, 0.11.2 and 0.12.0 and with libtpu 0.0.42; what they gain has not
been measured.
"""

from __future__ import annotations

import functools
import importlib.util
import mmap
import os
from pathlib import Path

SWITCH = "QKVJAX_XLA_FLAGS"
VARIABLES = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
# https://docs.jax.dev/en/latest/gpu_performance_tips.html: the scheduler that starts collectives
# early, collectives of one turn of a loop beside products of another, and small collectives as one,
# up to about the weights of a layer.
LAYER = 128 * 2**20  # bytes
FLAGS = {
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": "true",
        "xla_gpu_enable_pipelined_all_gather": "true",
        "xla_gpu_enable_pipelined_all_reduce": "true",
        "xla_gpu_enable_pipelined_reduce_scatter": "true",
        "xla_gpu_all_gather_combine_threshold_bytes": str(LAYER),
        "xla_gpu_all_reduce_combine_threshold_bytes": str(LAYER),
        "xla_gpu_reduce_scatter_combine_threshold_bytes": str(LAYER),
    },
    # The scheduler is on by default there; these make collectives run beside products.
    "tpu": {
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
        "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    },
}
PLUGINS = {"gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}
DEVICES = {"gpu": ("/dev/nvidiactl", "/dev/dxg"), "tpu": ("/dev/accel0", "/dev/vfio/0")}
# Package and file of the library that reads the flags.
READERS = {"gpu": ("jaxlib", "libjax_common.so"), "tpu": ("libtpu", "libtpu.so")}


def accelerator() -> str | None:
    """Returns "gpu" or "tpu" where jax will find one, judged without starting it; else None."""
    asked = [name for name in os.environ.get("JAX_PLATFORMS", "").split(",") if name]
    names = {"gpu": ("cuda", "gpu"), "tpu": ("tpu",)}
    for platform in FLAGS:
        if asked and not any(name in asked for name in names[platform]):
            continue
        plugged = any(importlib.util.find_spec(plugin) for plugin in PLUGINS[platform])
        if plugged and any(Path(device).exists() for device in DEVICES[platform]):
            return platform
    return None


def add(platform: str | None = None) -> str:
    """Adds the flags of a platform to its environment variable; call it before jax starts.

    Args:
      platform: "gpu" or "tpu"; None means what `accelerator` finds.

    Returns:
      The flags that were added, "" for none.
    """
    platform = accelerator() if platform is None else platform
    if platform is None or os.environ.get(SWITCH) == "off":
        return ""
    before = os.environ.get(VARIABLES[platform], "")
    given = {flag.lstrip("-").partition("=")[0] for flag in before.split()}
    known = _known(platform)
    added = " ".join(
        f"--{name}={value}"
        for name, value in FLAGS[platform].items()
        if name not in given and name in known
    )
    if added:
        os.environ[VARIABLES[platform]] = f"{before} {added}".strip()
    return added


def in_force() -> str:
    """Returns what the variables of all platforms say, for a run's first lines and its records."""
    return " ".join(filter(None, (os.environ.get(name) for name in VARIABLES.values())))


@functools.cache
def _known(platform: str) -> frozenset[str]:
    """Which flags of a platform stand in the library that reads them."""
    package, file = READERS[platform]
    spec = importlib.util.find_spec(package)
    if spec is None:
        return frozenset()
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.exists():  # another system names its libraries otherwise
        return frozenset()
    with open(path, "rb") as library:
        with mmap.mmap(library.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return frozenset(
                name for name in FLAGS[platform] if text.find(name.encode() + b"\0") >= 0
            )
