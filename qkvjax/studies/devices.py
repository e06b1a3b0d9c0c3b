"""The devices of this machine, and which of them each run of a study gets.

Several runs at a time on accelerators would all start on the first device. Each gets devices of its
own by the environment of its process, before jax starts there.
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

# What tells a process which devices it sees.
VISIBLE = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "rocm": "HIP_VISIBLE_DEVICES",
    "tpu": "TPU_VISIBLE_CHIPS",
}
FIRST_TPU_PORT = 8476  # libtpu's usual one
# Chips, not devices: a TPU v3 shows each of its chips as two devices.
_ASK = """
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
      ids: what selects each of them, in the variable of `VISIBLE`.
    """

    platform: str
    ids: tuple[str, ...]


def find(environment: Mapping[str, str] = os.environ) -> Devices:
    """Asks jax, in a process of its own: whoever starts jax on a GPU or TPU keeps its memory.

    Raises:
      UserError: jax finds no device.
    """
    if environment.get("JAX_PLATFORMS") == "cpu":
        return Devices("cpu", ("0",))
    done = subprocess.run(
        [sys.executable, "-P", "-c", _ASK],
        capture_output=True,
        text=True,
        env={**environment, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"jax finds no device (JAX_PLATFORMS={environment.get('JAX_PLATFORMS', '')!r};"
            f" {last[:200]}): unset JAX_PLATFORMS, or install what it names, as in pip install"
            " 'qkvjax[cuda]'"
        )
    platform, count = json.loads(done.stdout.splitlines()[-1])
    return Devices(platform, _ids(platform, count, environment))


def _ids(platform: str, count: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The devices that are visible here already, by number or by name, or all by number."""
    given = environment.get(VISIBLE.get(platform, ""), "")
    listed = tuple(filter(None, (word.strip() for word in given.split(","))))
    return listed[:count] if listed else tuple(map(str, range(count)))


def jobs_at_a_time(asked: int | None, devices: Devices, meshes: Iterable[Mapping]) -> int:
    """How many runs fit beside each other on accelerators; 1 where `asked` is None.

    Args:
      asked: --jobs.
      meshes: the `mesh` groups of the runs.

    Raises:
      UserError: runs beside each other on a TPU that want several chips each.
    """
    if asked in (None, 1):
        return 1
    each = max(_fixed(mesh) for mesh in meshes)
    if devices.platform == "tpu" and each > 1:
        raise UserError(
            f"--jobs={asked}: on a TPU a run beside others gets one chip, and these want {each}"
            " (config.mesh): use --jobs=1, or a mesh of 1"
        )
    return max(1, min(asked, len(devices.ids) // each))


def _fixed(mesh: Mapping) -> int:
    """Devices that a mesh needs at least; an axis of -1 takes what is left."""
    return math.prod(size for size in mesh.values() if size > 0)


def environments(devices: Devices, jobs: int) -> list[dict[str, str]]:
    """Returns what each of `jobs` processes is told, so that no two see the same device.

    One job sees all devices, as does every job on a CPU.
    """
    if jobs == 1 or devices.platform == "cpu":
        return [{} for _ in range(jobs)]
    each = 1 if devices.platform == "tpu" else len(devices.ids) // jobs
    parts = [devices.ids[i * each : (i + 1) * each] for i in range(jobs)]
    variable = VISIBLE[devices.platform]
    if devices.platform != "tpu":
        return [{variable: ",".join(part)} for part in parts]
    # A chip is alone in a slice of one process; each process needs a port of its own.
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
