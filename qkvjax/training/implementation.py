"""What computes the attention of a run, decided before anything is compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qkvjax.attention.layer import LAYERS
from qkvjax.kernels import dispatch
from qkvjax.parallel import rules


def settle_attention(run) -> str:
    """Decides what computes attention in a run's layers, alike on all processes of the job.

    Every process calls it at the same point, after the configurations were compared. What the
    train step asks for later is answered by what was decided here. Called again for the same run it
    costs nothing but a trace of each kind of layer.

    Args:
      run: a `training.run.Run`.

    Returns:
      The names of the implementations, separated by commas: "xla", or "hopper, triton".

    Raises:
      UserError: the one that train.attention names cannot compute a layer; on every process.
    """
    with jax.set_mesh(run.mesh):
        return ", ".join(dispatch.settle(lambda: _trace(run), run.config.train.attention))


def _trace(run) -> None:
    """Traces a layer of each kind on sequences of the run, as its train step does."""
    config, spec, mesh = run.config, run.spec, run.mesh
    length = config.data.seq_len + (spec.kind == "vit")  # a class token before the patches
    tokens = rules.sharding(mesh, "batch", "length")
    shape = run.micro_batch, length
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=tokens)
    x = jax.ShapeDtypeStruct(
        (*shape, spec.d_model),
        config.train.compute_dtype,
        sharding=rules.sharding(mesh, "batch", "length", None),
    )
    segments = ids if spec.kind == "lm" else None  # labelled examples have none
    for layer in dict.fromkeys(spec.layers):

        def attend(key, x, positions, segments, layer=layer):
            return LAYERS[type(layer)](layer, key=key)(x, positions, segments)

        key = jax.eval_shape(lambda: jax.random.key(0))
        jax.eval_shape(attend, key, x, ids, segments)
