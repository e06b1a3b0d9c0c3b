"""The bidirectional encoder and the ViT: attention, labels, initial values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax import config as configs
from qkvjax.errors import UserError
from qkvjax.models.build import build, count, make
from qkvjax.models.spec import model_spec

# (width, sharing, score) -> parameters of the paper's synthetic model with two layers.
SYNTHETIC = {
    (32, "q-k-v", ()): 30_250,
    (64, "q-k-v", ()): 109_642,
    (64, "q-k=v", ()): 101_322,
    (64, "q=k-v", ("score2d(10)",)): 101_344,
    (64, "q=k=v", ()): 93_002,
    (64, "q=k=v", ("score2d(10)",)): 93_024,
    (256, "q-k-v", ()): 1_618_186,
    (256, "q=k-v", ()): 1_486_602,
    (256, "q=k=v", ()): 1_355_018,
}


@pytest.fixture(scope="module")
def encoder(recipe):
    """The spec of the paper's synthetic model; arguments are fields of `model`."""

    def make_spec(**fields):
        model = configs.resolve(recipe("configs/paper/synthetic.py")).model
        return model_spec(dataclasses.replace(model, **fields), 10, 16, 10)

    return make_spec


@pytest.fixture(scope="module")
def vit(recipe):
    """The spec of the paper's ViT on 28 x 28 grey images, patch 4."""

    def make_spec(**fields):
        model = configs.resolve(recipe("configs/paper/vision.py")).model
        return model_spec(dataclasses.replace(model, **fields), 16, 50, 10, "sequence")

    return make_spec


@pytest.mark.parametrize(("variant", "expected"), SYNTHETIC.items())
def test_parameters_of_the_synthetic_models(encoder, variant, expected):
    width, sharing, score = variant
    spec = encoder(d_model=width, sharing=sharing, score=score)
    assert spec.num_params == expected
    assert count(jax.eval_shape(lambda: make(spec, jax.random.key(0)))) == expected


@pytest.mark.parametrize(("width", "expected"), [(64, 105_098), (256, 1_600_010)])
def test_parameters_of_the_vits(vit, width, expected):
    spec = vit(d_model=width)
    assert spec.num_params == expected
    assert count(jax.eval_shape(lambda: make(spec, jax.random.key(0)))) == expected


def test_every_token_sees_every_other(encoder, filled):
    model = filled(lambda: make(encoder(d_model=32), jax.random.key(0)))
    digits = np.arange(16)[None] % 10
    before = model(jnp.asarray(digits))
    digits[0, -1] = 0
    changed = np.abs(model(jnp.asarray(digits)) - before).max(-1)[0]
    assert before.shape == (1, 16, 10) and before.dtype == jnp.float32
    assert (changed > 1e-6).all()


def test_symbols_are_one_hot_vectors(encoder, filled):
    model = filled(lambda: make(encoder(d_model=32), jax.random.key(0)))
    digits = jnp.arange(32).reshape(2, 16) % 10
    vectors = jax.nn.one_hot(digits, 10)
    np.testing.assert_allclose(model(digits), model(vectors), atol=1e-5)


def test_without_positions_an_encoder_ignores_order(encoder, filled):
    spec = encoder(d_model=32, position="none")
    model = filled(lambda: make(spec, jax.random.key(0)))
    digits = jnp.asarray(np.random.default_rng(0).integers(0, 10, (2, 16)))
    order = np.random.default_rng(1).permutation(16)
    np.testing.assert_allclose(model(digits)[:, order], model(digits[:, order]), atol=1e-5)


def test_the_classes_of_a_choice_are_its_tokens(recipe, filled):
    model = configs.resolve(recipe("configs/paper/synthetic.py")).model
    model = dataclasses.replace(model, position="none", d_model=32)
    spec = model_spec(model, 7, 10, 1, "choice")
    sets = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10, 7)), jnp.float32)
    assert filled(lambda: make(spec, jax.random.key(0)))(sets).shape == (3, 1, 10)


def test_a_vit_reads_its_class_token_and_every_patch(vit, filled):
    model = filled(lambda: make(vit(d_model=32), jax.random.key(0)))
    patches = np.random.default_rng(0).normal(size=(2, 49, 16)).astype(np.float32)
    before = model(jnp.asarray(patches))
    assert before.shape == (2, 1, 10)
    for patch in (0, 48):
        changed = patches.copy()
        changed[:, patch] += 1
        assert np.abs(model(jnp.asarray(changed)) - before).max() > 1e-4


def test_initial_values_are_those_of_torch(encoder, vit):
    model = build(encoder(d_model=64))
    block = model.stack.blocks[0]
    for linear, fan_in in ((model.input, 10), (block.mlp.down, 256), (model.head, 64)):
        for value in (linear.weight[...], linear.bias[...]):
            assert np.abs(value).max() <= fan_in**-0.5
        assert np.std(linear.weight[...]) == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
    assert np.abs(block.mlp.down.bias[...]).max() > 0
    assert np.std(model.positions[...]) == pytest.approx(1, rel=0.05)
    small = encoder(init="uniform(positions=0.02)")
    assert np.std(build(small).positions[...]) == pytest.approx(0.02, rel=0.05)
    image = build(vit(d_model=64))
    assert np.std(image.positions[...]) == pytest.approx(0.02, rel=0.05)
    assert not np.any(image.class_token[...])


def test_dropout_of_a_vit_spares_attention(vit):
    """It acts on the embedding and on both feed-forward maps, as in the paper's code."""
    model = build(vit(d_model=32, dropout=0.5, num_layers=1))
    key = jax.random.key(1)
    patches = jnp.ones((1, 49, 16))
    without_mlp = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "mlp" in jax.tree_util.keystr(path) else x, model
    )
    block = without_mlp.stack.layer(0)
    positions = jnp.arange(50)[None]
    x = without_mlp.embed(patches, positions)
    np.testing.assert_array_equal(block(x, positions)[0], block(x, positions, key=key)[0])
    assert np.abs(model(patches, key=key) - model(patches)).max() > 1e-3


def test_encoders_that_cannot_be_built(encoder):
    with pytest.raises(UserError, match="model.tie_embeddings=False"):
        encoder(tie_embeddings=True)
    with pytest.raises(UserError, match="model.max_length=8 is less than the 16"):
        encoder(max_length=8)
