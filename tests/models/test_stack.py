"""The stack: packing, causality, patterns of layers, scan and unrolling, dropout.

B = 2 rows of T = 9 tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.attention.position import sincos
from qkvjax.errors import UserError
from qkvjax.models import spec as model_specs
from qkvjax.models.lm import LanguageModel
from qkvjax.models.transformer import Stack, dropout

B, T = 2, 9


@jax.jit
def run(model, ids, positions=None, segment_ids=None, key=None):
    """The model, compiled once for each spec."""
    return model(ids, positions, segment_ids, key)


@pytest.fixture(scope="module")
def ids():
    return jnp.asarray(np.random.default_rng(5).integers(0, 61, (B, T)))


# ---- packing and causality ------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"position": "rope", "sharing": "q-k=v", "num_kv_heads": 2},
        {"position": "learned", "sharing": "q=k=v", "window": 3},
        {"position": "sincos", "sharing": "q=v-k"},
    ],
)
def test_packed_documents_do_not_meet(model, ids, fields):
    m = model(**fields)
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * B)
    segments = jnp.array([[0] * 4 + [1] * 5] * B)
    packed = run(m, ids, positions, segments)
    # The second document alone: rolled to the front, where causality hides what follows it.
    np.testing.assert_allclose(packed[:, :4], run(m, ids)[:, :4], atol=2e-5)
    np.testing.assert_allclose(packed[:, 4:], run(m, jnp.roll(ids, -4, axis=1))[:, :5], atol=2e-5)
    assert jnp.max(abs(packed[:, 4:] - run(m, ids)[:, 4:])) > 0.1  # the neighbour does matter


def test_later_tokens_change_nothing_earlier(model, ids):
    m = model(sharing="q=k=v")
    other = ids.at[:, 5].set((ids[:, 5] + 1) % 61)
    a, b = run(m, ids), run(m, other)
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert np.all(np.max(abs(np.asarray(a - b))[:, 5:], axis=-1) > 1e-3)


def test_window_of_one_layer(model, ids):
    """A window of 3 does not reach the token 3 positions back; it reaches 2 positions back."""
    m = model(num_layers=1, window=3, position="none", sharing="q-k=v")
    other = ids.at[:, 4].set((ids[:, 4] + 1) % 61)
    changed = np.max(abs(np.asarray(run(m, ids) - run(m, other))), axis=-1) > 1e-3
    np.testing.assert_array_equal(changed, [[False] * 4 + [True] * 3 + [False] * 2] * B)


@pytest.mark.parametrize("position", ["learned", "sincos", "none"])
def test_positions_enter_at_the_input(model, ids, position):
    m = model(position=position)
    positions = jnp.tile(jnp.arange(T), (B, 1))
    added = m.embed(ids, positions) - m.embed(ids, 0 * positions)
    if position == "learned":
        expected = m.positions[...][positions] - m.positions[...][0]
    elif position == "sincos":
        expected = sincos(positions, 32) - sincos(0 * positions, 32)
    else:
        expected = 0
    np.testing.assert_allclose(added, expected, atol=1e-6)


def test_a_learned_table_ends(model):
    with pytest.raises(UserError, match="17 tokens exceeds the 16 positions.*rope"):
        model(position="learned")(jnp.zeros((1, 17), jnp.int32))


# ---- patterns of layers ---------------------------------------------------------------------

LOCAL = {"window": 3}
GLOBAL = {"sharing": "q-k=v", "num_kv_heads": 2}


@pytest.mark.parametrize(
    ("num_layers", "pattern", "period"),
    [
        (1, (), 1),
        (6, (), 1),
        (6, (LOCAL,), 1),
        (6, (LOCAL, GLOBAL), 2),
        (6, (LOCAL, LOCAL, GLOBAL), 3),
        (4, (LOCAL, GLOBAL) * 2, 2),
        (3, (LOCAL, GLOBAL), 3),
        (6, (LOCAL, LOCAL, LOCAL, GLOBAL), 6),
        (7, ({},), 1),
        (2, (LOCAL, GLOBAL), 2),
    ],
)
def test_period(tiny, monkeypatch, num_layers, pattern, period):
    spec = tiny(num_layers=num_layers, layer_overrides=pattern)
    assert spec.period == num_layers  # shallow
    monkeypatch.setattr(model_specs, "UNROLL_UP_TO", 0)
    assert spec.period == period
    for i, layer in enumerate(spec.layers):
        overrides = pattern[i % len(pattern)] if pattern else {}
        assert {name: getattr(layer, name) for name in overrides} == overrides
    repeats = num_layers // period
    stack = jax.eval_shape(lambda: Stack(spec, key=jax.random.key(0)))
    assert [block.mlp.up.weight.shape[0] for block in stack.blocks] == [repeats] * period


@pytest.mark.parametrize(
    ("num_layers", "pattern"), [(2, ()), (4, (LOCAL, GLOBAL)), (3, (LOCAL, GLOBAL, {}))]
)
def test_scan_is_the_layers_one_by_one(tiny, model, ids, monkeypatch, num_layers, pattern):
    fields = {"num_layers": num_layers, "layer_overrides": pattern}
    positions = jnp.tile(jnp.arange(T), (B, 1))
    initial_layers = []
    for unroll_up_to in (num_layers, num_layers - 1):
        monkeypatch.setattr(model_specs, "UNROLL_UP_TO", unroll_up_to)
        m = model(**fields)
        x = m.embed(ids, positions)
        one_by_one = x
        for i, layer in enumerate(m.stack.layers()):
            assert layer.attention.spec == m.spec.layers[i]
            one_by_one, _ = layer(one_by_one, positions)
        np.testing.assert_allclose(m.stack(x, positions)[0], one_by_one, atol=2e-5)
        initial_layers.append(Stack(tiny(**fields), key=jax.random.key(0)).layers())
    # Initial values do not depend on how layers are stored.
    jax.tree.map(np.testing.assert_array_equal, *initial_layers)


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_remat_changes_no_gradient(model, ids, monkeypatch, remat):
    """The dropout that is drawn again is the same, and the backward pass keeps fewer numbers."""
    for unroll_up_to in (2, 0):
        monkeypatch.setattr(model_specs, "UNROLL_UP_TO", unroll_up_to)
        m = model(num_layers=2, dropout=0.2)

        def loss(m, remat):
            return jnp.sum(m.hidden(ids, key=jax.random.key(3), remat=remat)[0] ** 2)

        def kept(remat, m=m):
            backward = jax.eval_shape(lambda m: jax.vjp(lambda m: loss(m, remat), m)[1], m)
            return sum(leaf.size for leaf in jax.tree.leaves(backward))

        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        for a, b in zip(*(jax.tree.leaves(gradient(m, r)) for r in ("none", remat)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * max(1, float(jnp.max(abs(b)))))
        assert kept(remat) < kept("none")


def test_remat_frees_memory_on_a_cpu_in_a_shallow_stack_too(tiny):
    """XLA's CPU undoes it where it sees all layers at once. No layer keeps its scores [T, T]."""
    length = 512
    rows = 2
    spec = tiny(seq_len=length, num_layers=4, num_heads=2)
    assert spec.period == 4  # each layer has arrays of its own
    model = jax.eval_shape(lambda: LanguageModel(spec, key=jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def peak(remat):
        def loss(m, ids):
            return jnp.sum(m.hidden(ids, remat=remat)[0] ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(model, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, block = (peak(remat) for remat in ("none", "dots", "block"))
    scores = 4 * rows * 2 * length**2 * spec.num_layers  # bytes in all layers
    assert block < dots < none - 0.5 * scores


def test_unroll_changes_nothing_but_the_program(model, ids, monkeypatch):
    monkeypatch.setattr(model_specs, "UNROLL_UP_TO", 0)
    m = model(num_layers=6)

    def loss(m, unroll):
        return jnp.sum(m.hidden(ids, unroll=unroll)[0] ** 2)

    def gradient(unroll):
        return jax.jit(jax.grad(loss), static_argnums=1)(m, unroll)

    for unroll in (2, 4, 100):
        for a, b in zip(*(jax.tree.leaves(gradient(u)) for u in (1, unroll)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * max(1, float(jnp.max(abs(b)))))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sharings": "q-k=v"}, "cannot change 'sharings'.*did you mean 'sharing'"),
        ({"d_model": 64}, "cannot change 'd_model'.*num_kv_heads"),
        ({"dropout": 0.1}, "cannot change 'dropout'"),
        ({"position": "sincos"}, "'sincos' is added at the input.*'rope' or 'none'"),
        ({"sharing": "q=k-v", "num_kv_heads": 2}, "num_kv_heads=2 must equal num_heads=4"),
    ],
)
def test_bad_overrides(tiny, overrides, message):
    with pytest.raises(UserError, match=message):
        tiny(layer_overrides=({}, overrides))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "batchnorm"}, "model.norm='batchnorm'.*rmsnorm"),
        ({"mlp": "swigl"}, "did you mean 'swiglu'"),
        ({"init": "zeros"}, "model.init='zeros'.*fan_in"),
        ({"dropout": 1.0}, r"model.dropout=1.0 must be in \[0, 1\)"),
        ({"mlp_ratio": 0.1}, "raise model.mlp_ratio"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"kind": "diffusion"}, "model.kind='diffusion'"),
    ],
)
def test_bad_models(tiny, fields, message):
    with pytest.raises(UserError, match=message):
        tiny(**fields)


# ---- dropout --------------------------------------------------------------------------------


def test_dropout_is_off_without_key_or_rate(model, ids):
    dropped = model(num_layers=1, dropout=0.5)
    plain = model(num_layers=1)
    np.testing.assert_array_equal(run(dropped, ids), run(plain, ids))  # no key: evaluation
    key = jax.random.key(2)
    np.testing.assert_array_equal(run(plain, ids, key=key), run(plain, ids))
    np.testing.assert_array_equal(run(dropped, ids, key=key), run(dropped, ids, key=key))
    assert jnp.max(abs(run(dropped, ids, key=key) - run(plain, ids))) > 0.1
    assert jnp.max(abs(run(dropped, ids, key=key) - run(dropped, ids, key=jax.random.key(3)))) > 0.1


def test_dropout_keeps_the_mean():
    kept = dropout(jnp.ones((50, 200)), 0.3, jax.random.key(0))
    np.testing.assert_allclose(np.unique(kept), [0, 1 / 0.7], rtol=1e-6)
    assert abs(float(kept.mean()) - 1) < 0.03


def test_every_branch_of_every_layer_draws_its_own_mask(tiny):
    """Every branch returns ones: the sum of 4 masks is binomial, with variance 4 p (1 - p)."""
    spec = tiny(norm="layernorm", use_bias=True, dropout=0.5)
    stack = jax.tree.map(jnp.zeros_like, Stack(spec, key=jax.random.key(0)))
    for block in stack.blocks:
        for last in (block.attention.output, block.mlp.down):
            last.bias[...] = jnp.ones_like(last.bias[...])
    x = jnp.zeros((B, 64, 32))
    positions = jnp.tile(jnp.arange(64), (B, 1))
    masks = np.asarray(stack(x, positions, key=jax.random.key(4))[0]) / 2
    assert set(np.unique(masks)) == {0, 1, 2, 3, 4}
    assert abs(masks.var() - 1) < 0.1  # 2 or 4 if layers or branches shared a mask


# ---- bfloat16 -------------------------------------------------------------------------------


def test_bfloat16_sums_gradients_over_tokens_in_float32(model):
    """Tables, biases and score modifiers get gradients from every token, close to float32's."""
    m = model(
        position="learned",
        use_bias=True,
        seq_len=64,
        tie_embeddings=False,
        num_layers=1,
        score=("score_scale", "role_bias", "column_bias"),
    )
    # Three ids only: the gradient of each row of the embedding sums over hundreds of tokens.
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 3, (16, 64)))

    def loss(m, dtype):
        logits = m(ids, dtype=dtype)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    full, half = (jax.jit(jax.grad(loss), static_argnums=1)(m, d) for d in ("float32", "bfloat16"))
    for name in ("embedding", "positions"):
        a, b = (np.asarray(getattr(g, name)[...]) for g in (full, half))
        assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(a), name
    for read in (
        lambda g: g.stack.blocks[0].attention.output.bias[...],
        lambda g: g.stack.blocks[0].mlp.down.bias[...],
        lambda g: g.stack.blocks[0].attention.score.params["scale"][...],
    ):
        a, b = (np.asarray(read(g)) for g in (full, half))
        assert np.linalg.norm(a - b) < 0.08 * np.linalg.norm(a)
