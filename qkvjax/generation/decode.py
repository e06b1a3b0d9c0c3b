"""The programs of decoding: new tokens run through the model and its caches.

Letters: B sequences, T new tokens, P tokens of a prompt, D model width, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.attention import cache as caches
from qkvjax.errors import UserError
from qkvjax.models.lm import LanguageModel
from qkvjax.models.spec import ModelSpec
from qkvjax.parallel import rules

PREFILL = 512  # tokens of a prompt that enter the cache at a time


# ---- caches -----------------------------------------------------------------------------------


def empty_caches(
    model: LanguageModel, batch: int, length: int, dtype, layout=None, sequences=None
) -> list:
    """Makes one cache a layer; arguments as in `attention.cache.empty`."""
    return [
        caches.empty(layer, batch, length, dtype, layout, sequences) for layer in model.spec.layers
    ]


def make_caches(model, batch, length, dtype, layout=None, page_size=None):
    """Makes empty caches for `length` tokens of each of `batch` sequences.

    Args:
      dtype, layout: as in `attention.cache.empty`.
      page_size: slots of a page; None means contiguous caches.

    Returns:
      (caches, block table or None). A windowed layer has slots for its window in a contiguous
      cache, for all tokens in pages.
    """
    if page_size is None:
        return empty_caches(model, batch, length, dtype, layout), None
    # Pages are sharded like the sequences that use them. Each group of devices numbers its pages
    # from 0, so that all groups have the same table.
    groups = rules.row_ways(batch)
    sequences = batch // groups
    pages = -(-length // page_size)  # of a sequence
    table = caches.block_table([length] * sequences, page_size, sequences * pages)
    table = rules.spread_rows(jnp.asarray(np.tile(table, (groups, 1))))
    return empty_caches(model, batch * pages, page_size, dtype, layout, batch), table


def check_heads(spec: ModelSpec) -> None:
    """Raises UserError where the mesh in force does not divide a layer's query heads."""
    ways = rules.ways("heads") if rules.has_mesh() else 1
    for count in sorted({layer.num_heads for layer in spec.layers}):
        if count % ways:
            raise UserError(
                f"{count} query heads cannot be divided among {ways} devices (mesh.tensor): use a"
                " mesh with a smaller tensor axis"
            )


# ---- new tokens -------------------------------------------------------------------------------


def advance(model, layers, cache, ids, start, *, dtype, table=None, rotations=None, impl=None):
    """Runs new tokens through the model and writes them to its caches.

    Args:
      model: for the embedding and the final norm.
      layers: `model.stack.layers()`; None reads the arrays of the model itself, for a model of
        `generation.serving.serve`.
      cache: a list of caches, one a layer.
      ids: int [B, T], at positions start, ..., start + T - 1.
      start: int scalar, or [B] where sequences have different lengths.
      dtype: of activations.
      table: the block table of caches in pages; None means contiguous caches.
      rotations: of `attention.cache.rotations`, or None.
      impl: which implementation of attention; None means the one that the model names.

    Returns:
      (the input of the head [B, T, D], the caches).
    """
    ids = rules.spread_rows(ids)
    positions = jnp.broadcast_to(jnp.reshape(start, (-1, 1)) + jnp.arange(ids.shape[1]), ids.shape)
    positions = rules.shard_rows_like(positions, ids)
    x = model.embed(ids, positions, dtype)
    layers = model.stack.layers() if layers is None else layers
    updated_cache = []
    for layer, layer_cache in zip(layers, cache, strict=True):
        x, layer = rules.delay_gather(x, layer)
        x, layer_cache = layer.decode(
            x, layer_cache, start, table=table, rotations=rotations, impl=impl
        )
        updated_cache.append(layer_cache)
    return model.norm(x), updated_cache


def decode(model, layers, cache, ids, start, **options):
    """Returns the logits [B, T, V] of new tokens, and the caches; arguments as in `advance`."""
    x, cache = advance(model, layers, cache, ids, start, **options)
    return model.logits(x), cache


# ---- a prompt ---------------------------------------------------------------------------------


def prefill(model, layers, cache, ids, *, dtype, table=None):
    """Writes a prompt to empty caches, in pieces of PREFILL tokens.

    In pieces, because attention scores take memory by the length of a piece times that of the
    cache.

    Args:
      ids: int [B, P].
      model, layers, cache, dtype, table: as in `advance`.

    Returns:
      (the logits [B, V] of the last token, the caches).
    """
    length = ids.shape[1]
    # The short piece goes first: all later pieces then have PREFILL tokens, and prompts of all
    # lengths share the compiled program of those.
    first_end = (length - 1) % PREFILL + 1
    start = 0
    for end in range(first_end, length + 1, PREFILL):
        piece = ids[:, start:end]
        logits, cache = prefill_piece(
            model, layers, cache, piece, jnp.int32(start), table, dtype=dtype
        )
        start = end
    return logits, cache


@functools.partial(jax.jit, static_argnames=("dtype",), donate_argnames="cache")
def prefill_piece(model, layers, cache, ids, start, table, *, dtype):
    """Writes a piece int [B, T] of a prompt; returns the logits [B, V] of its end, and caches."""
    x, cache = advance(model, layers, cache, ids, start, dtype=dtype, table=table)
    return model.logits(x[:, -1:])[:, -1], cache


# ---- the loop over tokens ---------------------------------------------------------------------


@functools.partial(
    jax.jit, static_argnames=("dtype", "max_tokens", "num_ids", "greedy"), donate_argnames="cache"
)
def sample_tokens(
    model,
    layers,
    cache,
    logits,
    start,
    key,
    temperature,
    table=None,
    *,
    dtype,
    max_tokens,
    num_ids,
    greedy,
):
    """Samples tokens, each from the logits of the one before.

    Args:
      logits: [B, V], of the last token of the prompt.
      start: int scalar, the position of the first new token.
      key: of `jax.random`.
      temperature: float scalar above 0; not read with `greedy`.
      max_tokens: how many tokens to sample.
      num_ids: ids of the tokenizer; logits beyond them are padding and are never sampled.
      greedy: whether to take the likeliest token.
      model, layers, cache, table, dtype: as in `advance`.

    Returns:
      (int32 [B, max_tokens], the caches).
    """
    pages_per_sequence = 1 if table is None else table.shape[1]
    slots = max(map(caches.cache_slots, cache)) * pages_per_sequence
    # Rotations of all positions, computed once instead of in each round of the loop.
    rotations = caches.rotations(model.spec.layers, slots)
    like = jax.eval_shape(lambda: cache)
    logits = rules.spread_rows(logits)

    def sample_one(carry, key):
        logits, cache, position = carry
        cache = caches.restored(cache, like)
        logits = logits[:, :num_ids]
        if greedy:
            ids = jnp.argmax(logits, axis=-1)
        else:
            ids = jax.random.categorical(key, logits / temperature)
        logits, cache = decode(
            model,
            layers,
            cache,
            ids[:, None],
            position,
            dtype=dtype,
            table=table,
            rotations=rotations,
        )
        carry = (logits[:, -1], caches.carried(cache, table), position + 1)
        return carry, ids.astype(jnp.int32)

    keys = jax.random.split(key, max_tokens)
    carry = (logits, caches.carried(cache, table), start)
    (_, cache, _), ids = jax.lax.scan(sample_one, carry, keys)
    return rules.replicate(ids.T), caches.restored(cache, like)
