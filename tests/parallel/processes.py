"""Helpers of this folder's tests: they start processes with several devices, as several hosts."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from qkvjax.files import read_lines

ROOT = Path(__file__).parents[2]
TINY = (
    "--config=configs/lm.py:depth=1",
    "--config.model.d_model=16",
    "--config.model.num_heads=2",
    "--config.data.seq_len=16",
    "--config.data.batch_size=4",
    "--config.train.steps=20",
    "--config.train.log_every=5",
    "--config.train.checkpoint_every=10",
    "--config.train.eval_every=100%",
    "--config.mesh.fsdp=-1",
)


class Result(NamedTuple):
    """How a process ended and what it printed."""

    code: int
    out: str
    err: str


def environment(folder, devices, **more):
    """The environment of a process with virtual CPU devices that prepares its data in `folder`.

    Args:
      devices: how many.
      more: further variables.
    """
    flags = more.pop("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    return os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        "JAX_PLATFORMS": "cpu",
        "QKVJAX_DATA_DIR": str(folder / "prepared"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        **more,
    }


def free_port():
    """A port outside the range from which the kernel gives ports to anybody who asks for one."""
    return random.SystemRandom().randrange(10_000, 30_000)


def start(folder, count, devices, *args, last_flags=(), job_size=None, **more):
    """Starts `python *args` as the first `count` processes of a job.

    Args:
      folder: where data is prepared.
      devices: of each process.
      last_flags: more flags for the last process.
      job_size: how many processes they are told to wait for; None means `count`.
      more: environment variables.
    """
    port = free_port()
    started = []
    for i in range(count):
        flags = (
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={job_size or count}",
            f"--process_id={i}",
            *(last_flags if i == count - 1 else ()),
        )
        started.append(
            subprocess.Popen(
                [sys.executable, *args, *flags],
                env=environment(folder, devices, **more),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(started, seconds=240):
    """Waits for processes, kills those that take longer, and returns a `Result` of each."""
    until = time.monotonic() + seconds
    results = []
    try:
        for process in started:
            out, err = process.communicate(timeout=max(1, until - time.monotonic()))
            results.append(Result(process.returncode, out, err))
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    return results


def once_it_trains(workdir, act):
    """Returns a function of processes that calls act(processes) once their run has metrics."""

    def wait(started):
        until = time.monotonic() + 120
        while not read_lines(workdir / "metrics.jsonl"):
            assert time.monotonic() < until and all(p.poll() is None for p in started)
            time.sleep(0.05)
        act(started)

    return wait


def losses(workdir):
    """The losses of training by step."""
    return {line["step"]: line["train/loss"] for line in read_lines(workdir / "metrics.jsonl")}


def fingerprints(workdir, step=20):
    """The fingerprint of every array of a checkpoint: equal only where every bit is."""
    text = (workdir / "checkpoints" / str(step) / "manifest" / "metadata").read_text()
    return json.loads(text)["arrays"]


def print_result(value):
    """Prints a value for `run_program`, as JSON."""
    print("result: " + json.dumps(value), flush=True)


def run_program(folder, program, count=1, devices=8, **more):
    """Runs a program and returns what its first process gave to `print_result`.

    Args:
      program: text of Python.
      count: processes.
      devices: of all processes together.
      more: environment variables.
    """
    results = finish(start(folder, count, devices // count, "-c", program, **more), 3600)
    for result in results:
        assert result.code == 0, result.err[-3000:]
    return json.loads(results[0].out.partition("result: ")[2].partition("\n")[0])
