"""Trained models without their optimizer: from a workdir, and into one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from qkvjax import config as configs
from qkvjax.data.open import open_dataset, reads_text
from qkvjax.data.tokenizers import load_tokenizer
from qkvjax.errors import UserError
from qkvjax.files import write_json
from qkvjax.models.build import make
from qkvjax.models.spec import ModelSpec
from qkvjax.parallel import placed
from qkvjax.parallel.mesh import find_devices
from qkvjax.training.checkpoint import Checkpoints, named_arrays
from qkvjax.training.fits import check_arrays
from qkvjax.training.identity import keep_tokenizer, workdir_tokenizer
from qkvjax.training.optimizer import narrow
from qkvjax.training.run import planned_spec, spec_of
from qkvjax.training.step import state_shardings
from qkvjax.workdir import open_workdir


def load_model(
    workdir: str | Path, step: int | None = None, *, mesh=None, attention="auto", log=print
):
    """Restores a run's model: (model, tokenizer, config, step).

    The config's `data.tokenizer` names the workdir's copy of the tokenizer.

    The tokenizer is None where the data are labelled examples, which are opened for their
    shapes.

    Args:
      workdir: of a training run.
      step: which checkpoint; None means the newest intact one.
      mesh: over whose devices the parameters are sharded, as in training; or a function from the
        model's spec to that mesh, such as `parallel.mesh.for_generation`; None means one device.
        Run the model under `placed.on_mesh_of(model)`.
      attention: what computes attention; see `kernels.dispatch`.

    Raises:
      UserError: no run there, no such step, or no intact checkpoint (code 45).
    """
    config = _read_config(workdir)
    config = configs.changed(config, train={"attention": attention})
    tokenizer = load_tokenizer(config.data.tokenizer) if reads_text(config) else None
    model, step = _restore(workdir, config, step, log, mesh)
    return model, tokenizer, config, step


def load_arrays(workdir: str | Path, step: int | None = None, *, log=print):
    """(arrays by name, config, step) of a run, for what is no model of this config any more."""
    config = _read_config(workdir)
    model, step = _restore(workdir, config, step, log)
    arrays = {name: np.asarray(array) for name, array in named_arrays({"model": model}).items()}
    return arrays, config, step


def abstract_model(config) -> tuple[ModelSpec, dict[str, jax.ShapeDtypeStruct]]:
    """The spec of a config's model, and its arrays by name."""
    spec, shapes = _shapes(config)
    return spec, named_arrays({"model": shapes})


def new_workdir(workdir: str | None) -> Path:
    """A workdir that holds no run; raises UserError for one that does."""
    path = open_workdir(workdir)
    if (path / "config.json").exists() or (path / "checkpoints").exists():
        raise UserError(f"{workdir} holds a model already: choose another folder, or remove it")
    return path


def save_model(workdir: Path, config, arrays: Mapping[str, np.ndarray], origin: dict) -> ModelSpec:
    """Makes a workdir of a model that was not trained here, its checkpoint being step 0.

    Args:
      workdir: from `new_workdir`.
      config: what the model is.
      arrays: its numbers by name; tables with a row for each id may lack rows that pad them.
      origin: where they come from, for origin.json.

    Raises:
      UserError: the arrays are not those of the config's model.
    """
    spec, wanted = abstract_model(config)
    if wanted.keys() != arrays.keys():
        raise UserError(f"the model lacks {sorted(wanted.keys() ^ arrays.keys())[0]}")
    state = {}
    for name, leaf in wanted.items():
        missing = [a - b for a, b in zip(leaf.shape, arrays[name].shape, strict=True)]
        padded = np.pad(arrays[name], [(0, n) for n in missing]) if any(missing) else arrays[name]
        state[name] = jax.numpy.asarray(padded, leaf.dtype)
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        checkpoints.save(0, state)
    write_json(workdir / "origin.json", origin)
    if reads_text(config):
        copy = keep_tokenizer(workdir, config.data.tokenizer)
        config = configs.changed(config, data={"tokenizer": copy})
    write_json(workdir / "config.json", configs.to_dict(config))
    return spec


def _read_config(workdir):
    if not Path(workdir).is_dir():
        raise UserError(f"there is no workdir {workdir}: train a model first")
    config = configs.load(Path(workdir) / "config.json")
    if reads_text(config):
        copy = workdir_tokenizer(Path(workdir), config.data.tokenizer)
        config = configs.changed(config, data={"tokenizer": copy})
    return config


def _shapes(config):
    """(spec, model of ShapeDtypeStructs) of a config."""
    if reads_text(config):
        spec = planned_spec(config)
    else:
        spec = spec_of(config, open_dataset(config))
    dtype = "float32" if config.optimizer.average else config.train.param_dtype
    return spec, jax.eval_shape(lambda: narrow(make(spec, jax.random.key(0)), dtype))


def _restore(workdir, config, step, log, mesh=None):
    spec, abstract = _shapes(config)
    mesh = mesh(spec) if callable(mesh) else mesh
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(find_devices()[0])
        places = jax.tree.map(lambda leaf: device, abstract)
    else:
        places = state_shardings(abstract, mesh)
    # A run that averages its weights is known by the average.
    part = "average" if config.optimizer.average else "model"

    def place(leaf, at):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

    abstract = {part: jax.tree.map(place, abstract, places)}
    check_arrays(
        "the checkpoint's model",
        abstract,
        "run it where there are more devices, or with more memory",
    )
    checkpoints = Checkpoints(Path(workdir) / "checkpoints")
    with contextlib.closing(checkpoints), placed.on_mesh_of(abstract):
        state, step = checkpoints.restore(abstract, step, log=log)
    return state[part], step
