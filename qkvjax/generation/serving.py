"""A model as it is served, and the programs of generation compiled ahead of time.

A served model has separate arrays for each layer, in the dtype of the computation. Its programs can
be compiled for devices that this machine does not have.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qkvjax.generation import decode
from qkvjax.models.build import make
from qkvjax.models.lm import LanguageModel
from qkvjax.models.spec import ModelSpec
from qkvjax.models.transformer import with_stack
from qkvjax.models.unrolled import unrolled
from qkvjax.parallel import placed, rules
from qkvjax.training.optimizer import is_matrix, path_names
from qkvjax.training.step import state_shardings

# Matrices of blocks that are used in the dtype of activations; a router's is used in float32.
CAST = rules.MATRICES.keys() - {"embedding", "head"}


def serve(model: LanguageModel, dtype) -> LanguageModel:
    """Turns a restored model into one that decodes without a second copy of its parameters.

    Each layer gets its own arrays, and the matrices of blocks the dtype in which they are used:
    logits in `dtype` stay the same. Each stacked array is deleted as soon as it is taken apart, so
    that memory peaks at the parameters and one stacked array.

    Args:
      model: of `training.restore.load_model`. It cannot be used any more afterwards.
      dtype: of activations.
    """

    def take_apart(path, stacked, count):
        parts = _parts(path, stacked, count, dtype)
        stacked.delete()
        return parts

    with placed.on_mesh_of(model):
        return with_stack(model, unrolled(model.stack, take_apart))


def abstract(
    spec: ModelSpec, mesh: jax.sharding.Mesh, dtype, param_dtype="float32"
) -> LanguageModel:
    """Returns the model that `serve` makes, as ShapeDtypeStructs on a mesh.

    Args:
      spec: of a language model.
      mesh: its devices may be of another machine.
      dtype: of activations.
      param_dtype: of what is not cast: embedding, head, norms, biases.
    """

    def make_stacked(key):
        return jax.tree.map(lambda leaf: leaf.astype(param_dtype), make(spec, key))

    model = jax.eval_shape(make_stacked, jax.random.key(0))
    model = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model,
        state_shardings(model, mesh),
    )

    def serve_abstract(model):
        def take_apart(path, leaf, count):
            return _parts(path, leaf, count, dtype)

        return with_stack(model, unrolled(model.stack, take_apart))

    with jax.set_mesh(mesh):
        return placed.on_devices_of(mesh, jax.eval_shape(serve_abstract, model))


def compile_generation(
    spec: ModelSpec,
    mesh: jax.sharding.Mesh,
    batch: int,
    context: int,
    *,
    max_tokens: int = 32,
    dtype="bfloat16",
    param_dtype="float32",
    cache_dtype=None,
    layout: str | None = None,
    page_size: int | None = None,
) -> dict[str, jax.stages.Compiled]:
    """Compiles the programs that `generate` runs with a served model.

    Args:
      spec: of a language model.
      mesh: of the model; its devices may be of another machine.
      batch: sequences.
      context: slots of each sequence's cache; the prompt leaves `max_tokens` of them free.
      max_tokens: rounds of the loop over tokens, at most context - 1.
      dtype, param_dtype: as in `abstract`.
      cache_dtype, layout, page_size: as in `generate`.

    Returns:
      "prefill", which writes a piece of a prompt to the cache, and "decode", the loop over tokens.
      `costs.measure.peak_bytes` gives the peak bytes of a device. XLA's CPU runs what it can at
      once, so it gathers the parameters of all layers of "fsdp" together, which accelerators do
      not; XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false makes it gather as they
      do.

    Raises:
      UserError: a mesh that does not divide the heads, a layout that a sharing lacks.
    """
    dtype = jnp.dtype(dtype)
    max_tokens = min(max_tokens, context - 1)
    model = abstract(spec, mesh, dtype, param_dtype)

    def on_mesh(make_arrays):
        return placed.on_devices_of(mesh, jax.eval_shape(make_arrays))

    with jax.set_mesh(mesh):
        decode.check_heads(spec)
        cache, table = on_mesh(
            lambda: decode.make_caches(
                model, batch, context, cache_dtype or dtype, layout, page_size
            )
        )
        piece = min(decode.PREFILL, context)
        ids = on_mesh(lambda: rules.spread_rows(jnp.zeros((batch, piece), jnp.int32)))
        logits = on_mesh(
            lambda: rules.spread_rows(jnp.zeros((batch, spec.vocab_size), jnp.float32))
        )
        start = jax.ShapeDtypeStruct((), jnp.int32)
        temperature = jax.ShapeDtypeStruct((), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        prefill = decode.prefill_piece.lower(model, None, cache, ids, start, table, dtype=dtype)
        loop = decode.sample_tokens.lower(
            model,
            None,
            cache,
            logits,
            start,
            key,
            temperature,
            table,
            dtype=dtype,
            max_tokens=max_tokens,
            num_ids=spec.vocab_size,
            greedy=False,
        )
        return {"prefill": prefill.compile(), "decode": loop.compile()}


def _parts(path, stacked, count: int, dtype) -> list[jax.Array]:
    """Returns the `count` arrays of a stacked array, in the dtype in which they are used."""
    if is_matrix(path) and not CAST.isdisjoint(path_names(path)):
        return [stacked[i].astype(dtype) for i in range(count)]
    return [stacked[i] for i in range(count)]
