"""One step: accumulation, clipping, the z-loss, dropout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qkvjax import config as configs
from qkvjax.models.loss import cross_entropy
from qkvjax.models.spec import model_spec
from qkvjax.training.step import init_state, make_optimizer, make_train_step

STEPS = 4
QUICK = {"xla_backend_optimization_level": 0}  # halves the time to compile


@pytest.fixture(scope="module")
def step(tiny):
    """step(accumulation, **fields) -> (jitted step, state before the first one), made once."""

    @functools.cache
    def make(accumulation=1, seed=0, **fields):
        config = configs.default()
        config.seed, config.train.accumulation = seed, accumulation
        config.optimizer.update(learning_rate=1e-2, final_learning_rate=1e-3)
        for name, value in fields.items():
            configs.set_field(config, name.replace("__", "."), value)
        model = {"dropout": config.model.dropout, "mlp": config.model.mlp}
        spec = tiny(num_layers=1, sharing="q-k=v", **model)
        tx, rate = make_optimizer(config, total_steps=20, warmup_steps=2)
        one = jax.jit(make_train_step(config, tx, rate), compiler_options=QUICK)
        return one, init_state(spec, tx, jax.random.key(seed), config)

    return make


@pytest.fixture(scope="module")
def train(step):
    """train(steps, accumulation, **fields) -> (state, metrics), on random batches with padding."""

    @functools.cache
    def run(steps=STEPS, accumulation=1, **fields):
        one, state = step(accumulation, **fields)
        found = []
        for i in range(steps):
            state, metrics = one(state, batch(i, accumulation))
            found.append(jax.device_get(metrics))
        return state, found

    return run


def batch(seed, accumulation, size=8, length=12):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 61, (size, length + 1), dtype=np.int32)
    # Rows have different numbers of labels, so that a mean of means is another number.
    weights = np.arange(length) < rng.integers(1, length + 1, (size, 1))
    arrays = {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": weights.astype(np.float32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (size, length)),
        "segment_ids": np.ones((size, length), np.int32),
    }
    return {k: a.reshape(accumulation, -1, length) for k, a in arrays.items()}


def losses(found):
    return np.array([metrics["loss"] for metrics in found])


def test_accumulation_does_not_change_the_loss(train):
    whole, one = train(accumulation=1)
    for parts in (2, 4):
        state, found = train(accumulation=parts)
        np.testing.assert_allclose(losses(found), losses(one), rtol=1e-5)
        norms = [[m["grad_norm"] for m in metrics] for metrics in (one, found)]
        np.testing.assert_allclose(*norms, rtol=1e-4)
        for a, b in zip(jax.tree.leaves(whole.model), jax.tree.leaves(state.model)):
            np.testing.assert_allclose(a, b, atol=2e-4)


ROUTED = {
    "model__mlp": "swiglu(experts=4,top=2,balance=3,z_loss=2)",
    "optimizer__clip_norm": 0.0,
}


def gradient_of(state):
    """The first moments after one step, as the gradient that they are (1 - b1) times of."""
    return [leaf / (1 - 0.9) for leaf in jax.tree.leaves(state.optimizer[0].mu)]


def test_the_losses_of_a_router_join_the_loss_with_their_weights(step):
    one, state = step(1, **ROUTED)
    data = {name: array[0] for name, array in batch(0, 1, size=4).items()}

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def expected(model):
        x, router = model.hidden(data["inputs"], data["positions"], data["segment_ids"])
        nats, _ = cross_entropy(model.logits(x), data["targets"], data["weights"])
        mean = jnp.sum(nats) / jnp.sum(data["weights"])
        return mean + 3 * router["balance"] + 2 * router["z_loss"], (mean, router)

    (_, (loss, router)), grads = expected(state.model)
    after, metrics = one(state, batch(0, 1, size=4))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)  # without them
    for name, value in router.items():
        assert float(metrics[f"router_{name}"]) == pytest.approx(float(value), rel=1e-5), name
    for a, b in zip(gradient_of(after), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_two_copies_of_a_micro_batch_train_as_one_does(step):
    """Also through the losses of a router, which are means over micro-batches."""
    data = batch(0, 1, size=4)
    one, state = step(1, **ROUTED)
    expected, wanted = one(state, data)
    two, state = step(2, **ROUTED)
    copies = {name: np.concatenate([array, array]) for name, array in data.items()}
    after, found = two(state, copies)
    assert {name for name in found if name.startswith("router_")} >= {
        "router_balance",
        "router_z_loss",
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    for a, b in zip(gradient_of(after), gradient_of(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_is_that_of_the_batch(step, train):
    """The mean over scored labels of all micro-batches, from the model itself."""
    _, before = step()
    data = {k: a[0] for k, a in batch(0, 1).items()}
    x, _ = before.model.hidden(data["inputs"], data["positions"], data["segment_ids"])
    logits = before.model.logits(x)
    nats, _ = cross_entropy(logits, data["targets"], data["weights"])
    expected = float(nats.sum() / data["weights"].sum())
    state, found = train(accumulation=4)
    assert found[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert int(before.step) == 0 and int(state.step) == STEPS


@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_clipping(train, clip):
    """After one step the first moment is (1 - b1) times the clipped gradient."""
    state, found = train(steps=1, optimizer__clip_norm=clip)
    norm = float(found[0]["grad_norm"])
    assert 0.1 < norm < 100
    clipped = float(optax.global_norm(state.optimizer[0].mu)) / (1 - 0.9)
    assert clipped == pytest.approx(min(norm, clip) if clip else norm, rel=1e-4)


def test_the_z_loss_keeps_log_z_small(train):
    def log_z(state):
        data = {k: a[0] for k, a in batch(0, 1).items()}
        logits = state.model(data["inputs"], data["positions"], data["segment_ids"])
        return float(jnp.mean(jax.nn.logsumexp(logits, -1) ** 2))

    plain, one = train(steps=12, optimizer__clip_norm=0.0)
    small, other = train(steps=12, optimizer__clip_norm=0.0, optimizer__z_loss=1.0)
    # The metric is the loss without the penalty: equal before the first update, not after it.
    assert losses(one)[0] == losses(other)[0] and losses(one)[1] != losses(other)[1]
    assert log_z(small) < 0.8 * log_z(plain)


def test_z_loss_and_nats_by_hand():
    logits = jnp.log(jnp.array([[[1.0, 3.0], [2.0, 2.0], [1.0, 1.0]]]))
    nats, squares = cross_entropy(logits, jnp.array([[1, 0, 0]]), jnp.array([[1.0, 2.0, 0.0]]))
    np.testing.assert_allclose(nats, [[np.log(4 / 3), 2 * np.log(2), 0]], rtol=1e-6)
    np.testing.assert_allclose(squares, [[np.log(4) ** 2, 2 * np.log(4) ** 2, 0]], rtol=1e-6)


def test_dropout_follows_from_seed_and_step(step, train):
    one, before = step(model__dropout=0.5)
    _, first = one(before, batch(0, 1))
    _, same = one(before, batch(0, 1))
    _, later = one(dataclasses.replace(before, step=jnp.int32(1)), batch(0, 1))
    _, other_seed = step(seed=1, model__dropout=0.5)[0](before, batch(0, 1))
    without = losses(train()[1])[0]
    found = [float(metrics["loss"]) for metrics in (first, same, later, other_seed)]
    assert found[0] == found[1] and len({*found, float(without)}) == 4


def test_micro_batches_have_masks_of_their_own(step):
    """The same rows as first and as second micro-batch, the other one not scored."""
    one, before = step(2, model__dropout=0.5)
    data = {name: np.stack([a[0], a[0]]) for name, a in batch(0, 2).items()}
    lost = []
    for scored in (0, 1):
        weights = np.zeros_like(data["weights"])
        weights[scored] = data["weights"][scored]
        lost.append(float(one(before, data | {"weights": weights})[1]["loss"]))
    assert abs(lost[0] - lost[1]) > 1e-4


def test_bfloat16_keeps_float32_state(train):
    state, found = train(train__compute_dtype="bfloat16")
    _, exact = train()
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves((state.model, state.optimizer))}
    assert kinds == {"float32", "int32"}  # int32: the optimizer's counter
    np.testing.assert_allclose(losses(found), losses(exact), rtol=0.02)
    assert np.any(losses(found) != losses(exact))


def test_the_learning_rate_of_each_step_is_reported(train):
    _, found = train()
    rates = [float(metrics["learning_rate"]) for metrics in found]
    assert rates[:2] == pytest.approx([5e-3, 1e-2]) and rates[3] < rates[2] <= 1e-2


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_masters_train_as_float32_parameters_do(train, accumulation, name):
    """Bit for bit where products are in bfloat16, since masters begin unrounded; but jax 0.12
    fuses Muon's own products, in float32, otherwise in the one program than in the other."""
    exact = name == "adamw" or jax.__version_info__ < (0, 12)
    fields = {"train__compute_dtype": "bfloat16", "optimizer__name": name}
    wide, expected = train(accumulation=accumulation, **fields)
    narrow, found = train(accumulation=accumulation, train__param_dtype="bfloat16", **fields)
    if exact:
        assert found == expected
    np.testing.assert_allclose(losses(found), losses(expected), rtol=1e-3)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(narrow.model.stack.blocks[0].mlp)}
    assert dtypes == {"bfloat16"} and narrow.model.embedding.dtype == jnp.float32
    for a, b in zip(*map(jax.tree.leaves, (narrow.model, wide.model)), strict=True):
        if exact:
            np.testing.assert_array_equal(a, b.astype(a.dtype))
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=0.01, atol=1e-3)


def test_the_learning_rate_follows_the_step_whatever_was_left_out(step):
    """Updates after three bad steps are those of the rate that is reported, not of an earlier
    one: Adam's first update is the rate times the sign of the gradient."""
    one, before = step(optimizer__weight_decay=0.0, optimizer__clip_norm=0.0)
    spoilt = batch(0, 1) | {"weights": batch(0, 1)["weights"] * np.float32("nan")}
    state = before
    for _ in range(3):
        state, metrics = one(state, spoilt)
        assert bool(metrics["bad"])
    after, metrics = one(state, batch(0, 1))
    assert int(after.step) == 4
    moved = [
        float(jnp.max(jnp.abs(a - b)))
        for a, b in zip(*map(jax.tree.leaves, (after.model, state.model)), strict=True)
    ]
    assert max(moved) == pytest.approx(float(metrics["learning_rate"]), rel=1e-3)
    rates = optax.tree_utils.tree_get_all_with_path(after.optimizer, "count")
    counts = sorted(int(value) for _, value in rates)
    assert counts == [1, 4]  # Adam's updates; the step that the rate was of, and one


def test_gradients_of_matrices_may_be_bfloat16(train):
    """By a field of their own; unset, products in bfloat16 still have gradients in float32."""
    plain, found = train(train__compute_dtype="bfloat16")
    _, narrow = train(train__compute_dtype="bfloat16", train__gradient_dtype="bfloat16")
    assert float(narrow[0]["loss"]) == float(found[0]["loss"])
    assert float(narrow[0]["grad_norm"]) != float(found[0]["grad_norm"])
    np.testing.assert_allclose(losses(narrow), losses(found), rtol=0.02)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(plain.model)} == {"float32"}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_z_loss_of_labelled_examples_is_a_mean_over_labels(recipe, accumulation):
    config = recipe("configs/paper/synthetic.py")
    config.model.update(d_model=16, num_layers=1, num_heads=2, mlp_ratio=1.0)
    config.optimizer.update(z_loss=0.5, clip_norm=0.0, b1=0.9)
    config.train.accumulation = accumulation
    spec = model_spec(configs.resolve(config).model, 10, 12, 10)
    tx, rate = make_optimizer(config, total_steps=20, warmup_steps=2)
    state = init_state(spec, tx, jax.random.key(0), config)
    one = jax.jit(make_train_step(config, tx, rate), compiler_options=QUICK)
    arrays = batch(0, accumulation)
    for name in ("inputs", "targets"):
        arrays[name] = arrays[name] % 10
    data = {name: array.reshape(-1, 12) for name, array in arrays.items()}

    @functools.partial(jax.jit, compiler_options=QUICK)
    @jax.grad
    def expected(model):
        logits = model(data["inputs"], data["positions"], data["segment_ids"])
        nats, squares = cross_entropy(logits, data["targets"], data["weights"])
        return (jnp.sum(nats) + 0.5 * jnp.sum(squares)) / jnp.sum(data["weights"])

    after, _ = one(state, arrays)
    for a, b in zip(gradient_of(after), jax.tree.leaves(expected(state.model)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
