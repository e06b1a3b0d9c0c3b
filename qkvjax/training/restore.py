"""A trained model from its workdir, without its optimizer."""

from __future__ import annotations

from pathlib import Path

import jax

from qkvjax import config as configs
from qkvjax.data.open import open_dataset, reads_text
from qkvjax.data.tokenizers import load_tokenizer
from qkvjax.errors import UserError
from qkvjax.models.build import make
from qkvjax.models.spec import model_spec
from qkvjax.parallel.mesh import find_devices
from qkvjax.training.checkpoint import Checkpoints
from qkvjax.training.run import spec_of


def load_model(workdir: str | Path, step: int | None = None, *, log=print):
    """(model, tokenizer, config, step) of a run; the model's arrays lie on one device.

    The tokenizer is None where the data are labelled examples, which are opened for their
    shapes.

    Raises:
      UserError: no run there, no such step, or no intact checkpoint (code 45).
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"there is no workdir {workdir}: train a model first")
    config = configs.load(workdir / "config.json")
    configs.validate(config)
    if reads_text(config):
        tokenizer = load_tokenizer(config.data.tokenizer)
        spec = model_spec(configs.plain(config.model), tokenizer.num_ids, config.data.seq_len)
    else:
        tokenizer, spec = None, spec_of(config, open_dataset(config))
    place = jax.sharding.SingleDeviceSharding(find_devices()[0])
    shapes = jax.eval_shape(lambda: make(spec, jax.random.key(0)))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        state, step = checkpoints.restore({"model": abstract}, step, log=log)
    finally:
        checkpoints.close()
    return state["model"], tokenizer, config, step
