"""Two processes, of which one hangs, is frozen, is killed, or computes something else."""

import signal
import time

import numpy as np
import pytest
from processes import TINY, fingerprints, finish, once_it_trains, start

from qkvjax.files import read_lines

STALL = 6  # seconds
ENDLESS = (
    "--config.train.steps=1000000",
    "--config.optimizer.schedule=constant",
    "--config.train.log_every=1",
    f"--stall_seconds={STALL}",
)
# The program of both processes. What replaces {disturbance} disturbs step 7 of the second.
PROGRAM = """
import sys, time
import jax, numpy as np
from qkvjax.commands import train
from qkvjax.data.dataset import Dataset
from qkvjax.parallel import distributed
from qkvjax.training import run

batch, compile_step, calls = Dataset.batch, run.Run.compile_step, []
{disturbance}
sys.exit(train.main(["qkvjax train", *sys.argv[1:]]))
"""
HANG = """
def disturbed(self, seed, step, *rest):
    if step == 7 and not distributed.is_first():
        time.sleep(1000)
    return batch(self, seed, step, *rest)
Dataset.batch = disturbed
"""
NOT_FINITE = """
def disturbed(self, seed, step, *rest):
    arrays = batch(self, seed, step, *rest)
    if step == 7 and not distributed.is_first():
        arrays["weights"] = arrays["weights"] * np.float32("nan")
    return arrays
Dataset.batch = disturbed
"""
FLIPPED_BIT = """
def flipped(array):
    parts = [np.array(part.data) for part in array.addressable_shards]
    parts[0].view(np.uint32).flat[0] ^= 1 << 12
    parts = [jax.device_put(p, s.device) for p, s in zip(parts, array.addressable_shards)]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)

def disturbed(self, state):
    step = compile_step(self, state)
    class Step:
        memory_analysis = step.memory_analysis
        def __call__(self, leaves, batch):
            leaves, values = step(leaves, batch)
            calls.append(batch)
            if len(calls) == 7 and not distributed.is_first():
                leaves[0] = flipped(leaves[0])
            return leaves, values
    return Step()
run.Run.compile_step = disturbed
"""


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """begin(workdir, disturbance, *flags) -> two processes that train."""
    folder = tmp_path_factory.mktemp("failures")
    (folder / "corpus.txt").write_text("To be, or not to be, that is the question. " * 40)
    source = f"--config.data.source=text:{folder}/corpus.txt"

    def call(workdir, disturbance, *flags):
        program = PROGRAM.replace("{disturbance}", disturbance)
        return start(folder, 2, 1, "-c", program, *TINY, source, f"--workdir={workdir}", *flags)

    return call


def stalled(result):
    """Whether a process ended as a stalled one does, with stack traces."""
    return result.code == 43 and "File " in result.err and "in fit" in result.err


def test_a_hanging_process_ends_the_job_with_the_stacks_of_all(begin, tmp_path):
    began = time.monotonic()
    results = finish(begin(tmp_path / "workdir", HANG, *ENDLESS))
    assert all(map(stalled, results)), results
    assert "in disturbed" in results[1].err
    assert "in disturbed" not in results[0].err
    assert f"stalled: no step, evaluation or save ended within {STALL} s" in results[0].err
    assert time.monotonic() - began < 120


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_is_gone_ends_the_job(begin, tmp_path, way):
    workdir = tmp_path / "workdir"
    started = begin(workdir, "", *ENDLESS)
    once_it_trains(workdir, lambda started: started[1].send_signal(way))(started)
    began = time.monotonic()
    try:
        (result,) = finish(started[:1], 60)
        print(f"{way.name}: noticed, written and ended after {time.monotonic() - began:.1f} s")
        assert stalled(result), result
        if way == signal.SIGKILL:
            assert "another process of the job is gone" in result.err
    finally:
        started[1].kill()


def test_a_loss_that_is_not_finite_on_one_host_changes_nothing_anywhere(begin, tmp_path):
    results = finish(begin(tmp_path / "workdir", NOT_FINITE))
    assert [result.code for result in results] == [0, 0], results
    lines = read_lines(tmp_path / "workdir" / "metrics.jsonl")
    assert [line["train/bad_steps"] for line in lines] == [0, 1, 0, 0]
    assert np.isfinite([line["train/loss"] for line in lines]).all()


@pytest.mark.slow
def test_a_flipped_bit_in_one_copy_is_noticed_and_undone(begin, tmp_path):
    copies = (
        "--config.mesh.fsdp=1",
        "--config.mesh.replica=-1",
        "--config.train.checkpoint_every=5",
    )
    healthy = tmp_path / "healthy"
    hurt = tmp_path / "hurt"
    results = finish(begin(healthy, "", *copies))
    assert [result.code for result in results] == [0, 0], results
    assert "rolled back" not in results[0].out
    results = finish(begin(hurt, FLIPPED_BIT, *copies))
    assert [result.code for result in results] == [0, 0], results
    assert "rolled back: step 10, copies of model." in results[0].out
    assert "came apart between devices (of 1 arrays): back to step 5" in results[0].out
    assert fingerprints(hurt) == fingerprints(healthy)
