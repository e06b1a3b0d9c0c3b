"""Sampling through the decode cache.

Letters: B sequences, T new tokens, V vocabulary.
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


def empty_caches(
    model: LanguageModel, batch: int, length: int, dtype, layout=None, sequences=None
) -> list:
    """Makes one cache a layer; arguments as in `attention.cache.empty`."""
    return [
        caches.empty(layer, batch, length, dtype, layout, sequences) for layer in model.spec.layers
    ]


def advance(model, layers, cache, ids, start, *, dtype, table=None, turns=None, impl=None):
    """Runs new tokens through the model and into its caches.

    Args:
      model: for embedding and final norm.
      layers: `model.stack.layers()`; None means that the model's own arrays are read, of a model
        that `generation.serving.serve` made.
      cache: a list of caches, one a layer.
      ids: int [B, T] new tokens at positions start, ..., start + T - 1.
      start: int scalar, or [B] where sequences have come to different lengths.
      table: the block table of a cache in pages; None means a contiguous one.
      turns: of `attention.cache.turns`, or None.

    Returns:
      What the head reads, [B, T, D], and the caches.
    """
    ids = rules.spread_rows(ids)
    positions = jnp.broadcast_to(jnp.reshape(start, (-1, 1)) + jnp.arange(ids.shape[1]), ids.shape)
    positions = rules.shard_rows_like(positions, ids)
    x = model.embed(ids, positions, dtype)
    updated = []
    layers = model.stack.layers() if layers is None else layers
    for layer, held in zip(layers, cache, strict=True):
        x, layer = rules.delay_gather(x, layer)
        x, held = layer.decode(x, held, start, table=table, turns=turns, impl=impl)
        updated.append(held)
    return model.norm(x), updated


def decode(model, layers, cache, ids, start, **options):
    """Logits [B, T, V] of new tokens, and the caches with them; arguments as in `advance`."""
    x, cache = advance(model, layers, cache, ids, start, **options)
    return model.logits(x), cache


@functools.partial(jax.jit, static_argnames=("dtype",), donate_argnames="cache")
def prefill_piece(model, layers, cache, ids, start, table, *, dtype):
    """New tokens int [B, T] of a prompt into the caches: last logits [B, V] and caches."""
    x, cache = advance(model, layers, cache, ids, start, dtype=dtype, table=table)
    return model.logits(x[:, -1:])[:, -1], cache


def prefill(model, layers, cache, ids, *, dtype, table=None):
    """A prompt int [B, P] into empty caches: last logits [B, V] and caches.

    It goes in pieces of PREFILL tokens: scores take memory by the length of a piece times that
    of the cache.
    """
    length, start = ids.shape[1], 0
    # The short piece goes first, so that prompts of any length share the program of whole ones.
    for end in range((length - 1) % PREFILL + 1, length + 1, PREFILL):
        piece = ids[:, start:end]
        logits, cache = prefill_piece(
            model, layers, cache, piece, jnp.int32(start), table, dtype=dtype
        )
        start = end
    return logits, cache


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
    """max_tokens tokens int32 [B, max_tokens], each fed back through the cache."""
    slots = max(map(caches.cache_slots, cache)) * (1 if table is None else table.shape[1])
    turns = caches.turns(model.spec.layers, slots)
    like = jax.eval_shape(lambda: cache)
    logits = rules.spread_rows(logits)
    options = {"dtype": dtype, "table": table, "turns": turns}

    def one(carry, key):
        logits, cache, position = carry
        cache = caches.restored(cache, like)
        logits = logits[:, :num_ids]  # rows that pad the vocabulary are no tokens
        if greedy:
            ids = jnp.argmax(logits, axis=-1)
        else:
            ids = jax.random.categorical(key, logits / temperature)
        logits, cache = decode(model, layers, cache, ids[:, None], position, **options)
        return (logits[:, -1], caches.carried(cache, table), position + 1), ids.astype(jnp.int32)

    keys = jax.random.split(key, max_tokens)
    (_, cache, _), ids = jax.lax.scan(one, (logits, caches.carried(cache, table), start), keys)
    return rules.replicate(ids.T), caches.restored(cache, like)


def make_caches(model, batch, length, dtype, layout=None, page_size=None):
    """(empty caches, block table or None) for `length` tokens of each sequence: contiguous ones, in
    which a windowed layer keeps its window, or whole pages of all tokens."""
    if page_size is None:
        return empty_caches(model, batch, length, dtype, layout), None
    parts = rules.row_ways(batch)  # the pool and its sequences are sharded alike
    mine, pages = batch // parts, -(-length // page_size)
    one = caches.block_table([length] * mine, page_size, mine * pages)
    table = rules.spread_rows(jnp.asarray(np.tile(one, (parts, 1))))
    return empty_caches(model, batch * pages, page_size, dtype, layout, batch), table


def check_heads(spec: ModelSpec) -> None:
    """Raises UserError where the mesh in force cannot share out a layer's query heads."""
    ways = rules.ways("heads") if rules.has_mesh() else 1
    for count in sorted({layer.num_heads for layer in spec.layers}):
        if count % ways:
            raise UserError(
                f"the {count} query heads do not divide over {ways} devices (mesh.tensor): use a"
                " mesh with a smaller tensor axis"
            )
