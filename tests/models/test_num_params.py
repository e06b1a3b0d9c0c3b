"""`num_params` is how many numbers a model has, before and after training."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qkvjax import config as configs
from qkvjax.attention.spec import SHARINGS
from qkvjax.commands import cli
from qkvjax.models.build import count
from qkvjax.models.lm import LanguageModel
from qkvjax.models.spec import model_spec, padded_vocab
from qkvjax.training.step import TrainState, init_state, make_train_step

TOKENIZER_IDS = {"bytes": 257, "gpt2": 50_257}
RECIPES = sorted(
    path.name for path in Path(cli.find_config("configs/lm.py")).parent.glob("[!_]*.py")
)

fields = st.fixed_dictionaries(
    {
        "sharing": st.sampled_from(SHARINGS),
        "num_kv_heads": st.sampled_from([None, 2, 1]),
        "head_dim": st.sampled_from([None, 6]),
        "use_bias": st.booleans(),
        "norm": st.sampled_from(["rmsnorm", "layernorm"]),
        "position": st.sampled_from(["none", "learned", "sincos", "rope"]),
        "mlp": st.sampled_from(["gelu", "swiglu"]),
        "tie_embeddings": st.booleans(),
        "qk_norm": st.booleans(),
        "init": st.sampled_from(["normal", "fan_in"]),
        "num_layers": st.integers(1, 4),
        "layer_overrides": st.sampled_from([(), ({"window": 4}, {"sharing": "q-k=v"})]),
    }
)


def abstract(spec):
    return jax.eval_shape(lambda: LanguageModel(spec, key=jax.random.key(0)))


@settings(max_examples=60, derandomize=True)
@given(fields)
def test_any_model(tiny, fields):
    tied_query = "q=" in fields["sharing"]
    assume(not (tied_query and fields["num_kv_heads"]))
    spec = tiny(**fields)
    assert count(abstract(spec)) == spec.num_params


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(recipe, name):
    config = recipe(f"configs/{name}")
    ids = TOKENIZER_IDS[config.data.tokenizer.partition(":")[0]]
    spec = model_spec(configs.resolve(config).model, ids, config.data.seq_len)
    assert count(abstract(spec)) == spec.num_params > 0


@pytest.mark.parametrize("size", ["30m", "124m", "350m"])
def test_every_size(recipe, size):
    config = recipe("configs/lm.py", f"size={size}")
    spec = model_spec(configs.resolve(config).model, TOKENIZER_IDS["gpt2"], config.data.seq_len)
    assert count(abstract(spec)) == spec.num_params


def test_a_step_adds_no_leaf_and_keeps_ties(tiny):
    """Every leaf learns, no leaf is added, and a block of tied roles stays one array."""
    spec = tiny(num_layers=1, sharing="q=k=v", position="learned", norm="layernorm", use_bias=True)
    tx = optax.sgd(0.1)
    config = configs.default()
    state = init_state(spec, tx, jax.random.key(0), config)
    ids = jax.random.randint(jax.random.key(1), (1, 2, 9), 0, 61)
    batch = {
        "inputs": ids[..., :-1],
        "targets": ids[..., 1:],
        "weights": jnp.ones((1, 2, 8)),
        "positions": jnp.tile(jnp.arange(8), (1, 2, 1)),
        "segment_ids": jnp.zeros((1, 2, 8), jnp.int32),
    }
    after, _ = jax.jit(make_train_step(config, tx, lambda step: 0.1))(state, batch)
    assert isinstance(after, TrainState)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert count(after.model) == count(state.model) == spec.num_params
    assert list(after.model.stack.blocks[0].attention.projections) == ["qkv"]
    assert after.model.head is None  # it is the embedding
    before = jax.tree_util.tree_leaves_with_path(state.model)
    for (path, old), new in zip(before, jax.tree.leaves(after.model)):
        assert np.any(old != new), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("ids", "rows"), [(50_257, 50_304), (257, 264), (256, 256), (4096, 4096), (4097, 4224)]
)
def test_padded_vocabulary(ids, rows):
    assert padded_vocab(ids) == rows
