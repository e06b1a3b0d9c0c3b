"""Schedules at steps computed by hand, decay, clipping."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax import config as configs
from qkvjax.models.lm import LanguageModel
from qkvjax.training.optimizer import adamw, decay_steps, decayed, muon, schedule


def rates(name, steps, warmup=10, total=100, peak=1.0, final=0.1):
    rate = schedule(name, peak, final, warmup, total)
    return [float(rate(jnp.int32(step))) for step in steps]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_warm_up_rises_by_one_part_a_step(name):
    assert rates(name, [0, 1, 4, 9]) == pytest.approx([0.1, 0.2, 0.5, 1.0], rel=1e-6)
    assert rates(name, [0], warmup=0) == pytest.approx([1.0])


def test_cosine():
    middle = 10 + 45
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2
    found = rates("cosine", [10, 40, middle, 100, 150])
    assert found == pytest.approx([1.0, quarter, 0.55, 0.1, 0.1], rel=1e-5)


def test_wsd_falls_in_the_last_fifth():
    assert rates("wsd", [10, 79, 80]) == [1.0, 1.0, 1.0]
    assert rates("wsd", [81, 90, 95, 100]) == pytest.approx([0.955, 0.55, 0.325, 0.1], rel=1e-5)


def test_the_last_fifth_is_rounded_and_at_least_one_step():
    assert [decay_steps(total) for total in (1, 2, 7, 8, 9, 100)] == [1, 1, 1, 2, 2, 20]
    found = rates("wsd", [6, 7, 8, 9], warmup=0, total=9)
    assert found == pytest.approx([1.0, 1.0, 0.55, 0.1], rel=1e-5)


def test_multistep_drops_at_half_and_at_three_quarters_of_the_run():
    found = rates("multistep", [10, 49, 50, 74, 75, 99, 150])
    assert found == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01, 0.01], rel=1e-5)
    found = rates("multistep", [2, 3, 4, 5], warmup=0, total=6)  # 4.5 steps are three quarters
    assert found == pytest.approx([1.0, 0.1, 0.1, 0.01], rel=1e-5)


def test_constant_stays():
    assert rates("constant", [10, 50, 99, 1000]) == [1.0] * 4


def test_no_warm_up_longer_than_the_run_breaks_it():
    for name in ("cosine", "wsd", "constant"):
        found = rates(name, range(0, 6), warmup=20, total=5)
        assert found == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3]) or name == "wsd"
        assert all(0 < rate < 0.31 for rate in found)


@pytest.fixture(scope="module")
def model(tiny):
    options = {"use_bias": True, "norm": "layernorm", "position": "learned"}
    spec = tiny(num_layers=1, mlp_ratio=2.0, **options)  # wide, tall and square matrices
    shapes = jax.eval_shape(lambda: LanguageModel(spec, key=jax.random.key(0)))
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)


def test_matrices_decay_and_gains_and_biases_do_not(model):
    """One step with a gradient of zero: what moves is what decays."""
    optimizer = configs.default().optimizer
    optimizer.weight_decay = 0.5
    moved = {}
    for optimizer.decay in ("matrices", "all"):
        tx = adamw(optimizer, lambda step: 0.1)
        updates, _ = tx.update(jax.tree.map(np.zeros_like, model), tx.init(model), model)
        moved[optimizer.decay] = {
            jax.tree_util.keystr(path, simple=True, separator="."): float(np.unique(leaf).item())
            for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
        }
    names = moved["all"].keys()
    assert all(moved["all"][name] == pytest.approx(-0.05) for name in names)
    vectors = {name for name in names if name.split(".")[-2] in ("gain", "bias")}
    assert vectors and any(".bias" in n for n in vectors) and any(".gain" in n for n in vectors)
    for name, value in moved["matrices"].items():
        assert value == (0 if name in vectors else pytest.approx(-0.05)), name
    assert any("positions" in name for name in names - vectors)


def test_every_leaf_of_two_dimensions_decays_except_stacked_vectors(model):
    """The scan stacks gains to two dimensions; a rule by dimension would decay them."""
    pairs = zip(jax.tree.leaves(decayed(model)), jax.tree.leaves(model))
    flags = {(bool(flag), leaf.ndim) for flag, leaf in pairs}
    assert (False, 2) in flags and (True, 2) in flags and (True, 1) not in flags


def test_adamw_by_hand():
    """Two steps on one number."""
    optimizer = configs.default().optimizer
    optimizer.update(b1=0.9, b2=0.95, weight_decay=0.1, decay="all")
    tx = adamw(optimizer, lambda step: 0.01)
    weight, state = jnp.float32(2.0), None
    state, mu, nu, w = tx.init(weight), 0.0, 0.0, 2.0
    for t, gradient in enumerate((0.5, -0.25), 1):
        updates, state = tx.update(jnp.float32(gradient), state, weight)
        weight = weight + updates
        mu, nu = 0.9 * mu + 0.1 * gradient, 0.95 * nu + 0.05 * gradient**2
        direction = mu / (1 - 0.9**t) / (math.sqrt(nu / (1 - 0.95**t)) + 1e-8)
        w -= 0.01 * (direction + 0.1 * w)
    assert float(weight) == pytest.approx(w, rel=1e-6)


def orthogonal(momentum):
    """Five quintic Newton-Schulz steps in float64, with Jordan's coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = momentum / np.linalg.norm(momentum)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def test_muon_by_hand(model):
    """Matrices of blocks, stacked or not, by Newton-Schulz; everything else as AdamW."""
    options = configs.default().optimizer
    options.weight_decay = 0.3
    rng = np.random.default_rng(0)
    grads = [
        jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), model)
        for _ in range(2)
    ]
    rate, found = (lambda step: 0.01), {}
    for name, make in (("muon", muon), ("adamw", adamw)):
        tx = make(options, rate)
        state = tx.init(model)
        for gradient in grads:
            updates, state = tx.update(gradient, state, model)
        found[name] = dict(jax.tree_util.tree_leaves_with_path(updates))
    params = dict(jax.tree_util.tree_leaves_with_path(model))
    first, second = (dict(jax.tree_util.tree_leaves_with_path(g)) for g in grads)
    moved = 0
    for path, update in found["muon"].items():
        name = jax.tree_util.keystr(path)
        inside = any(part in name for part in ("projections", "output", "up", "gate", "down"))
        if not (inside and "weight" in name):
            np.testing.assert_array_equal(update, found["adamw"][path], err_msg=name)
            continue
        moved += 1
        one, two = (np.asarray(g[path], np.float64) for g in (first, second))
        mean = 0.05 * (0.95 * one + two)  # and Nesterov's, each without its bias
        ahead = 0.95 * mean / (1 - 0.95**3) + 0.05 * two / (1 - 0.95**2)
        for i, matrix in enumerate(ahead):
            scale = 0.2 * max(matrix.shape) ** 0.5
            expected = -0.01 * (scale * orthogonal(matrix) + 0.3 * np.asarray(params[path][i]))
            np.testing.assert_allclose(update[i], expected, atol=1e-6, err_msg=name)
    assert moved == 7 * len(model.stack.blocks)
