"""A run of thousands of steps, evaluations and checkpoints grows in nothing."""

import json
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = """
import json, os, sys
from pathlib import Path
from qkvjax import config as configs
from qkvjax.training.train import train

config = configs.default()
config.model.update(d_model=16, num_layers=1, num_heads=2, mlp_ratio=1.0)
config.data.update(source="text:" + sys.argv[1], seq_len=16, batch_size=4)
config.train.update(steps=8000, log_every=100, eval_every=200, checkpoint_every=200)
samples = []

def sample(line):
    if line.startswith("step"):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        counts = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
        samples.append((pages, *counts))

workdir = Path(sys.argv[2])
workdir.mkdir()
train(config, workdir, log=sample)
print("found:", json.dumps(samples))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_files_threads_and_steps_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path / "prepared"))
    (tmp_path / "corpus.txt").write_text("To be, or not to be, that is the question. " * 40)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "corpus.txt"), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    samples = np.array(json.loads(done.stdout.partition("found:")[2]))
    assert len(samples) == 80
    early, late = samples[20:40].max(axis=0), samples[60:].max(axis=0)
    pages, files, threads = late / early
    assert pages < 1.05 and files < 1.2 and threads < 1.2, (early, late)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    speed = np.array([json.loads(line)["tokens_per_second"] for line in lines])
    assert np.median(speed[60:]) > 0.7 * np.median(speed[20:40])
