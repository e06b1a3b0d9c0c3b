"""Parts of the training loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.data.ahead import ahead
from qkvjax.training.loop import due
from qkvjax.training.window import Window


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
