"""Starts the processes of a study: `qkvjax study ...` with one more flag, on devices of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

from qkvjax.errors import UserError
from qkvjax.studies.grid import Study
from qkvjax.studies.task import Task

POLL_SECONDS = 0.5  # between two looks at the running processes


class Slot(NamedTuple):
    """Where one of the runs at a time is trained.

    Attributes:
      environment: environment variables of the process, which select its devices.
      core: CPU core that the process is pinned to; None means all.
    """

    environment: dict[str, str]
    core: int | None


def start_run(study: Study, task: Task, arguments: list[str], slot: Slot) -> subprocess.Popen:
    """Starts the process that trains one task; its output goes to train.log in the run's folder.

    Raises:
      UserError: the folder of the run cannot be made.
    """
    folder = study.workdir / task.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}): remove what is in its way"
        ) from None
    command, environment = study_command(
        study, arguments, f"--point={task.number}", slot.environment
    )
    pin = None if slot.core is None else lambda: os.sched_setaffinity(0, {slot.core})
    with (folder / "train.log").open("a") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=pin
        )


def study_command(
    study: Study, arguments: list[str], flag: str, environment: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Returns the command line and the environment of this study with one more flag.

    Args:
      study: whose folder keeps the compiled programs.
      arguments: command line of the study.
      flag: `--point=K` or `--measure`.
      environment: variables that select devices.
    """
    # With -P the current folder is not on the path: a random.py there must not replace the
    # library's module.
    command = [sys.executable, "-P", "-m", "qkvjax", "study", *arguments, flag]
    package = str(Path(__file__).parents[2])
    paths = [package, os.environ.get("PYTHONPATH")]
    # All seeds of a variant run the same program: the first compiles it, the others load it.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(_compiled_programs(study)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    python = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return command, {**cache, **os.environ, **python, **environment}


def _compiled_programs(study: Study) -> Path:
    """Returns the folder of compiled programs for CPUs with the instructions of this one."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return study.workdir / ".compiled" / f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"
