"""launch/local.sh starts several processes on this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qkvjax.files import read_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A copy of local.sh that uses this Python instead of making an environment."""
    for name in ("launch", "configs", "qkvjax", "setup.cfg", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = tmp_path / "local.sh"
    text = (ROOT / "launch" / "local.sh").read_text()
    script.write_text(
        text.replace('cd "$(dirname "${BASH_SOURCE[0]}")/.."', f"cd {tmp_path}").replace(
            'make_environment .venv "$extras"', f"python={sys.executable}"
        )
    )
    return script


@pytest.fixture
def job(checkout, tmp_path):
    """job(act, *flags) -> (exit code, stdout, stderr) of local.sh with two processes.

    They train without end until act(process of local.sh) is called.
    """
    workdir = tmp_path / "run"
    (tmp_path / "corpus.txt").write_text("To be, or not to be, that is the question. " * 40)
    common = (
        "--config=configs/lm.py:depth=1",
        "--config.model.d_model=16",
        f"--workdir={workdir}",
        f"--config.data.source=text:{tmp_path}/corpus.txt",
        "--config.data.seq_len=16",
        "--config.data.batch_size=4",
        "--config.train.steps=100000",
        "--config.train.log_every=1",
        "--config.model.num_heads=2",
        "--config.mesh.fsdp=-1",
    )
    environment = os.environ | {"QKVJAX_DATA_DIR": str(tmp_path / "data"), "JAX_PLATFORMS": "cpu"}

    def call(act, *flags):
        process = subprocess.Popen(
            ["bash", str(checkout), "2", *common, *flags],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            until = time.monotonic() + 120
            while not read_lines(workdir / "metrics.jsonl"):
                assert time.monotonic() < until and process.poll() is None
                time.sleep(0.1)
            act(process)
            out, err = process.communicate(timeout=180)
        finally:
            process.kill()
        return process.returncode, out, err

    return call


def test_two_processes_stop_at_a_signal(job):
    code, out, err = job(lambda process: process.send_signal(signal.SIGTERM))
    assert code == 42, err
    assert "mesh 1x2x1x1x1" in out and "stopped: saved after step" in err


@pytest.mark.slow
def test_a_frozen_process_is_killed_once_the_other_has_ended(job):
    frozen = []

    def freeze(process):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        frozen.extend(
            int(pid)
            for pid in children
            if "--process_id=1" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        )
        os.kill(*frozen, signal.SIGSTOP)

    code, _, err = job(freeze, "--stall_seconds=6")
    assert code == 43 and "stalled: no step, evaluation or save ended" in err, err
    assert not Path(f"/proc/{frozen[0]}").exists()
