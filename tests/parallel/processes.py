"""Starts what this folder's tests run in processes of their own: several devices, several hosts."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def environment(folder, devices, **more):
    """Of a process with so many virtual CPU devices that prepares its data in `folder`."""
    flags = more.pop("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    return os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        "JAX_PLATFORMS": "cpu",
        "QKVJAX_DATA_DIR": str(folder / "prepared"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        **more,
    }


def free_port():
    """A port that nobody listens on, outside the range that the kernel gives away by itself."""
    return random.SystemRandom().randrange(10_000, 30_000)


def start(folder, count, devices, *args, odd=(), of=None, **more):
    """Starts `python *args` so many times, as the first processes of a job of `of` (None: all);
    `odd` are more flags of the last one."""
    port, started = free_port(), []
    for i in range(count):
        flags = (
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={of or count}",
            f"--process_id={i}",
            *(odd if i == count - 1 else ()),
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
    """[(exit code, stdout, stderr)] of processes, which are killed when they take too long."""
    until, told = time.monotonic() + seconds, []
    try:
        for process in started:
            out, err = process.communicate(timeout=max(1, until - time.monotonic()))
            told.append((process.returncode, out, err))
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    return told


def once_it_trains(workdir, act):
    """Calls act(processes) when the run has written a line of metrics."""

    def wait(started):
        until = time.monotonic() + 120
        while not read_lines(workdir / "metrics.jsonl"):
            assert time.monotonic() < until and all(p.poll() is None for p in started)
            time.sleep(0.05)
        act(started)

    return wait


def losses(workdir):
    """Of training, by the step of their line."""
    return {line["step"]: line["train/loss"] for line in read_lines(workdir / "metrics.jsonl")}


def fingerprints(workdir, step=20):
    """Of every array of a checkpoint: equal only when every bit is."""
    text = (workdir / "checkpoints" / str(step) / "manifest" / "metadata").read_text()
    return json.loads(text)["arrays"]


def found(folder, program, count=1, devices=8, **more):
    """What `program`, a text of Python run with `count` processes over so many devices, prints
    behind "found: " in the first, from JSON."""
    told = finish(start(folder, count, devices // count, "-c", program, **more), 3600)
    for code, _, err in told:
        assert code == 0, err[-3000:]
    return json.loads(told[0][1].partition("found: ")[2].partition("\n")[0])
