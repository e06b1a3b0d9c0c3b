"""`qkvjax.load`, with which a notebook reads a run."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkvjax
from qkvjax import config as configs
from qkvjax.errors import UserError
from qkvjax.files import write_json
from qkvjax.models.lm import LanguageModel
from qkvjax.models.spec import model_spec
from qkvjax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory, filled):
    """(workdir, {step: model}) of a run with checkpoints of two steps."""
    workdir = tmp_path_factory.mktemp("run")
    config = configs.default()
    config.model.update(num_layers=2, d_model=16, num_heads=2, sharing="q=k=v", mlp_ratio=1.0)
    config.data.update(source="text:nowhere", seq_len=8)
    write_json(workdir / "config.json", configs.to_dict(config))
    spec = model_spec(configs.resolve(config).model, 257, 8)
    models = {
        step: filled(lambda: LanguageModel(spec, key=jax.random.key(0)), seed=step)
        for step in (3, 7)
    }
    checkpoints = Checkpoints(workdir / "checkpoints")
    for step, model in models.items():
        checkpoints.save(step, {"model": model, "step": jnp.int32(step)})
    checkpoints.close()
    return workdir, models


@pytest.mark.parametrize(("step", "expected"), [(None, 7), (3, 3), (7, 7)])
def test_model_tokenizer_config(run, step, expected):
    workdir, models = run
    model, tokenizer, config = qkvjax.load(workdir, step)
    assert jax.tree.structure(model) == jax.tree.structure(models[expected])
    for loaded, saved in zip(jax.tree.leaves(model), jax.tree.leaves(models[expected])):
        np.testing.assert_array_equal(loaded, saved)
        assert len(loaded.devices()) == 1
    assert config.model.sharing == "q=k=v" and config.data.seq_len == 8
    assert tokenizer.decode(tokenizer.encode("é".encode())) == "é"


def test_a_loaded_model_is_called_on_ids(run):
    model, tokenizer, _ = qkvjax.load(str(run[0]))
    ids = jnp.asarray(tokenizer.encode(b"to be"))[None]
    logits = model(ids)
    assert logits.shape == (1, 5, 257) == (*ids.shape, tokenizer.num_ids)
    assert logits.dtype == jnp.float32
    assert np.all(np.isfinite(logits)) and float(jnp.std(logits)) > 0.1


def test_missing_runs_and_steps(run, tmp_path):
    workdir, _ = run
    with pytest.raises(UserError, match="no workdir.*train a model first"):
        qkvjax.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="config.json is missing"):
        qkvjax.load(tmp_path)
    with pytest.raises(UserError, match="5"):
        qkvjax.load(workdir, 5)


def test_a_light_import():
    """`import qkvjax` alone imports neither jax nor numpy."""
    program = "import qkvjax, sys; print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == "[]"
