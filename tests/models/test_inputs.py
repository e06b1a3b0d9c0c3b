"""Inputs of the models and of the layer: one row of positions for all rows, ids [B, T]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.attention.layer import Attention
from qkvjax.attention.spec import AttentionSpec
from qkvjax.errors import UserError
from qkvjax.models.encoder import Encoder
from qkvjax.models.loss import cross_entropy, linear_cross_entropy

SPEC = AttentionSpec(d_model=16, num_heads=2, position="rope", sharing="q-k=v")


@pytest.fixture(scope="module")
def layer():
    return Attention(SPEC, key=jax.random.key(0))


def test_the_layer_accepts_positions_of_one_row(layer):
    x = jax.random.normal(jax.random.key(1), (3, 5, 16))
    segments = jnp.array([0, 0, 0, 1, 1])
    whole = layer(x, jnp.tile(jnp.arange(5), (3, 1)), jnp.tile(segments, (3, 1)))
    for positions in (jnp.arange(5), np.arange(5), jnp.arange(5)[None]):
        np.testing.assert_array_equal(layer(x, positions, segments), whole)


@pytest.mark.parametrize(
    ("shape", "positions", "message"),
    [
        ((3, 5, 16), (4,), r"positions of shape \[4\] do not fit tokens of shape \[3, 5\]"),
        ((3, 5, 16), (5, 3), r"positions of shape \[5, 3\]"),
        ((5, 16), (5,), r"x of shape \[5, 16\] is not \[B, T, D\].*x\[None\]"),
        ((3, 5, 8), (5,), "d_model = 16"),
    ],
)
def test_shapes_that_do_not_fit(layer, shape, positions, message):
    with pytest.raises(UserError, match=message):
        layer(jnp.zeros(shape), jnp.zeros(positions, jnp.int32))


@pytest.mark.parametrize("position", ["rope", "learned", "sincos"])
def test_a_language_model_accepts_positions_of_one_row(model, position):
    m = model(position=position)
    ids = np.arange(18).reshape(2, 9) % 61
    expected = m(ids, jnp.tile(jnp.arange(9), (2, 1)))
    np.testing.assert_array_equal(m(ids, jnp.arange(9)), expected)
    np.testing.assert_array_equal(m(ids), expected)
    with pytest.raises(UserError, match=r"ids of shape \[9\] are not \[B, T\].*ids\[None\]"):
        m(ids[0])


def test_an_encoder_accepts_positions_of_one_row(tiny, filled):
    spec = tiny(kind="encoder", position="learned", tie_embeddings=False)
    m = filled(lambda: Encoder(spec, key=jax.random.key(0)))
    ids = np.arange(18).reshape(2, 9)
    np.testing.assert_array_equal(m(ids, jnp.arange(9)), m(ids))


def test_there_is_a_logit_for_each_id_and_the_loss_counts_the_padding_too(model):
    m = model(tokenizer_size=61)
    ids = np.arange(18).reshape(2, 9)
    x, _ = m.hidden(ids)
    assert m.spec.vocab_size == 64 and m.logits(x).shape == (2, 9, 64)
    np.testing.assert_array_equal(m(ids), m.logits(x)[..., :61])
    weights = jnp.ones((2, 9))
    nats, _ = cross_entropy(m.logits(x), ids, weights)
    head = m.embedding[...].T
    chunked, _ = linear_cross_entropy(x, head, jnp.asarray(ids), weights, 0.0)
    np.testing.assert_allclose(nats.sum(), chunked, rtol=1e-5)
