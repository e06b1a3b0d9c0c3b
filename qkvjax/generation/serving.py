"""A model as it is served: layers with arrays of their own, in the dtype that is computed in; and
the programs of generation compiled for devices that need not be here.
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
    """Makes of a restored model one whose decoding holds every parameter once.

    The layers get arrays of their own, and the matrices of blocks the dtype that they are used in:
    logits in `dtype` stay the same. Stacked arrays are deleted one after the other as they are
    taken apart, so that memory peaks at the parameters and one stacked array; the given model
    cannot be used any more.

    Args:
      model: as `training.restore.load_model` gives it.
      dtype: of activations.
    """

    def take(path, stacked, count):
        parts = _parts(path, stacked, count, dtype)
        stacked.delete()
        return parts

    with placed.on_mesh_of(model):
        return with_stack(model, unrolled(model.stack, take))


def abstract(
    spec: ModelSpec, mesh: jax.sharding.Mesh, dtype, param_dtype="float32"
) -> LanguageModel:
    """The model that `serve` makes, as ShapeDtypeStructs over a mesh.

    Args:
      spec: of a language model.
      mesh: whose devices need not be here.
      dtype: of activations.
      param_dtype: of what is not cast: embedding, head, norms, biases.
    """

    def stacked(key):
        return jax.tree.map(lambda leaf: leaf.astype(param_dtype), make(spec, key))

    model = jax.eval_shape(stacked, jax.random.key(0))
    model = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        model,
        state_shardings(model, mesh),
    )

    def served(model):
        def take(path, leaf, count):
            return _parts(path, leaf, count, dtype)

        return with_stack(model, unrolled(model.stack, take))

    with jax.set_mesh(mesh):
        return placed.on_devices_of(mesh, jax.eval_shape(served, model))


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
    """Compiles what `generate` runs for a served model, for devices that need not be here.

    Args:
      spec: of a language model.
      mesh: over whose devices the model lies.
      batch: sequences.
      context: slots of each sequence's cache; the prompt leaves `max_tokens` of them free.
      max_tokens: rounds of the loop over tokens, at most context - 1.
      dtype, param_dtype: as in `abstract`.
      cache_dtype, layout, page_size: as in `generate`.

    Returns:
      "prefill", a piece of a prompt onto the cache, and "decode", the loop over tokens. Peak bytes
      of a device: `analysis.measure.peak_bytes`. XLA's CPU runs what it can at once, so it gathers
      the parameters of all layers of "fsdp" together, which accelerators do not;
      XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false lets it do as they do.

    Raises:
      UserError: a mesh that cannot share out the heads, a layout that a sharing lacks.
    """
    dtype = jnp.dtype(dtype)
    max_tokens = min(max_tokens, context - 1)
    model = abstract(spec, mesh, dtype, param_dtype)
    with jax.set_mesh(mesh):
        decode.check_heads(spec)

        def caches_and_table():
            arrays = batch, context, cache_dtype or dtype, layout, page_size
            return decode.make_caches(model, *arrays)

        def rows(shape, dtype):
            made = jax.eval_shape(lambda: rules.spread_rows(jnp.zeros(shape, dtype)))
            return placed.on_devices_of(mesh, made)

        cache, table = placed.on_devices_of(mesh, jax.eval_shape(caches_and_table))
        ids = rows((batch, min(decode.PREFILL, context)), jnp.int32)
        logits = rows((batch, spec.vocab_size), jnp.float32)
        start, warmth = (jax.ShapeDtypeStruct((), kind) for kind in (jnp.int32, jnp.float32))
        key = jax.eval_shape(lambda: jax.random.key(0))
        first = decode.prefill_piece.lower(model, None, cache, ids, start, table, dtype=dtype)
        then = decode.sample_tokens.lower(
            model,
            None,
            cache,
            logits,
            start,
            key,
            warmth,
            table,
            dtype=dtype,
            max_tokens=max_tokens,
            num_ids=spec.vocab_size,
            greedy=False,
        )
        return {"prefill": first.compile(), "decode": then.compile()}


def _parts(path, stacked, count: int, dtype) -> list[jax.Array]:
    """The `count` arrays of a stacked one, in the dtype that they are used in."""
    if is_matrix(path) and not CAST.isdisjoint(path_names(path)):
        return [stacked[i].astype(dtype) for i in range(count)]
    return [stacked[i] for i in range(count)]
