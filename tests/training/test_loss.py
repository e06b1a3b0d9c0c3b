"""The loss that never holds all logits, against the one that does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.models import loss
from qkvjax.models.loss import cross_entropy, label_scores, linear_cross_entropy
from qkvjax.parallel import local

B, T, D, V = 3, 50, 16, 41


def arguments(dtype=jnp.float32, vocab=V):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (B, T, D))
    w = jax.random.normal(keys[1], (D, vocab))
    targets = jax.random.randint(keys[2], (B, T), 0, vocab)
    weights = jax.random.uniform(keys[3], (B, T)) * (jnp.arange(T) % 5 > 0)
    return x.astype(dtype), w.astype(dtype), targets, weights


def whole(x, w, targets, weights, z_loss):
    logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    nats, squares = map(jnp.sum, cross_entropy(logits, targets, weights))
    return nats + z_loss * squares, nats


def differentiated(f, x, w, *others):
    """Value and gradient of a third of the loss, so that the cotangent is not 1."""
    scaled = lambda x, w: (lambda found: (found[0] / 3, found[1]))(f(x, w, *others))  # noqa: E731
    return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))(x, w)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 64 * V, 70 * V, 10**9])
def test_chunks_change_nothing(monkeypatch, chunk, z_loss):
    """Chunks that divide the 150 tokens and chunks that do not."""
    monkeypatch.setitem(loss.CHUNK, "cpu", chunk)
    given = (*arguments(), z_loss)
    ours, theirs = differentiated(linear_cross_entropy, *given), differentiated(whole, *given)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def over_columns(f, w, *by_token, sums=True):
    """Stands for `local.map_tokens` on three devices, each with a third of the columns."""
    parts = jnp.moveaxis(w.reshape(w.shape[0], 3, -1), 1, 0)
    columns = local.Columns("columns")
    results = jax.vmap(lambda part: f(columns, part, *by_token), axis_name="columns")(parts)
    if not sums:
        return jax.tree.map(lambda x: x[0], results)
    dx, totals, dw = results
    return dx[0], jax.tree.map(lambda x: x[0], totals), jnp.moveaxis(dw, 0, 1).reshape(w.shape)


def test_columns_on_several_devices_change_nothing(monkeypatch):
    """Every label once, those at a device's first and last column among them. Several columns have
    the largest logit, also on different devices: the first of them is the likeliest."""
    vocab = 12
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-1, 2, (2, vocab, D)), jnp.float32)  # products are exact
    w = jnp.asarray(rng.integers(-1, 2, (D, vocab)), jnp.float32)
    w = w.at[:, 8:].set(w[:, :4])
    targets = jnp.stack([jnp.arange(vocab), jnp.argmax(x[1] @ w, axis=-1)])
    weights = jnp.asarray(rng.uniform(size=targets.shape), jnp.float32)
    expected = differentiated(whole, x, w, targets, weights, 0.1)
    logits = x @ w
    expected_nats, _ = cross_entropy(logits, targets, weights)
    monkeypatch.setattr(loss.local, "map_tokens", over_columns)
    found = differentiated(linear_cross_entropy, x, w, targets, weights, 0.1)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    nats, likeliest = label_scores(x, w, targets, weights)
    np.testing.assert_allclose(nats, expected_nats, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(likeliest, jnp.argmax(logits, axis=-1) == targets)
    assert likeliest[1].all() and (targets[1] < 4).any()  # columns 8 to 11 are as likely


def test_bfloat16_sums_in_float32(monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", 64 * V)
    ours = differentiated(linear_cross_entropy, *arguments(jnp.bfloat16), 0.1)
    exact = differentiated(
        whole, *(a.astype(jnp.float32) for a in arguments(jnp.bfloat16)[:2]), *arguments()[2:], 0.1
    )
    assert ours[1][0].dtype == ours[1][1].dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact)):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.linalg.norm(a - b) < 6e-3 * np.linalg.norm(b)


def test_all_logits_never_exist(monkeypatch):
    """Compiled, no array is as large as [tokens, V]; the same check finds one in the other loss."""
    vocab = 20 * D
    monkeypatch.setitem(loss.CHUNK, "cpu", 64 * vocab)

    def peak(f):
        x, w, targets, weights = arguments(vocab=vocab)
        repeat = lambda a: jnp.tile(a, (200, 1, 1)[: a.ndim])  # noqa: E731
        given = repeat(x), w, repeat(targets), repeat(weights), 0.0
        run = jax.jit(jax.value_and_grad(lambda x, w: f(x, w, *given[2:])[0], argnums=(0, 1)))
        return run.lower(*given[:2]).compile().memory_analysis().temp_size_in_bytes

    logits = 200 * B * T * vocab * 4
    assert peak(linear_cross_entropy) < 0.5 * logits < logits <= peak(whole)
