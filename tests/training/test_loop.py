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
from qkvjax.training import window as windows
from qkvjax.training.guard import Rollback
from qkvjax.training.kept import Kept
from qkvjax.training.loop import Loop, Profile, due, is_unscored
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
        log_every=1,
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
            durations=Durations(steps, 0, log_every, eval_every, 0, 0),
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


@pytest.mark.parametrize(
    ("first", "stop", "traced"), [(1, 3, [0, 2]), (3, 5, [2, 4]), (4, 99, [3, 6])]
)
def test_a_trace_has_the_steps_that_were_asked_for(start, monkeypatch, first, stop, traced):
    """It begins before the first of them and ends when the last of them, or of the run, is done."""
    at = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: at.append(loop.step))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: at.append(loop.step))
    loop = start(Checkpoints(), profile=Profile(first, stop, "traces"))
    loop.fit()
    assert at == traced


def test_the_best_of_equal_evaluations_is_the_first(start):
    losses = iter([3.0, 2.0, 2.0, 2.5, 2.0, 4.0])
    evaluators = {"eval": lambda state, pulse, log: {"bits_per_byte": next(losses)}}
    checkpoints = Checkpoints()
    start(checkpoints, eval_every=1, evaluators=evaluators, keep_best=True).fit()
    assert checkpoints.kept.best == 2
    again = start(checkpoints, steps=6, keep_best=True)  # also from the lines of metrics
    assert (again.best, checkpoints.kept.best) == (2.0, 2)


def test_an_evaluator_that_was_not_reached_is_made_up_for(start, tmp_path):
    """Of two evaluators, the second fails: the next start scores both anew."""
    scored = []

    def evaluator(name, fails=False):
        def score(state, pulse, log):
            if fails:
                raise RuntimeError("no memory")
            scored.append((name, int(state.step)))
            return {"loss": float(state.step)}

        return score

    checkpoints = Checkpoints()
    with pytest.raises(RuntimeError, match="no memory"):
        evaluators = {"one": evaluator("one"), "two": evaluator("two", fails=True)}
        start(checkpoints, steps=4, eval_every=2, evaluators=evaluators).fit()
    scored.clear()
    evaluators = {"one": evaluator("one"), "two": evaluator("two")}
    start(checkpoints, steps=4, eval_every=2, evaluators=evaluators).fit()
    assert scored == [("one", 2), ("two", 2), ("one", 4), ("two", 4)]


def test_an_evaluation_that_the_time_limit_ends_is_due_at_the_next_start(start, tmp_path):
    """It was to be made up for; no step follows it, which would make it forgotten."""
    scored = []

    def score(state, pulse, log):
        pulse()
        scored.append(int(state.step))
        return {"loss": float(state.step)}

    checkpoints = Checkpoints()
    options = {"steps": 4, "eval_every": 2, "evaluators": {"eval": score}}
    for _ in range(2):
        start(checkpoints, max_seconds=0, **options).fit()
    assert checkpoints.step == 2 and scored == []
    state, summary = start(checkpoints, max_seconds=0, **options).fit()
    assert int(state.step) == summary["step"] == 2 and scored == []
    start(checkpoints, **options).fit()
    assert scored == [2, 4]


@pytest.mark.parametrize(
    ("line", "step", "unscored"),
    [
        ({"step": 4, "train/loss": 1.0}, 4, True),
        ({"step": 4, "one/loss": 1.0}, 4, True),  # "two" is new
        ({"step": 4, "one/loss": 1.0, "two/loss": 1.0}, 4, False),
        ({"step": 2, "one/loss": 1.0, "two/loss": 1.0}, 4, True),
        ({"step": 3, "train/loss": 1.0}, 3, False),  # not due
        ({"step": 5, "train/loss": 1.0}, 5, True),  # the last step is always due
        ({"step": 0}, 0, False),
    ],
)
def test_a_step_is_unscored_where_a_due_evaluator_is_missing(line, step, unscored):
    run = SimpleNamespace(durations=Durations(5, 0, 1, 2, 0, 0))
    evaluators = {"one": None, "two": None}
    assert is_unscored([{"step": 1}, line], step, run, evaluators) == unscored
    assert not is_unscored([line], step, run, {})


class Time:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


def test_seconds_and_speed_are_of_training_alone(start, tmp_path, monkeypatch):
    """A step takes 2 s, the first of each start 30 s, an evaluation 1000 s. The speed leaves out
    a start's first step and all evaluations, also the one that the second start makes up for."""
    clock = Time()
    monkeypatch.setattr(loops, "time", clock)
    monkeypatch.setattr(windows, "time", clock)

    def slow(state, pulse, log):
        clock.now += 1000
        return {"loss": 1.0}

    def lines():
        found = read_lines(tmp_path / "metrics.jsonl", step=int)
        return {line["step"]: (line["seconds"], line["tokens_per_second"]) for line in found}

    def timed(loop):
        plain = loop.train_step
        first = loop.step

        def train_step(leaves, batch):
            clock.now += 30 if batch == first else 2
            return plain(leaves, batch)

        loop.train_step = train_step
        return loop

    checkpoints = Checkpoints()
    options = {"steps": 8, "eval_every": 4, "evaluators": {"eval": slow}, "log_every": 4}
    timed(start(checkpoints, max_seconds=35, **options)).fit()
    assert lines() == {4: (36.0, 5.0)}
    timed(start(checkpoints, **options)).fit()
    assert lines() == {4: (36.0, 5.0), 8: (72.0, 5.0)}


@pytest.mark.parametrize(
    ("steps", "bad", "rolls_back"), [(20, 7, False), (20, 8, True)] + [(6, 2, False), (6, 3, True)]
)
def test_eight_bad_steps_in_a_row_or_half_of_a_short_run_roll_back(start, steps, bad, rolls_back):
    loop = start(Checkpoints(), steps=steps, log_every=steps)
    plain = loop.train_step

    def train_step(leaves, batch):
        leaves, values = plain(leaves, batch)
        return leaves, values | {"bad": jnp.float32(1 <= batch < 1 + bad)}

    loop.train_step = train_step
    if not rolls_back:
        assert int(loop.fit()[0].step) == steps
        return
    with pytest.raises(Rollback, match=f"{bad} bad steps in a row") as raised:
        loop.fit()
    assert raised.value.step == steps and raised.value.skip
