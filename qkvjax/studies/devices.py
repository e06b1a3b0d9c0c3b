"""Divides the devices of this machine among the runs of a study.

Without this, several runs at a time would all use the first GPU. Environment variables give each
process devices that no other sees; they must be set before jax starts in it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from qkvjax.errors import UserError

# Environment variables that select the devices a process sees.
VISIBLE = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "rocm": "HIP_VISIBLE_DEVICES",
    "tpu": "TPU_VISIBLE_CHIPS",
}
FIRST_TPU_PORT = 8476  # the default of libtpu
# Counts chips, not devices: a TPU v3 shows each of its chips as two devices.
_LIST_DEVICES = """
import jax, json
devices = jax.local_devices()
kind = devices[0].platform
if kind == "gpu":
    kind = "rocm" if "rocm" in devices[0].client.platform_version.lower() else "cuda"
chips = {tuple(device.coords) for device in devices} if kind == "tpu" else devices
print(json.dumps([kind, len(chips)]))
"""


class Devices(NamedTuple):
    """The devices of this machine that jax uses.

    Attributes:
      platform: "cpu", "cuda", "rocm" or "tpu".
      ids: one entry per device, as the variable of `VISIBLE` takes it.
    """

    platform: str
    ids: tuple[str, ...]


def find(environment: Mapping[str, str] = os.environ) -> Devices:
    """Returns the devices that jax finds.

    A short process starts jax and lists them: a process that starts jax on a GPU or TPU occupies
    its memory until it ends, and this one lives as long as the study.

    Raises:
      UserError: jax finds no device.
    """
    if environment.get("JAX_PLATFORMS") == "cpu":
        return Devices("cpu", ("0",))
    process = subprocess.run(
        [sys.executable, "-P", "-c", _LIST_DEVICES],
        capture_output=True,
        text=True,
        env={**environment, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"jax finds no device (JAX_PLATFORMS={environment.get('JAX_PLATFORMS', '')!r};"
            f" {last[:200]}): unset JAX_PLATFORMS, or install the platform that it names, as in"
            " pip install 'qkvjax[cuda]'"
        )
    platform, count = json.loads(process.stdout.splitlines()[-1])
    return Devices(platform, _ids(platform, count, environment))


def _ids(platform: str, count: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the devices that the environment selects (by number or by name), else 0, 1, ..."""
    selected = environment.get(VISIBLE.get(platform, ""), "")
    ids = tuple(filter(None, (word.strip() for word in selected.split(","))))
    return ids[:count] if ids else tuple(map(str, range(count)))


def jobs_at_a_time(requested: int | None, devices: Devices, meshes: Iterable[Mapping]) -> int:
    """Returns how many runs fit beside each other on accelerators.

    Args:
      requested: --jobs; None means 1.
      devices: of this machine.
      meshes: the `mesh` group of each run.

    Raises:
      UserError: several runs at a time on a TPU, and one of them needs several chips.
    """
    if requested in (None, 1):
        return 1
    each = max(_least_devices(mesh) for mesh in meshes)
    if devices.platform == "tpu" and each > 1:
        raise UserError(
            f"--jobs={requested}: on a TPU a run beside others gets one chip, and these want {each}"
            " (config.mesh): use --jobs=1, or a mesh of 1"
        )
    return max(1, min(requested, len(devices.ids) // each))


def _least_devices(mesh: Mapping) -> int:
    """Returns the devices that a mesh needs at least; an axis of -1 takes what is left."""
    return math.prod(size for size in mesh.values() if size > 0)


def environments(devices: Devices, jobs: int) -> list[dict[str, str]]:
    """Returns the environment variables of each of `jobs` processes.

    No two processes see the same accelerator. A single process sees all of them.
    """
    if jobs == 1 or devices.platform == "cpu":
        return [{} for _ in range(jobs)]
    each = 1 if devices.platform == "tpu" else len(devices.ids) // jobs
    parts = [devices.ids[i * each : (i + 1) * each] for i in range(jobs)]
    variable = VISIBLE[devices.platform]
    if devices.platform != "tpu":
        return [{variable: ",".join(part)} for part in parts]
    # libtpu: each process is a slice of one chip, and listens on its own port.
    return [
        {
            variable: part[0],
            "TPU_PROCESS_BOUNDS": "1,1,1",
            "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
            "TPU_PROCESS_ADDRESSES": f"localhost:{FIRST_TPU_PORT + i}",
            "TPU_PROCESS_PORT": str(FIRST_TPU_PORT + i),
            "CLOUD_TPU_TASK_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        for i, part in enumerate(parts)
    ]
