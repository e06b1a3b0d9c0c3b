"""The training loop and its parts, with a model of one number and checkpoints in memory."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.data.ahead import ahead
from qkvjax.files import read_lines
from qkvjax.training import loop as loops
from qkvjax.training.kept import Kept
from qkvjax.training.loop import Loop, Profile, due
from qkvjax.training.metrics import Metrics
from qkvjax.training.run import Durations
from qkvjax.training.window import Window

TIMING = {"seconds", "tokens_per_second", "mfu"}


def step(i):
    return {
        name: jnp.float32(i * k)
        for name, k in (("loss", 1.0), ("grad_norm", 2.0), ("learning_rate", 3.0), ("bad", 0.0))
    }


def test_a_window_keeps_few_values_and_means_all_of_them():
    window = Window()
    for i in range(2500):
        window.add(step(i))
        assert len(window._waiting) < Window.MANY
    found = window.mean()
    assert found == {
        "train/loss": np.mean(range(2500)),
        "train/grad_norm": 2 * np.mean(range(2500)),
        "train/learning_rate": 3 * 2499,
        "train/bad_steps": 0,
    }
    window.add(step(7))
    assert window.mean()["train/loss"] == 7  # of the new window alone


def test_batches_come_in_order_and_none_too_many():
    made = []
    for i in ahead(made.append(i) or i for i in range(3, 7)):
        assert i <= made[-1] <= min(i + 1, 6)
    assert made == [3, 4, 5, 6]
    assert list(ahead(())) == []


@pytest.mark.parametrize(
    ("at", "every", "last", "is_due"),
    [(4, 2, 9, True), (5, 2, 9, False), (9, 2, 9, True), (4, 0, 9, False), (9, 0, 9, True)],
)
def test_what_is_due(at, every, last, is_due):
    assert due(at, every, last) == is_due


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """The state of a model that learns nothing: the number of its steps."""

    step: jax.Array


class Checkpoints:
    """The newest state that was saved, in memory."""

    def __init__(self):
        self.kept = Kept(1)
        self.step = 0

    def steps(self):
        return [self.step] if self.step else []

    def save(self, step, state):
        assert int(state.step) == step
        self.step = step

    def wait(self):
        pass


def train_step(leaves, batch):
    """A step whose loss is its number; the batch of a step is the number of the step."""
    assert int(leaves[0]) == batch
    return [leaves[0] + 1], step(batch + 1)


@pytest.fixture
def start(tmp_path):
    """start(checkpoints, steps=6, ...) -> a loop that goes on from the newest checkpoint."""

    def make(
        checkpoints,
        steps=6,
        folder=tmp_path,
        eval_every=0,
        max_seconds=None,
        evaluators=None,
        profile=None,
        log=lambda line: None,
        keep_best=False,
    ):
        folder.mkdir(exist_ok=True)
        train = SimpleNamespace(keep_best=keep_best, max_seconds=max_seconds)
        run = SimpleNamespace(
            config=SimpleNamespace(train=train),
            durations=Durations(steps, 0, 1, eval_every, 0, 0),
            tokens_per_step=10,
            train_flops_per_token=1.0,
            mesh=SimpleNamespace(size=1),
        )
        metrics = Metrics(folder, checkpoints.step)
        return Loop(
            run,
            State(jnp.int32(checkpoints.step)),
            train_step,
            make_batch=lambda step: step,
            evaluators=evaluators or {},
            checkpoints=checkpoints,
            metrics=metrics,
            earlier=read_lines(metrics.path, step=int),
            requests=lambda: 0,
            alive=lambda: None,
            check=lambda state: None,
            log=log,
            profile=profile,
        )

    return make


def without_timing(lines):
    return [{name: line[name] for name in line if name not in TIMING} for line in lines]


@pytest.mark.parametrize("eval_every", [0, 1, 2, 3])
def test_a_run_that_max_seconds_stops_again_and_again_is_evaluated_as_a_straight_run(
    start, tmp_path, eval_every
):
    """Each start does one step. An evaluation that is due where the time is up comes at the next
    start, before its first step; that of the run's last step comes at once."""
    evaluated = []

    def score(state, pulse, log):
        evaluated.append(int(state.step))
        return {"bits_per_byte": 1.0 / int(state.step)}

    options = {"eval_every": eval_every, "evaluators": {"eval": score}}
    start(Checkpoints(), folder=tmp_path / "straight", **options).fit()
    expected = list(evaluated)
    assert expected == [step for step in range(1, 7) if due(step, eval_every, 6)]

    evaluated.clear()
    checkpoints = Checkpoints()
    for done in range(1, 7):
        state, summary = start(
            checkpoints, folder=tmp_path / "stopped", max_seconds=0, **options
        ).fit()
        assert int(state.step) == summary["step"] == checkpoints.step == done
        # The steps so far, except that this start's own waits for the next start.
        assert evaluated == [step for step in expected if step < done or step == done == 6]
    straight, stopped = (
        read_lines(tmp_path / name / "metrics.jsonl", step=int) for name in ("straight", "stopped")
    )
    assert without_timing(stopped) == without_timing(straight)
    assert [line["step"] for line in stopped if "eval/bits_per_byte" in line] == expected
