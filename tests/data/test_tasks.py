"""Synthetic tasks: their labels are right, and follow from the inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkvjax.data.tasks import TASKS, open_task
from qkvjax.errors import UserError

SMALL = ":train=50:test=20"


def drawn(name, length=16, knobs=""):
    split = open_task(f"synthetic:{name}{SMALL}{knobs}", length).train
    weights = np.ones(split.targets.shape) if split.weights is None else split.weights
    return split.inputs, split.targets, weights > 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("copy", [3, 1, 4, 1, 5]),
        ("reverse", [5, 1, 4, 1, 3]),
        ("sort", [1, 1, 3, 4, 5]),
        ("sub", [6, 8, 5, 8, 4]),
        ("swap", [4, 1, 5, 3, 1]),
    ],
)
def test_tasks_on_digits(name, expected):
    inputs, targets, counts = drawn(name, 5)
    assert counts.all() and inputs.min() == 0 and inputs.max() == 9
    draw = TASKS[name].draw

    class Fixed:
        def integers(self, low, high, shape, dtype):
            return np.array([[3, 1, 4, 1, 5]], dtype)

    assert draw(Fixed(), 1, 5, {})[1][0].tolist() == expected
    assert (draw(np.random.default_rng(0), 9, 5, {})[0] < 10).all()


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 9))
def test_recall_asks_for_the_value_beside_the_key(pairs, queries, extra):
    length = 2 * pairs + queries + extra
    inputs, targets, counts = drawn("recall", length, f":pairs={pairs}:queries={queries}:symbols=6")
    assert (counts.sum(1) == queries).all() and not counts[:, : 2 * pairs].any()
    for row, labels, is_query in zip(inputs, targets, counts):
        table = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]))
        assert len(table) == pairs
        assert all(table[key] == value for key, value in zip(row[is_query], labels[is_query]))
        assert set(row[2 * pairs :][~is_query[2 * pairs :]]) <= {12}  # filler


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_khop_follows_the_pairs(hops):
    inputs, targets, counts = drawn("khop", 24, f":hops={hops}:pairs=5:queries=3")
    for row, labels, is_query in zip(inputs, targets, counts):
        follows = dict(zip(row[:10:2], row[1:10:2]))
        for start, label in zip(row[is_query], labels[is_query]):
            for _ in range(hops):
                start = follows[start]
            assert start == label


def test_induction_repeats_what_followed_the_trigger():
    inputs, targets, counts = drawn("induction", 9, ":symbols=5")
    assert (counts.sum(1) == 1).all() and counts[:, -1].all()
    for row, label in zip(inputs, targets[:, -1]):
        assert (row == 5).sum() == 2 and row[-1] == 5
        assert row[np.flatnonzero(row == 5)[0] + 1] == label < 5


def test_the_same_name_draws_the_same_examples():
    one, two = (open_task("synthetic:recall" + SMALL, 24) for _ in range(2))
    assert one.digest == two.digest != open_task("synthetic:recall" + SMALL, 25).digest
    assert (len(one.train), len(one.validation)) == (50, 20)
    assert len({row.tobytes() for row in one.train.inputs}) == 50  # not one row again and again


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("synthetic:sorted", "did you mean 'sort'"),
        ("synthetic:sort:pairs=3", "is not a setting of sort"),
        ("synthetic:recall:pairs=many", "is not a setting"),
        ("synthetic:recall:pairs=0", "is not a setting"),
        ("synthetic:recall:pairs=7", "take 18 tokens and data.seq_len is 16"),
        ("synthetic:khop:pairs=17", "raise symbols"),
        ("synthetic:khop:pairs=4:hops=4", "4 hops need 5 pairs, and there are 4: raise pairs"),
    ],
)
def test_sources_that_are_not_tasks(source, message):
    with pytest.raises(UserError, match=message):
        open_task(source, 16)
