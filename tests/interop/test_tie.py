"""Tying by averages: which projections count, and how often."""

import numpy as np
import pytest

from qkvjax.errors import UserError
from qkvjax.interop.tie import tied_arrays

PROJECTION = "model.stack.blocks.0.attention.projections.{}.weight"
NORM = "model.stack.blocks.0.attention.norms.{}.gain"
OUTPUT = "model.stack.blocks.0.attention.output.weight"


def arrays_of(pattern, **blocks):
    """Returns {name: array} of blocks of roles, each a random matrix [3, 4] of its own."""
    return {pattern.format(block): array for block, array in blocks.items()}


@pytest.fixture
def q():
    return np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


@pytest.fixture
def k():
    return np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)


@pytest.fixture
def v():
    return np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)


def test_the_mean_is_over_roles_and_not_over_projections(q, v):
    """Two roles use kv, so it counts twice."""
    kv = v
    tied = tied_arrays(
        arrays_of(PROJECTION, q=q, kv=kv), [PROJECTION.format("qkv")], "q-k=v", "q=k=v"
    )
    result = tied[PROJECTION.format("qkv")]
    np.testing.assert_allclose(result, (q + 2 * kv) / 3, rtol=1e-6)
    assert result.dtype == q.dtype
    assert not np.allclose(result, (q + kv) / 2)


@pytest.mark.parametrize("between", ["q-k=v", "q=k-v", "q=v-k"])
def test_tying_in_two_steps_is_tying_in_one(q, k, v, between):
    arrays = arrays_of(PROJECTION, q=q, k=k, v=v)
    blocks = [block.replace("=", "") for block in between.split("-")]
    halfway = tied_arrays(arrays, [PROJECTION.format(b) for b in blocks], "q-k-v", between)
    whole = [PROJECTION.format("qkv")]
    two_steps = tied_arrays(halfway, whole, between, "q=k=v")
    one_step = tied_arrays(arrays, whole, "q-k-v", "q=k=v")
    np.testing.assert_allclose(two_steps[whole[0]], one_step[whole[0]], rtol=1e-5)
    np.testing.assert_allclose(one_step[whole[0]], (q + k + v) / 3, rtol=1e-5)


def test_a_tied_norm_is_the_mean_of_the_norms_there_are(q, k):
    """Values have no norm."""
    arrays = arrays_of(NORM, q=q, k=k)
    tied = tied_arrays(arrays, [NORM.format("qkv")], "q-k-v", "q=k=v")
    np.testing.assert_allclose(tied[NORM.format("qkv")], (q + k) / 2, rtol=1e-6)
    alone = tied_arrays(arrays, [NORM.format("q"), NORM.format("kv")], "q-k-v", "q-k=v")
    np.testing.assert_array_equal(alone[NORM.format("q")], q)
    np.testing.assert_array_equal(alone[NORM.format("kv")], k)


def test_the_mean_is_rounded_once():
    """In float32 the sum of queries and keys would lose the keys."""
    parts = {role: np.full((1, 1), x, np.float32) for role, x in zip("qkv", (2e8, 1.0, -2e8))}
    tied = tied_arrays(arrays_of(PROJECTION, **parts), [PROJECTION.format("qkv")], "q-k-v", "q=k=v")
    assert tied[PROJECTION.format("qkv")] == np.float32(1 / 3)


def test_other_arrays_stay(q):
    assert tied_arrays({OUTPUT: q}, [OUTPUT], "q-k-v", "q=k=v")[OUTPUT] is q


@pytest.mark.parametrize(("old", "new"), [("q-k=v", "q=k-v"), ("q=k=v", "q-k-v")])
def test_a_tie_is_not_undone(old, new):
    with pytest.raises(UserError, match="already tied where"):
        tied_arrays({}, [], old, new)
