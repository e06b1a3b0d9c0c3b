"""Steps that must not count: what is left out, what is kept, what is never left out wrongly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qkvjax import config as configs
from qkvjax.training import guard
from qkvjax.training.loop import Window
from qkvjax.training.step import init_state, make_optimizer, make_train_step

judge = jax.jit(functools.partial(guard.judge, threshold=10.0))


def series(losses, norms=None):
    """Whether each of a series of steps is good, and what is known after them."""
    recent, found = guard.no_steps(), []
    for loss, norm in zip(losses, np.ones(len(losses)) if norms is None else norms):
        good, recent = judge(recent, jnp.float32(loss), jnp.float32(norm))
        found.append(bool(good))
    return found, recent


def calm(steps, seed=0):
    rng = np.random.default_rng(seed)
    return 3 * np.exp(-np.arange(steps) / 300) + rng.normal(0, 0.05, steps)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_bad_from_the_first_step_on_and_poisons_nothing(bad):
    losses, norms = calm(300), np.ones(300)
    losses[[0, 5, 200]], norms[[7, 230]] = bad, bad
    found, recent = series(losses, norms)
    assert [i for i, good in enumerate(found) if not good] == [0, 5, 7, 200, 230]
    assert int(recent.count) == 295 and np.isfinite(recent.values).all()


def test_a_spike_is_bad_once_there_is_something_to_hold_it_against():
    losses, norms = calm(400), np.exp(np.random.default_rng(1).normal(0, 0.3, 400))
    losses[[50, 250]] = 9  # the first is too early to tell
    norms[300] = 1e3
    found, _ = series(losses, norms)
    assert [i for i, good in enumerate(found) if not good] == [250, 300]


def test_without_a_threshold_no_height_is_bad():
    good, recent = guard.judge(None, jnp.float32(1e9), jnp.float32(1e9), None)
    assert bool(good) and recent is None


OPTIONS = {
    "adamw": {},
    "accumulated": {"train.accumulation": 2},
    "muon": {"optimizer.name": "muon"},
    "masters": {"train.param_dtype": "bfloat16"},
    "spikes and an average": {"optimizer.skip_spikes": 10.0, "optimizer.average": 0.9},
}


def make_step(tiny, **fields):
    """(compiled step, state before the first)."""
    config = configs.default()
    config.optimizer.update(learning_rate=1e-2, final_learning_rate=1e-3)
    for name, value in fields.items():
        configs.set_field(config, name, value)
    tx, rate = make_optimizer(config, total_steps=400, warmup_steps=2)
    step = jax.jit(make_train_step(config, tx, rate))
    return step, lambda seed=0: init_state(tiny(num_layers=1), tx, jax.random.key(seed), config)


def batch(seed, accumulation=1, weight=1.0):
    ids = np.random.default_rng(seed).integers(0, 61, (accumulation, 4, 13), dtype=np.int32)
    shape = ids[..., 1:].shape
    weights = np.ones(shape, np.float32)
    weights[-1, 0, 0] = weight  # of one token in one micro-batch
    return {
        "inputs": ids[..., :-1],
        "targets": ids[..., 1:],
        "weights": weights,
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
    }


@pytest.mark.parametrize("options", OPTIONS)
def test_a_bad_step_changes_the_count_of_steps_alone(tiny, options):
    fields = OPTIONS[options]
    step, begin = make_step(tiny, **fields)
    parts, state = fields.get("train.accumulation", 1), begin()
    for i, weight in enumerate([np.nan, 1, np.inf, 1, np.nan]):  # in warm-up as well
        after, metrics = step(state, batch(i, parts, weight))
        assert bool(metrics["bad"]) == (weight != 1)
        same = [
            np.array_equal(a, b)
            for a, b in zip(
                *map(
                    jax.tree.leaves,
                    ((s.model, s.optimizer, s.recent, s.average) for s in (state, after)),
                )
            )
        ]
        assert all(same) == (weight != 1)
        assert int(after.step) == i + 1
        state = after
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.model))


def test_means_leave_bad_steps_out_and_count_them():
    window = Window()
    for loss in (1.0, np.nan, 3.0, np.nan, np.nan):
        window.add(
            {
                "loss": jnp.float32(loss),
                "learning_rate": jnp.float32(0.1),
                "bad": jnp.isnan(jnp.float32(loss)),
            }
        )
    found = window.mean()
    assert found["train/loss"] == 2 and found["train/bad_steps"] == 3
    assert window.in_a_row == 2 == window.most_in_a_row
    window.add({"loss": jnp.float32(5), "learning_rate": jnp.float32(0), "bad": jnp.bool_(False)})
    assert window.mean()["train/bad_steps"] == 0 and window.in_a_row == 0


events = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20), st.booleans()), max_size=5)


@given(events)
@example([(10, 10, True), (5, 10, True)])  # back to before what was left out already
def test_data_that_were_left_out_never_come_back(events):
    """Along any history of rollbacks: each goes from a step back to one before it."""
    rollbacks, left_out = [], set()
    for to, length, skip in events:
        reached = to + length
        if skip:
            left_out |= {guard.data_step(step, rollbacks) for step in range(to, reached)}
        before = [guard.data_step(step, rollbacks) for step in range(to)]
        rollbacks.append({"step": reached, "to": to, "skip": length if skip else 0})
        ahead = [guard.data_step(step, rollbacks) for step in range(100)]
        assert ahead == sorted(set(ahead)) and ahead[:to] == before  # each once, in order
        assert not left_out & set(ahead)
        assert set(range(ahead[-1])) - set(ahead) <= left_out  # and no others are left out


@pytest.mark.slow
def test_of_ten_thousand_healthy_steps_none_is_left_out(tiny):
    """Training on a language of a few words, at a high learning rate, over many seeds."""
    step, begin = make_step(tiny, **{"optimizer.skip_spikes": 10.0})
    left_out = steps = 0
    for seed in range(30):
        state, rng = begin(seed), np.random.default_rng(seed)
        words = rng.integers(0, 61, (12, 5))
        for _ in range(400):
            text = words[rng.integers(0, 12, (1, 4, 3))].reshape(1, 4, 15)[..., :13]
            rows = batch(0) | {
                "inputs": text[..., :-1].astype(np.int32),
                "targets": text[..., 1:].astype(np.int32),
            }
            state, metrics = step(state, rows)
            left_out += bool(metrics["bad"])
            steps += 1
        assert metrics["loss"] < 2.5
    assert steps >= 10_000 and left_out == 0
