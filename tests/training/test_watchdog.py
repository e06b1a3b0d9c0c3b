"""What counts as progress: data that are prepared, too."""

import os
import subprocess
import sys
import textwrap
import time

import pytest

from qkvjax.training import watchdog as watching
from qkvjax.training.watchdog import watchdog

# Preparing takes 8 s, of which each document is a sign of progress; then the program ends.
PROGRAM = """
import sys, time
import tensorflow_datasets
from qkvjax.commands import train
from qkvjax.data import sources
from qkvjax.evaluation import evaluators
from qkvjax.training import checkpoint, loop, run

documents = sources.Source.documents

def slow(self):
    for document in documents(self):
        time.sleep({seconds})
        yield document

def end(config, dataset):
    print("prepared", dataset.num_documents)
    raise SystemExit(0)

sources.Source.documents = slow
run.spec_of = end
sys.exit(train.main(["qkvjax train", *sys.argv[1:]]))
"""


def train(folder, seconds):
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i} words of a document. " * 9)
    environment = os.environ | {
        "QKVJAX_DATA_DIR": str(folder / "prepared"),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    flags = ("--config=configs/lm.py:depth=1", "--config.data.seq_len=16", "--stall_seconds=4")
    return subprocess.run(
        [
            *(sys.executable, "-c", PROGRAM.replace("{seconds}", str(seconds)), *flags),
            *("--init_seconds=4", f"--workdir={folder}/run"),
            f"--config.data.source=text:{folder}/*.txt",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_corpus_that_takes_longer_than_a_stall_is_prepared(tmp_path):
    done = train(tmp_path, 0.2)
    assert done.returncode == 0, done.stderr
    assert "prepared 40" in done.stdout


def test_a_source_that_hangs_is_noticed(tmp_path):
    done = train(tmp_path, 1000)
    assert done.returncode == 43
    assert "in slow" in done.stderr


@pytest.mark.parametrize(("starting", "ends"), [(True, False), (False, True)])
def test_a_sign_of_the_start_leaves_time_to_compile(monkeypatch, starting, ends):
    given_up = []
    monkeypatch.setattr(watching, "_give_up", given_up.append)
    with watchdog(0.3, start=30) as alive:
        alive(starting=starting)
        time.sleep(2.5)  # it looks once a second at first
    assert bool(given_up) == ends


def test_a_batch_larger_than_an_epoch_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path / "prepared"))
    from qkvjax import config as configs
    from qkvjax.training.run import prepare_run

    (tmp_path / "a.txt").write_text(textwrap.fill("words of a document " * 200))
    config = configs.default()
    config.model.update(d_model=16, num_heads=2)
    config.data.update(source=f"text:{tmp_path}/a.txt", seq_len=16, batch_size=5000)
    config.train.steps = "2ep"
    told = []
    run = prepare_run(configs.resolve(config), log=told.append)
    assert run.durations.steps == 2
    (line,) = [line for line in told if "larger than an epoch" in line]
    rows = len(run.dataset.train)
    assert f"5,000 rows is larger than an epoch of {rows}" in line
    assert f"{10_000 / rows:,.0f} passes" in line
    config.data.batch_size = 4
    told.clear()
    prepare_run(configs.resolve(config), log=told.append)
    assert not any("larger than an epoch" in line for line in told)
