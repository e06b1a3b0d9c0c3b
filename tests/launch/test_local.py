"""launch/local.sh: several processes on this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qkvjax.training.metrics import read_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what local.sh needs, whose .venv is a stand-in that is this Python."""
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


def test_two_processes_stop_at_a_signal(checkout, tmp_path):
    workdir = tmp_path / "run"
    (tmp_path / "corpus.txt").write_text("To be, or not to be, that is the question. " * 40)
    flags = (
        "--config=configs/lm.py:depth=1", "--config.model.d_model=16", f"--workdir={workdir}",
        f"--config.data.source=text:{tmp_path}/corpus.txt", "--config.data.seq_len=16",
        "--config.data.batch_size=4", "--config.train.steps=100000", "--config.train.log_every=1",
        "--config.model.num_heads=2", "--config.mesh.fsdp=-1",
    )  # fmt: skip
    environment = os.environ | {"QKVJAX_DATA_DIR": str(tmp_path / "data"), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        ["bash", str(checkout), "2", *flags], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not read_lines(workdir / "metrics.jsonl"):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 42, err
    assert "mesh 1x2x1x1x1" in out and "stopped: saved after step" in err
