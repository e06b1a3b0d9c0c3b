"""The measures of `inside` are of what the layers compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.errors import UserError
from qkvjax.evaluation import inside, spectra
from qkvjax.evaluation.activations import layer_activations
from qkvjax.report import inside_plots

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
    (activations,) = layer_activations(m, ids)
    np.testing.assert_allclose(activations.weights.sum(-1), 1, atol=1e-5)
    (block,) = m.stack.layers()
    positions = jnp.tile(jnp.arange(T), (B, 1))
    y = block.attention_norm(m.embed(jnp.asarray(ids), positions))
    value = next(name for name in activations.states if "v" in name)
    v = np.repeat(activations.states[value], 4 // activations.states[value].shape[2], axis=2)
    mixed = np.einsum("bnts,bsnh->btnh", activations.weights, v).reshape(B, T, -1)
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


def test_whole_layers_and_heads(model, ids):
    """Grouped heads: each query head meets its group's keys, in products and in angles."""
    m = model(sharing="q-k-v", num_kv_heads=2, num_layers=1)
    records, (activations,) = inside.analyze(m, ids)
    layer = m.stack.layers()[0].attention
    weights = {n: np.asarray(p.weight[...], np.float64) for n, p in layer.projections.items()}
    keys = np.repeat(weights["k"].reshape(32, 2, 8), 2, axis=1).reshape(32, 32)
    (whole,) = values(records, head=None, what="W_q W_k^T", metric="singular_values")
    assert whole == pytest.approx(np.linalg.norm(weights["q"] @ keys.T, 2))
    angle_records = [r for r in records if r["metric"] == "principal_angles"]
    assert [(r["what"], r["head"]) for r in angle_records] == [
        *(("W_q, W_k", h) for h in range(4)),
        *(("W_q, W_v", h) for h in range(4)),
        ("W_k, W_v", 0),
        ("W_k, W_v", 1),
    ]
    angles = spectra.principal_angles(weights["q"][:, 24:], weights["k"][:, 8:])
    np.testing.assert_allclose(angle_records[3]["values"], angles)
    assert angle_records[3]["value"] == pytest.approx(np.cos(angles).mean()) and angles.max() > 0.1
    part = activations.states["k"][:, :, 1].reshape(-1, 8)
    (largest,) = values(records, head=1, what="k activations", metric="singular_values")
    assert largest == pytest.approx(np.linalg.norm(part - part.mean(0), 2), rel=1e-5)


def test_only_the_chosen_projections_are_measured(model, ids):
    records, _ = inside.analyze(model(sharing="q-k=v"), ids, ["kv"])
    assert {r["what"] for r in records} == {"W_kv", "kv activations", "attention"}


def test_an_unknown_projection(model, ids):
    with pytest.raises(UserError, match="no projection 'k' in sharing 'q-k=v': use one of q, kv"):
        inside.analyze(model(sharing="q-k=v"), ids, ["k"])


def test_a_pattern_of_layers_is_drawn(model, ids, tmp_path):
    m = model(num_layers=3, layer_overrides=({}, {"sharing": "q-k=v"}, {"num_kv_heads": 1}))
    records, activations = inside.analyze(m, ids)
    paths = inside_plots.write(records, activations, tmp_path)
    assert [path.name for path in paths] == ["spectra.svg", "heads.svg", "attention.svg"]
    assert all("<svg" in path.read_text() for path in paths)
    assert len(inside_plots.table(records)) == 2 + 3
    records, activations = inside.analyze(m, ids, ["kv"])  # which one of three layers has
    assert {r["layer"] for r in records if r["what"] == "W_kv"} == {1}
    assert len(inside_plots.write(records, activations, tmp_path)) == 3
    with pytest.raises(UserError, match="sharing 'q-k-v' and 'q-k=v': use one of q, k, v, kv"):
        inside.analyze(m, ids, ["qk"])


def test_the_model_is_left_as_it_was(model, ids):
    m = model()
    before = jax.tree.map(np.array, m)
    inside.analyze(m, ids)
    jax.tree.map(np.testing.assert_array_equal, before, m)


def test_the_means_of_a_model(model, ids):
    records, _ = inside.analyze(model(sharing="q-k-v"), ids)
    means = inside.means(records)
    assert means["rank_q"] == pytest.approx(
        np.mean(values(records, head=None, what="W_q", metric="effective_rank"))
    )
    scores = [
        r["value"]
        for r in records
        if (r["what"], r["metric"]) == ("W_q W_k^T", "effective_rank") and r["head"] is not None
    ]
    assert means["rank_scores"] == pytest.approx(np.mean(scores))
    assert means["max_logit"] == max(values(records, metric="max_logit"))
    assert means["cka_k_v"] == pytest.approx(
        np.mean(values(records, what="k, v activations", metric="linear_cka"))
    )
    assert means["rank_k_activations"] == pytest.approx(
        np.mean(values(records, head=None, what="k activations", metric="effective_rank"))
    )
    assert means["angles_k_v"] == pytest.approx(
        np.mean(values(records, what="W_k, W_v", metric="principal_angles"))
    )
    tied = inside.means(inside.analyze(model(sharing="q=k-v"), ids)[0])
    assert {"rank_qk", "rank_v", "rank_scores", "angles_qk_v"} <= tied.keys()
    assert "cka_k_v" not in tied
    assert tied["score_asymmetry"] < 1e-6


def test_spectra_are_means_over_layers(model):
    m = model(sharing="q-k=v", num_layers=2)
    spectra_by_name = inside.spectra_of(m)
    assert set(spectra_by_name) == {"q", "kv"} and spectra_by_name["q"][0] == 1
    each = [
        spectra.singular_values(b.attention.projections["q"].weight[...]) for b in m.stack.layers()
    ]
    expected = np.mean([v / v[0] for v in each], 0)
    np.testing.assert_allclose(spectra_by_name["q"], expected, atol=1e-5)


def test_the_evaluator_measures_a_model_under_a_mesh(model, tmp_path, monkeypatch):
    from qkvjax.data.dataset import prepare
    from qkvjax.parallel.mesh import make_mesh

    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path))
    (tmp_path / "a.txt").write_text("some words " * 60)
    data = prepare(f"text:{tmp_path / 'a.txt'}", "bytes", 16)
    m = model(tokenizer_size=257)
    free = inside.score(m, data, batch_size=3)
    with jax.set_mesh(make_mesh({"replica": 1, "fsdp": 1})):
        assert inside.score(m, data, batch_size=3) == pytest.approx(free)


def test_encoders_are_measured_too(filled, recipe):
    from qkvjax import config as configs
    from qkvjax.data.open import open_dataset
    from qkvjax.models.build import make
    from qkvjax.training.run import spec_of

    config = recipe("configs/paper/synthetic.py")
    configs.set_field(config, "data.source", "synthetic:sort:train=20:test=10")
    config.model.d_model = 32
    data = open_dataset(config)
    m = filled(lambda: make(spec_of(configs.resolve(config), data), jax.random.key(0)))
    activations = layer_activations(m, inside.sequences(data, 4))
    assert activations[0].weights.shape == (4, 2, 16, 16)
    assert (activations[0].weights > 0).all()  # nothing is masked
