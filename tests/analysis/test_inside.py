"""What `analyze` sees is what the layers compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.analysis import inside, inside_plots, spectra
from qkvjax.errors import UserError

B, T = 2, 9


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(5).integers(0, 61, (B, T))


def values(records, **wanted):
    return [r["value"] for r in records if all(r[k] == v for k, v in wanted.items())]


@pytest.mark.parametrize(
    "fields",
    [
        {"sharing": "q-k-v", "num_kv_heads": 2},
        {"sharing": "q-k=v", "num_kv_heads": 1, "window": 4},
        {"sharing": "q=k=v", "score": ("column_bias", "score2d(5)", "role_bias")},
    ],
)
def test_weights_are_those_that_mix_the_values(model, ids, fields):
    m = model(num_layers=1, **fields)
    (seen,) = inside.look(m, ids)
    np.testing.assert_allclose(seen.weights.sum(-1), 1, atol=1e-5)
    (block,) = m.stack.layers()
    positions = jnp.tile(jnp.arange(T), (B, 1))
    y = block.attention_norm(m.embed(jnp.asarray(ids), positions))
    value = next(name for name in seen.states if "v" in name)
    v = np.repeat(seen.states[value], 4 // seen.states[value].shape[2], axis=2)
    mixed = np.einsum("bnts,bsnh->btnh", seen.weights, v).reshape(B, T, -1)
    expected = block.attention(y, positions)
    np.testing.assert_allclose(block.attention.output(mixed), expected, atol=2e-5)


def test_records_of_every_sharing(model, ids):
    for sharing, tied in (("q-k-v", False), ("q=k-v", True)):
        m = model(sharing=sharing)
        records, _ = inside.analyze(m, ids)
        asymmetry = values(records, metric="score_asymmetry")
        assert len(asymmetry) == 2 * 4  # layers x heads
        assert max(asymmetry) < 1e-6 if tied else min(asymmetry) > 0.1
        block = m.stack.layers()[1]
        name = "qk" if tied else "q"
        weight = np.asarray(block.attention.projections[name].weight[...])
        (rank,) = values(records, layer=1, head=None, what=f"W_{name}", metric="effective_rank")
        assert rank == pytest.approx(spectra.effective_rank(spectra.singular_values(weight)))
        (third,) = values(records, layer=1, head=3, what="W_q W_k^T", metric="singular_values")
        part = weight[:, -8:]
        other = part if tied else block.attention.projections["k"].weight[...][:, -8:]
        assert third == pytest.approx(np.linalg.norm(part @ np.asarray(other).T, 2), rel=1e-5)


def test_only_what_is_asked_for(model, ids):
    records, _ = inside.analyze(model(sharing="q-k=v"), ids, ["kv"])
    assert {r["what"] for r in records} == {"W_kv", "kv activations", "attention"}


def test_a_projection_that_is_not_there(model, ids):
    with pytest.raises(UserError, match="no projection 'k' in sharing 'q-k=v': it has q, kv"):
        inside.analyze(model(sharing="q-k=v"), ids, ["k"])


def test_a_pattern_of_layers_is_drawn(model, ids, tmp_path):
    m = model(num_layers=3, layer_overrides=({}, {"sharing": "q-k=v"}, {"num_kv_heads": 1}))
    records, seen = inside.analyze(m, ids)
    places = inside_plots.write(records, seen, tmp_path)
    assert [place.name for place in places] == ["spectra.svg", "heads.svg", "attention.svg"]
    assert all("<svg" in place.read_text() for place in places)
    assert len(inside.table(records)) == 2 + 3


def test_the_model_is_left_as_it_was(model, ids):
    m = model()
    before = jax.tree.map(np.array, m)
    inside.analyze(m, ids)
    jax.tree.map(np.testing.assert_array_equal, before, m)
