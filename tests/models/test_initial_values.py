"""Initial values depend on the seed and on a parameter's name, and on nothing else."""

import jax
import numpy as np
import pytest

from qkvjax.attention.spec import SHARINGS
from qkvjax.models.lm import LanguageModel

FIELDS = {"tie_embeddings": False, "position": "learned", "head_dim": 16, "mlp_ratio": 3.0}


def named(model):
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def models(tiny):
    """Every sharing at seed 0."""
    return {
        sharing: LanguageModel(tiny(sharing=sharing, **FIELDS), key=jax.random.key(0))
        for sharing in SHARINGS
    }


@pytest.mark.parametrize("sharing", SHARINGS[1:])
def test_models_of_one_seed_start_alike(models, sharing):
    base = named(models["q-k-v"])
    other = named(models[sharing])
    common = base.keys() & other.keys()
    for part in ("embedding", "positions", "head", "up", "gate", "down", "output"):
        assert any(f"'{part}'" in name or f".{part}" in name for name in common)
    for name in common:
        np.testing.assert_array_equal(base[name], other[name], err_msg=name)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_block_starts_as_its_first_role(models, sharing):
    weights = {
        name: {n: p.weight[...] for n, p in m.stack.blocks[0].attention.projections.items()}
        for name, m in models.items()
    }
    for block, weight in weights[sharing].items():
        np.testing.assert_array_equal(weight, weights["q-k-v"][block[0]], err_msg=block)


def test_different_parameters_differ(models):
    base = named(models["q-k-v"])
    other = named(LanguageModel(models["q-k-v"].spec, key=jax.random.key(1)))
    matrices = [n for n, a in base.items() if np.ptp(a) > 0]  # not gains of one
    assert len(matrices) == 3 + 2 * 7
    for i, a in enumerate(matrices):
        assert not np.any(base[a] == other[a]), a
        for b in matrices[:i]:
            if base[a].shape == base[b].shape:
                assert not np.any(base[a] == base[b]), (a, b)


def test_scales(tiny, models):
    """fan_in: N(0, 1/fan_in), both outputs over sqrt(2 L); normal: 0.02 everywhere."""
    normal = LanguageModel(tiny(init="normal", **FIELDS), key=jax.random.key(0))
    d_model = 32
    heads_width = 64
    d_ff = 96
    branches = 4  # 2 L
    fan_in = [d_model, d_model, d_model, heads_width * branches, d_ff * branches]
    for model, expected in (
        (models["q-k-v"], [n**-0.5 for n in fan_in]),
        (normal, [0.02] * 5),
    ):
        block = model.stack.blocks[0]
        matrices = (
            model.embedding,
            block.attention.projections["q"].weight,
            block.mlp.up.weight,
            block.attention.output.weight,
            block.mlp.down.weight,
        )
        stds = [float(np.std(matrix[...])) for matrix in matrices]
        np.testing.assert_allclose(stds, expected, rtol=0.06)
