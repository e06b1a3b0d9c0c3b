"""Two processes of which one hangs, is frozen, is killed, or computes something else."""

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
# One process of two, disturbed by what is put between: step 7 of the second.
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
    found = batch(self, seed, step, *rest)
    if step == 7 and not distributed.is_first():
        found["weights"] = found["weights"] * np.float32("nan")
    return found
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


def stalled(told):
    """Whether this process ended as a stalled one does, with its stack traces."""
    code, _, err = told
    return code == 43 and "File " in err and "in fit" in err


def test_a_hanging_process_ends_the_job_with_the_stacks_of_all(begin, tmp_path):
    began = time.monotonic()
    told = finish(begin(tmp_path / "workdir", HANG, *ENDLESS))
    assert all(map(stalled, told)), told
    assert "in disturbed" in told[1][2] and "in disturbed" not in told[0][2]
    assert f"stalled: no step, evaluation or save ended within {STALL} s" in told[0][2]
    assert time.monotonic() - began < 120


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_is_gone_ends_the_job(begin, tmp_path, way):
    workdir = tmp_path / "workdir"
    started = begin(workdir, "", *ENDLESS)
    once_it_trains(workdir, lambda started: started[1].send_signal(way))(started)
    began = time.monotonic()
    try:
        told = finish(started[:1], 60)[0]
        print(f"{way.name}: noticed, written and ended after {time.monotonic() - began:.1f} s")
        assert stalled(told), told
        if way == signal.SIGKILL:
            assert "another process of the job is gone" in told[2]
    finally:
        started[1].kill()


def test_what_is_not_finite_on_one_host_changes_nothing_anywhere(begin, tmp_path):
    told = finish(begin(tmp_path / "workdir", NOT_FINITE))
    assert [code for code, *_ in told] == [0, 0], told
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
    healthy, hurt = tmp_path / "healthy", tmp_path / "hurt"
    told = finish(begin(healthy, "", *copies))
    assert [code for code, *_ in told] == [0, 0] and "rolled back" not in told[0][1], told
    told = finish(begin(hurt, FLIPPED_BIT, *copies))
    assert [code for code, *_ in told] == [0, 0], told
    assert "rolled back: step 10, copies of model." in told[0][1]
    assert "came apart between devices (of 1 arrays): back to step 5" in told[0][1]
    assert fingerprints(hurt) == fingerprints(healthy)
