"""Compiler flags for accelerators: they let collectives run at the same time as products.

XLA reads $XLA_FLAGS and libtpu reads $LIBTPU_INIT_ARGS once, when jax starts, so `add` must be
called before. A flag that the user has set keeps its value; QKVJAX_XLA_FLAGS=off adds none. An
unknown flag would end the process, so `add` first looks for its name in the compiler's library.

Tested with jaxlib 0.10.2, 0.11.2 and 0.12.0 and with libtpu 0.0.42. What the flags gain has not
been measured.
"""

from __future__ import annotations

import functools
import importlib.util
import mmap
import os
from pathlib import Path

SWITCH = "QKVJAX_XLA_FLAGS"  # environment variable; "off" adds no flags
VARIABLES = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
LAYER = 128 * 2**20  # bytes, about the weights of a layer
FLAGS = {
    # From https://docs.jax.dev/en/latest/gpu_performance_tips.html
    "gpu": {
        # Starts collectives early, so that products hide them.
        "xla_gpu_enable_latency_hiding_scheduler": "true",
        # Collectives of one iteration of a loop run beside products of another.
        "xla_gpu_enable_pipelined_all_gather": "true",
        "xla_gpu_enable_pipelined_all_reduce": "true",
        "xla_gpu_enable_pipelined_reduce_scatter": "true",
        # Joins small collectives, up to this size.
        "xla_gpu_all_gather_combine_threshold_bytes": str(LAYER),
        "xla_gpu_all_reduce_combine_threshold_bytes": str(LAYER),
        "xla_gpu_reduce_scatter_combine_threshold_bytes": str(LAYER),
    },
    # The scheduler is on by default on TPUs; these flags make collectives run beside products.
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
    """Returns "gpu" or "tpu" where jax will find one, else None.

    Looks for jax's plugin and the driver's device files, without starting jax.
    """
    allowed = [name for name in os.environ.get("JAX_PLATFORMS", "").split(",") if name]
    jax_names = {"gpu": ("cuda", "gpu"), "tpu": ("tpu",)}
    for platform in FLAGS:
        if allowed and not any(name in allowed for name in jax_names[platform]):
            continue
        has_plugin = any(importlib.util.find_spec(plugin) for plugin in PLUGINS[platform])
        has_device = any(Path(device).exists() for device in DEVICES[platform])
        if has_plugin and has_device:
            return platform
    return None


def add(platform: str | None = None) -> str:
    """Adds the flags of a platform to its environment variable; call it before jax starts.

    Args:
      platform: "gpu" or "tpu"; None means the result of `accelerator`.

    Returns:
      The flags that were added; "" where none were.
    """
    platform = accelerator() if platform is None else platform
    if platform is None or os.environ.get(SWITCH) == "off":
        return ""
    before = os.environ.get(VARIABLES[platform], "")
    set_by_user = {flag.lstrip("-").partition("=")[0] for flag in before.split()}
    known = _known(platform)
    added = " ".join(
        f"--{name}={value}"
        for name, value in FLAGS[platform].items()
        if name not in set_by_user and name in known
    )
    if added:
        os.environ[VARIABLES[platform]] = f"{before} {added}".strip()
    return added


def in_force() -> str:
    """Returns the flags of all platforms in the environment, for a run's log and its records."""
    return " ".join(filter(None, (os.environ.get(name) for name in VARIABLES.values())))


@functools.cache
def _known(platform: str) -> frozenset[str]:
    """Returns which flags of a platform the library that reads them knows, by their names in it."""
    package, file = READERS[platform]
    spec = importlib.util.find_spec(package)
    if spec is None:
        return frozenset()
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.exists():  # the library has another name on this system
        return frozenset()
    with open(path, "rb") as library:
        with mmap.mmap(library.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return frozenset(
                name for name in FLAGS[platform] if text.find(name.encode() + b"\0") >= 0
            )
