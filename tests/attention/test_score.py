"""Score modifiers: what attention computes of them is their definition, and what they break.

B = 2 sequences of T = 7 tokens; D = 16, heads of 8.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.attention import cache
from qkvjax.attention.layer import Attention
from qkvjax.attention.position import sincos
from qkvjax.attention.score import Score
from qkvjax.attention.spec import AttentionSpec, parse_modifier
from qkvjax.errors import UserError
from qkvjax.models.build import count
from qkvjax.models.lm import LanguageModel

T = 7
LISTS = [
    ("score2d(10)",),
    ("score2d(5)", "score_scale"),
    ("column_bias", "score2d(4)"),
    ("score_scale", "column_bias"),
    ("column_bias", "score_scale"),
    ("role_bias",),
    ("role_gain",),
    ("score_scale",),
    ("column_bias",),
    ("role_gain", "score_scale"),
    ("role_bias", "role_gain", "score2d(2)", "column_bias"),
]


def position_of(score):
    return "rope" if "role_gain" in score else "none"


@pytest.fixture
def make(filled):
    """Makes a layer of random numbers; arguments are fields of its spec."""

    def layer(score, **fields):
        base = {"d_model": 16, "num_heads": 2, "head_dim": 8, "max_length": T, "score": score}
        spec = AttentionSpec(**(base | {"position": position_of(score)} | fields))
        return filled(lambda: Attention(spec, key=jax.random.key(0)))

    return layer


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(3).normal(size=(2, T, 16)), jnp.float32)


@pytest.fixture(scope="module")
def positions():
    return jnp.tile(jnp.arange(T), (2, 1))


def plain_scores(layer, x, positions):
    """S [B, N, T, S] with everything that acts on roles, before what acts on scores."""
    spec = layer.spec
    state = {
        role: layer.projections["".join(spec.block(role))](x).reshape(2, T, 2, 8) for role in "qkv"
    }
    q, k = (layer._scored(role, state[role], positions) for role in "qk")
    return jnp.einsum("btnh,bsnh->bnts", q, k) / 8**0.5, state["v"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("score", LISTS, ids="+".join)
@pytest.mark.parametrize("sharing", ["q-k-v", "q=k-v", "q=k=v"])
def test_attention_computes_the_definition(make, x, positions, score, causal, sharing):
    layer = make(score, causal=causal, sharing=sharing)
    scores, v = plain_scores(layer, x, positions)
    scores = layer.score.modified(scores, positions, positions)
    if causal:
        scores = jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v).reshape(2, T, 16)
    np.testing.assert_allclose(layer(x, positions), layer.output(out), atol=1e-5)


def test_rows_and_offset_are_dead(make, x, positions):
    """Without the row half of w . P and without b the attention is the same."""
    layer = make(("score2d(10)",), causal=False, sharing="q=k-v")
    scores, _ = plain_scores(layer, x, positions)
    whole = jax.nn.softmax(layer.score.modified(scores, positions, positions))
    mix = layer.score.params["mix"][...]
    columns = (sincos(positions, 5) @ mix[5:])[:, None, None, :]
    np.testing.assert_allclose(whole, jax.nn.softmax(scores * mix.sum() + columns), atol=1e-6)


@pytest.mark.parametrize("dead", [True, False])
def test_what_of_role_bias_is_dead(make, x, positions, dead):
    """(q + b_q) (k + b_k)^T = q k^T + q b_k^T + b_q k^T + b_q b_k^T: what a query adds for all keys
    alike is gone after softmax, unless keys are rotated."""
    layer = make(("role_bias",), causal=False, sharing="q=k-v", position="none" if dead else "rope")
    (name,) = (n for n in layer.score.params if n.endswith("_k"))
    before = layer(x, positions)
    layer.score.params[name][...] = jnp.zeros_like(layer.score.params[name][...])
    assert (float(jnp.abs(layer(x, positions) - before).max()) < 1e-5) == dead


@pytest.mark.parametrize("layout", ["kv", "shared"])
@pytest.mark.parametrize("score", [one for one in LISTS if len(one) == 1], ids="+".join)
def test_decoding_with_each_is_attending_to_all(make, x, positions, score, layout):
    layer = make(score, sharing="q-k=v", position="rope")
    held = cache.empty(layer.spec, 2, T, layout=layout)
    outs = []
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        out, held = cache.attend(layer, x[:, start:stop], held, jnp.int32(start))
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), layer(x, positions), atol=1e-5)


def test_score2d_is_a_scale_and_a_column_bias(make, x, positions):
    """In exact terms: s = sum(w) and c_j the column half of w . P."""
    one = make(("score2d(6)",), sharing="q-k=v")
    other = make(("score_scale", "column_bias"), sharing="q-k=v")
    for name in ("q", "kv"):
        other.projections[name] = one.projections[name]
    other.output = one.output
    mix = one.score.params["mix"][...]
    other.score.params["scale"][...] = jnp.sum(mix)
    other.score.params["column"][...] = sincos(jnp.arange(T)[None], 3)[0] @ mix[3:]
    np.testing.assert_allclose(one(x, positions), other(x, positions), atol=2e-6)


@pytest.mark.parametrize(
    ("score", "symmetric"),
    [
        (("score_scale",), True),
        (("column_bias",), False),
        (("score2d(10)",), False),
        (("role_bias",), False),
        (("role_gain",), False),
    ],
    ids=str,
)
def test_what_breaks_the_symmetry_of_tied_scores(make, x, positions, score, symmetric):
    layer = make(score, causal=False, sharing="q=k-v")
    scores, _ = plain_scores(layer, x, positions)
    scores = layer.score.modified(scores, positions, positions)
    asymmetry = float(jnp.max(abs(scores - jnp.swapaxes(scores, -1, -2))))
    assert asymmetry < 1e-5 if symmetric else asymmetry > 0.05


def test_role_gains_without_rotation_would_stay_symmetric(make, x, positions):
    """Why the spec refuses them: S = z D_q D_k z^T."""
    z = x.reshape(2, T, 2, 8)
    gains = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 8)), jnp.float32)
    scores = jnp.einsum("btnh,bsnh->bnts", z * gains[0], z * gains[1])
    np.testing.assert_allclose(scores, jnp.swapaxes(scores, -1, -2), atol=1e-5)


@pytest.mark.parametrize("score", LISTS, ids="+".join)
def test_they_start_where_they_change_nothing(score):
    """All but score2d, whose w starts as N(0, 0.02^2)."""
    spec = AttentionSpec(16, 2, score=score, position=position_of(score), max_length=T)
    params = Score(spec, key=jax.random.key(0)).params
    for name, param in params.items():
        start = 1.0 if "gain" in name else 0.0
        if name == "mix":
            assert 0 < float(jnp.max(abs(param[...]))) < 0.1
        else:
            assert np.all(np.asarray(param[...]) == start), name


@pytest.mark.parametrize("score", LISTS, ids="+".join)
def test_parameters_are_counted(tiny, score):
    spec = tiny(score=score, position="rope", sharing="q-k=v", num_kv_heads=2)
    model = jax.eval_shape(lambda: LanguageModel(spec, key=jax.random.key(0)))
    assert count(model) == spec.num_params


def test_the_papers_eleven_parameters():
    plain, plus = (AttentionSpec(64, 2, score=s, max_length=128) for s in ((), ("score2d(10)",)))
    assert plus.num_params - plain.num_params == 11


def test_a_key_with_its_own_numbers_is_no_value():
    assert AttentionSpec(16, 2, sharing="q-k=v", score=("score_scale",)).values_are_keys
    assert not AttentionSpec(16, 2, sharing="q-k=v", score=("role_bias",)).values_are_keys


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (("score3d",), "'score3d' is unknown: use score2d"),
        (("column-bias",), "did you mean 'column_bias'"),
        (("score2d",), r"write score2d\(m\) with m at least 2"),
        (("score2d(1)",), "m at least 2"),
        (("score_scale(3)",), "is unknown"),
        (("role_gain",), "use 'role_bias', or RoPE"),
        (("column_bias",), "need max_length"),
        (("score2d(3)", "score2d(4)"), "names a modifier twice"),
    ],
)
def test_what_makes_no_sense_is_refused(score, message):
    with pytest.raises(UserError, match=message):
        AttentionSpec(16, 2, score=score)


def test_modifiers_are_parsed():
    assert parse_modifier("score2d(50)") == ("score2d", 50)
    assert parse_modifier("role_gain") == ("role_gain", 0)


def test_a_model_ends_where_its_scores_end(model):
    m = model(score=("column_bias",), position="rope")
    with pytest.raises(UserError, match="17 tokens exceeds the 16 positions"):
        m(jnp.zeros((1, 17), jnp.int32))
