"""Runs that start from a checkpoint of another run, averages of weights, and traces."""

import re

import jax
import numpy as np
import pytest

import qkvjax
from qkvjax import config as configs
from qkvjax.training.checkpoint import Checkpoints, digest
from qkvjax.training.run import prepare_run

WSD = ("--config.optimizer.schedule=wsd", "--config.train.eval_every=0")


def state_of(workdir, step):
    """The whole train state of a checkpoint."""
    run = prepare_run(configs.load(workdir / "config.json"), log=lambda line: None)
    checkpoints = Checkpoints(workdir / "checkpoints")
    with jax.set_mesh(run.mesh):
        state, _ = checkpoints.restore(run.abstract, step)
    checkpoints.close()
    return state


@pytest.fixture
def long(kept, recipe):
    """20 steps under wsd, which fall from step 16 on; every fifth checkpoint stays."""
    return kept("long", f"--config={recipe}", *WSD, "--config.train.keep_every=5")


def test_a_long_run_gives_shorter_ones(run_command, recipe, long, tmp_path):
    """10 steps of a run of 20 and 2 more are, to the last bit, a run of 12: wsd's rate is the same
    until it falls."""
    flags = [f"--config={recipe}", *WSD, "--config.train.steps=12"]
    decayed = tmp_path / "decayed"
    done = run_command(
        "train", *flags, f"--workdir={decayed}", f"--config.train.init_from={long}@10"
    )
    assert done.code == 0, done.err
    assert f"starts from step 10 of {long}, with its optimizer" in done.out
    straight = tmp_path / "straight"
    assert run_command("train", *flags, f"--workdir={straight}").code == 0
    assert digest(state_of(decayed, 12)) == digest(state_of(straight, 12))


def test_another_learning_rate_starts_from_the_weights_alone(run_command, recipe, long, tmp_path):
    flags = ["--config.optimizer.learning_rate=1e-9", "--config.optimizer.final_learning_rate=0"]
    flags += ["--config.train.steps=1", f"--config.train.init_from={long}@5"]
    done = run_command(
        "train", f"--config={recipe}", *WSD, *flags, f"--workdir={tmp_path / 'tuned'}"
    )
    assert done.code == 0, done.err
    assert "starts from the weights of step 5" in done.out
    assert "optimizer.learning_rate" in done.out.partition("new optimizer: ")[2]
    state = state_of(tmp_path / "tuned", 1)
    assert int(state.step) == 1
    for a, b in zip(*map(jax.tree.leaves, (state.model, state_of(long, 5).model))):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_growing_a_run_whose_rate_has_fallen_says_so(run_command, recipe, long, copy):
    flags = [f"--config={recipe}", *WSD, "--config.train.steps=22"]
    grown = run_command("train", *flags, f"--workdir={copy(long)}")
    assert grown.code == 0
    assert "fell from step 16 to 20 and rises again" in grown.out
    assert "--config.train.init_from=RUN@STEP with a STEP up to 16" in grown.out


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("nowhere", [], "there is no workdir .*nowhere"),
        ("{long}@7", [], r"has no step 7; it has \[5, 10, 15, 20\]"),
        ("{long}@20", [], "has 20 steps and this run ends after 20: raise train.steps"),
        ("{long}@5", ["--config.model.d_model=32"], "was saved by another configuration"),
    ],
)
def test_what_cannot_be_started_from(run_command, recipe, long, tmp_path, name, more, message):
    where = f"--config.train.init_from={name.format(long=long)}"
    done = run_command(
        "train", f"--config={recipe}", *WSD, where, *more, f"--workdir={tmp_path / 'run'}"
    )
    assert done.code == 2 and "Traceback" not in done.err
    assert re.search(message, done.err), done.err


def test_an_average_of_the_weights_is_kept_scored_and_loaded(run_command, recipe, tmp_path, lines):
    decay = 0.5
    flags = [f"--config={recipe}", f"--config.optimizer.average={decay}", f"--workdir={tmp_path}"]
    flags += ["--config.train.steps=3", "--config.train.checkpoint_every=1"]
    flags += ["--config.train.keep_checkpoints=9", "--config.train.eval_every=0"]
    assert run_command("train", *flags).code == 0
    states = {step: state_of(tmp_path, step) for step in (1, 2, 3)}
    for step in (2, 3):
        leaves = (states[step - 1].average, states[step].model, states[step].average)
        for before, weights, average in zip(*map(jax.tree.leaves, leaves), strict=True):
            expected = decay * before + (1 - decay) * weights
            np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6)
    model, _, _ = qkvjax.load(tmp_path)
    for a, b in zip(*map(jax.tree.leaves, (model, states[3].average)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert run_command("evaluate", f"--workdir={tmp_path}").code == 0
    trained = lines(tmp_path / "metrics.jsonl")[-1]["eval/bits_per_byte"]
    assert lines(tmp_path / "evaluation.jsonl")[0]["value"] == pytest.approx(trained, rel=1e-6)


def test_a_trace_of_a_few_steps(run_command, recipe, tmp_path):
    flags = [f"--config={recipe}", f"--workdir={tmp_path}", "--config.train.steps=6"]
    done = run_command("train", *flags, "--profile_steps=3,5")
    assert done.code == 0 and "the trace of steps 3 to 4 is in" in done.out
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("steps", ["5", "5,3", "0,2", "a,b", "1,2,3"])
def test_steps_that_are_no_range(run_command, recipe, tmp_path, steps):
    done = run_command(
        "train", f"--config={recipe}", f"--workdir={tmp_path}", f"--profile_steps={steps}"
    )
    assert done.code == 2 and "write FIRST,STOP" in done.err


def test_what_does_not_fit_is_refused_and_leaves_nothing(
    run_command, recipe, tmp_path, monkeypatch
):
    from qkvjax.parallel import host

    workdir = tmp_path / "run"
    flags = [f"--config={recipe}", f"--workdir={workdir}"]
    for free, message in ((2**10, "the train state does not fit"), (2**17, "GiB too little")):
        monkeypatch.setattr(host, "free_device_memory", lambda free=free: free)
        done = run_command("train", *flags)
        assert done.code == 2 and message in done.err and "mesh.fsdp" in done.err
        assert not workdir.exists()
