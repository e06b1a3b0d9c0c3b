"""A checkpoint of 27 November 2026 (jax 0.10.2, orbax 0.12.8) still loads, on every jax."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkvjax
from qkvjax import config as configs
from qkvjax.commands.evaluate import verify
from qkvjax.models.spec import model_spec
from qkvjax.parallel.mesh import make_mesh
from qkvjax.training.checkpoint import Checkpoints, named_arrays
from qkvjax.training.run import abstract_state
from qkvjax.training.step import make_optimizer

# Of the first logits behind "To be": what this model gave on that day.
LOGITS = [-1.441714, 1.173447, 0.481307, 0.609888, 0.923224, -0.639495]


@pytest.fixture
def workdir(tmp_path):
    return Path(shutil.copytree(Path(__file__).with_name("old_checkpoint"), tmp_path / "run"))


def test_every_array_is_what_was_saved(workdir, capsys):
    verify(workdir, None)
    assert capsys.readouterr().out == "step 4: intact, 41 arrays\n"


def test_the_model_gives_what_it_gave(workdir):
    model, tokenizer, config = qkvjax.load(workdir)
    assert config.model.sharing == "q-k=v"
    logits = model(jnp.asarray(tokenizer.encode(b"To be"))[None])
    np.testing.assert_allclose(logits[0, -1, :6], LOGITS, rtol=1e-4)


def test_a_run_would_go_on_from_it(workdir):
    config = configs.load(workdir / "config.json")
    spec = model_spec(configs.resolve(config).model, 257, config.data.seq_len)
    mesh = make_mesh({}, jax.devices()[:1])
    abstract = abstract_state(spec, make_optimizer(config, 4, 0)[0], mesh, config)
    checkpoints = Checkpoints(workdir / "checkpoints")
    with jax.set_mesh(mesh):
        state, step = checkpoints.restore(abstract)
    assert step == int(state.step) == 4 and int(state.recent.count) == 4
    assert len(named_arrays(state)) == 41
    checkpoints.close()
