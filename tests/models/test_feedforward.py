"""Feed-forward variants and mixture of experts, against dense references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.errors import UserError
from qkvjax.models.feedforward import FeedForwardSpec, parse_feed_forward
from qkvjax.models.lm import LanguageModel
from qkvjax.models.moe import Experts
from qkvjax.models.transformer import feed_forward

VARIANTS = (
    "gelu",
    "relu2",
    "swiglu",
    "gelu(up=down)",
    "relu2(up=down)",
    "swiglu(up=down)",
    "swiglu(layers=2)",
    "gelu(up=down,layers=4)",
    "swiglu(experts=4,top=2)",
    "relu2(experts=3,top=1)",
)


def sizes(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def act(name, x):
    """Returns the activation from its definition, in float64."""
    if name == "relu2":
        return np.maximum(x, 0) ** 2
    if name == "swiglu":
        return x / (1 + np.exp(-x))
    from scipy.special import erf

    return x * (1 + erf(x / 2**0.5)) / 2


@pytest.mark.parametrize("mlp", VARIANTS)
@pytest.mark.parametrize("use_bias", [False, True])
def test_params(tiny, mlp, use_bias):
    if "experts" in mlp and use_bias:
        return
    spec = tiny(mlp=mlp, num_layers=4, use_bias=use_bias)
    model = jax.eval_shape(lambda: LanguageModel(spec, key=jax.random.key(0)))
    assert sizes(model) == spec.num_params


@pytest.mark.parametrize("mlp", ["gelu", "relu2", "swiglu"])
@pytest.mark.parametrize("tied", [False, True])
def test_one_feed_forward(tiny, filled, mlp, tied):
    spec = tiny(mlp=mlp + "(up=down)" * tied, use_bias=True)
    layer = filled(lambda: feed_forward(spec, jax.random.key(0)))
    x = np.random.default_rng(1).normal(size=(2, 5, 32))

    def f64(parameter):
        return np.asarray(parameter[...], np.float64)

    up = x @ f64(layer.up.weight) + f64(layer.up.bias)
    hidden = act(mlp, up)
    if mlp == "swiglu":
        hidden = act(mlp, x @ f64(layer.gate.weight) + f64(layer.gate.bias)) * up
    if tied:  # the map down at its usual scale: 1/sqrt(2 L F) over 1/sqrt(D)
        scale = (2 * 2 * spec.d_ff) ** -0.5 * 32**0.5
        expected = hidden @ f64(layer.up.weight).T * scale + f64(layer.bias)
    else:
        expected = hidden @ f64(layer.down.weight) + f64(layer.down.bias)
    got, router = layer(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    assert router is None


def dense(layer, x):
    """Returns the sum over the chosen experts, each computed for every token, and the losses."""
    kind = layer.kind
    logits = x @ layer.router.weight[...]
    order = jnp.argsort(-logits, axis=-1)[..., : kind.top]
    chosen = jax.nn.one_hot(order, kind.experts).sum(-2) > 0
    gates = jnp.where(chosen, jnp.exp(logits), 0)
    gates = gates / gates.sum(-1, keepdims=True)
    y = 0
    for e in range(kind.experts):
        up, down = (layer.experts[name].weight[e] for name in ("up", "down"))
        hidden = x @ up
        if kind.activation == "swiglu":
            gate = x @ layer.experts["gate"].weight[e]
            hidden = gate * jax.nn.sigmoid(gate) * hidden
        else:
            hidden = jnp.maximum(hidden, 0) ** 2
        y += gates[..., e : e + 1] * (hidden @ down)
    share = chosen.astype(x.dtype).mean((0, 1)) / kind.top
    probability = jax.nn.softmax(logits).mean((0, 1))
    return y, {
        "balance": kind.experts * jnp.sum(share * probability),
        "z_loss": jnp.mean(jax.nn.logsumexp(logits, -1) ** 2),
        "largest_load": kind.experts * share.max(),
        "smallest_load": kind.experts * share.min(),
    }


@pytest.mark.parametrize(
    "mlp", ["swiglu(experts=4,top=2)", "relu2(experts=3,top=1)", "swiglu(experts=5,top=5)"]
)
def test_experts_are_a_dense_loop(tiny, filled, mlp):
    """Forward, the router's losses, and the gradient of all."""
    spec = tiny(mlp=mlp)
    with jax.enable_x64(True):
        layer = filled(lambda: Experts(spec, key=jax.random.key(0)))
        layer = jax.tree.map(lambda a: a.astype(jnp.float64), layer)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 32)))

        def objective(f):
            def call(layer, x):
                y, router = f(layer, x)
                return jnp.sum(jnp.sin(y)) + router["balance"] + router["z_loss"], (y, router)

            return jax.value_and_grad(call, argnums=(0, 1), has_aux=True)(layer, x)

        (_, outputs), gradients = objective(lambda layer, x: layer(x))
        (_, expected_outputs), expected_gradients = objective(dense)
        computed = jax.tree.leaves((outputs, gradients))
        expected = jax.tree.leaves((expected_outputs, expected_gradients))
        for a, b in zip(computed, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layers", [4, 14])
def test_layers_that_share_a_feed_forward(tiny, filled, layers):
    """One parameter for each group of two, unrolled and scanned; the same as two equal ones."""
    spec = tiny(mlp="swiglu(layers=2)", num_layers=layers)
    separate = tiny(num_layers=layers)
    model = filled(lambda: LanguageModel(spec, key=jax.random.key(0)))
    other = filled(lambda: LanguageModel(separate, key=jax.random.key(0)))
    assert sizes(model) == spec.num_params < separate.num_params
    blocks = model.stack.layers()
    period = len(other.stack.blocks)
    for j, block in enumerate(other.stack.blocks):
        for name in ("attention", "attention_norm", "mlp_norm", "mlp"):
            parts = [getattr(blocks[i], name) for i in range(j, layers, period)]
            setattr(block, name, jax.tree.map(lambda *a: jnp.stack(a), *parts))
    other.embedding = model.embedding
    other.norm = model.norm
    ids = jnp.arange(16).reshape(2, 8)
    np.testing.assert_allclose(model(ids), other(ids), rtol=1e-5, atol=1e-5)


def test_initial_scale_does_not_depend_on_the_tie(tiny):
    x = jax.random.normal(jax.random.key(1), (4, 16, 32))
    scales = []
    for mlp in ("gelu", "gelu(up=down)"):
        layer = feed_forward(tiny(mlp=mlp, mlp_ratio=4.0), jax.random.key(0))
        scales.append(float(jnp.std(layer(x)[0])))
    # The product with the same matrix, transposed, has a component along x.
    assert 0.5 < scales[1] / scales[0] < 2, scales


def test_costs():
    kind = parse_feed_forward("swiglu(experts=8, top=2)")
    assert kind == FeedForwardSpec("swiglu", experts=8, top=2)
    assert kind.num_params(10, 30, False) == 8 * 3 * 300 + 80
    assert kind.forward_macs(10, 30) == 2 * 3 * 300 + 80
    tied = parse_feed_forward("gelu(up=down)")
    assert tied.num_params(10, 30, True) == 300 + 30 + 10 and tied.forward_macs(10, 30) == 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("swilu", "did you mean 'swiglu'"),
        ("swiglu(8)", "'8' is not an option"),
        ("swiglu(expert=8)", "did you mean 'experts'"),
        ("swiglu(experts=two)", "is not a number of type int"),
        ("swiglu(experts=2,top=3)", "lower top"),
        ("swiglu(experts=0)", "at least 1"),
        ("swiglu(experts=4,top=2", "no closing bracket"),
        ("swiglu(experts=4,layers=2)", "cannot be combined with up=down or with layers"),
        ("swiglu(balance=nan)", "at least 0"),
        ("swiglu(balance=-1,z_loss=2)", "at least 0"),
    ],
)
def test_bad_input(text, message):
    with pytest.raises(UserError, match=message):
        parse_feed_forward(text)


def test_feed_forwards_that_do_not_fit_a_model(tiny):
    with pytest.raises(UserError, match="groups of 3 layers do not divide the 4"):
        tiny(mlp="gelu(layers=3)", num_layers=4)
    with pytest.raises(UserError, match="without biases"):
        tiny(mlp="gelu(experts=2)", use_bias=True)
