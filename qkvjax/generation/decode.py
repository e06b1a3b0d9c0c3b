"""Sampling through the decode cache.

Letters: B sequences, T new tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.attention import cache as caches
from qkvjax.attention.spec import itemsize
from qkvjax.errors import UserError
from qkvjax.models.lm import LanguageModel


@dataclasses.dataclass(frozen=True)
class Generation:
    """Samples and what they took.

    Attributes:
      ids: int32 [B, max_tokens], the new tokens.
      seconds: of decoding them, without compilation and prompt.
      cache_bytes: bytes of the cache's arrays.
      cache_length: tokens it has room for, in each sequence.
    """

    ids: np.ndarray
    seconds: float
    cache_bytes: int
    cache_length: int

    @property
    def tokens_per_second(self) -> float:
        return self.ids.size / max(self.seconds, 1e-9)


def empty_caches(model: LanguageModel, batch: int, length: int, dtype, layout=None) -> list:
    """One cache a layer."""
    return [caches.empty(layer, batch, length, dtype, layout) for layer in model.spec.layers]


def decode(model, layers, cache, ids, start, *, dtype, impl="auto"):
    """Runs new tokens through the model and into its caches.

    Args:
      model: for embedding, final norm and head.
      layers: `model.stack.layers()`.
      cache: a list of caches, one a layer.
      ids: int [B, T] new tokens at positions start, ..., start + T - 1.
      start: int scalar.

    Returns:
      Logits [B, T, V] and the caches.
    """
    positions = jnp.broadcast_to(start + jnp.arange(ids.shape[1]), ids.shape)
    x = model.embed(ids, positions, dtype)
    updated = []
    for layer, held in zip(layers, cache, strict=True):
        x, held = layer.decode(x, held, start, impl=impl)
        updated.append(held)
    return model.logits(model.norm(x)), updated


@functools.partial(jax.jit, static_argnames=("dtype",), donate_argnames="cache")
def prefill(model, layers, cache, ids, *, dtype):
    """The prompt int [B, T] into empty caches: last logits [B, V] and caches."""
    logits, cache = decode(model, layers, cache, ids, 0, dtype=dtype)
    return logits[:, -1], cache


@functools.partial(
    jax.jit, static_argnames=("dtype", "max_tokens", "num_ids", "greedy"), donate_argnames="cache"
)
def sample_tokens(
    model, layers, cache, logits, start, key, temperature, *, dtype, max_tokens, num_ids, greedy
):
    """max_tokens tokens int32 [B, max_tokens], each fed back through the cache."""

    def one(carry, key):
        logits, cache, position = carry
        logits = logits[:, :num_ids]  # rows that pad the vocabulary are no tokens
        if greedy:
            ids = jnp.argmax(logits, axis=-1)
        else:
            ids = jax.random.categorical(key, logits / temperature)
        logits, cache = decode(model, layers, cache, ids[:, None], position, dtype=dtype)
        return (logits[:, -1], cache, position + 1), ids.astype(jnp.int32)

    keys = jax.random.split(key, max_tokens)
    (_, cache, _), ids = jax.lax.scan(one, (logits, cache, start), keys)
    return ids.T, cache


def generate(
    model: LanguageModel,
    prompt: np.ndarray,
    *,
    num_ids: int,
    max_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 1,
    layout: str | None = None,
    cache_length: int | None = None,
    dtype="float32",
) -> Generation:
    """Samples `batch` continuations of one prompt.

    Args:
      model: whole on one device.
      prompt: int [P], P >= 1, usually the separator and the text's tokens.
      num_ids: ids of the tokenizer; logits beyond them are padding.
      max_tokens: how many tokens to sample.
      temperature: 0 takes the likeliest token.
      layout: "kv" or "shared"; None means the smallest for each layer.
      cache_length: room in tokens; None means as much as needed.
      dtype: of activations and cache.

    Raises:
      UserError: a cache too short, a layout that this sharing lacks, a learned table too short.
    """
    if max_tokens < 1 or not 0 <= temperature < math.inf:
        raise UserError("max_tokens must be at least 1 and temperature at least 0 and finite")
    if max_tokens >= 2**31 or (cache_length or 0) >= 2**31:
        raise UserError("max_tokens and cache_length are below 2^31: give fewer")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed={seed} must be at least 0 and below 2^31")
    needed = len(prompt) + max_tokens
    length = needed if cache_length is None else cache_length
    if length < needed:
        bytes_needed = batch * needed * model.spec.cache_bytes_per_token(dtype, layout)
        raise UserError(
            f"a cache of {length} tokens is too short for a prompt of {len(prompt)} and"
            f" {max_tokens} new tokens: they need {needed} ({bytes_needed:,} bytes); raise"
            " --cache_length or shorten the prompt"
        )
    model.check_length(needed)
    itemsize(dtype)
    dtype = jnp.dtype(dtype)
    layers = model.stack.layers()
    try:
        cache = empty_caches(model, batch, length, dtype, layout)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = batch * length * model.spec.cache_bytes_per_token(dtype, layout)
        raise UserError(
            f"the cache of {length:,} tokens takes {wanted:,} bytes, more than is free here: lower"
            " --max_tokens or --cache_length"
        ) from None
    size = caches.num_bytes(cache)
    ids = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (batch, len(prompt)))
    logits, cache = prefill(model, layers, cache, ids, dtype=dtype)
    arguments = (
        model, layers, cache, logits, jnp.int32(len(prompt)), jax.random.key(seed),
        jnp.float32(temperature or 1),
    )  # fmt: skip
    options = {
        "dtype": dtype, "max_tokens": max_tokens, "num_ids": num_ids, "greedy": temperature == 0,
    }  # fmt: skip
    compiled = sample_tokens.lower(*arguments, **options).compile()
    jax.block_until_ready(logits)
    began = time.perf_counter()
    ids, _ = compiled(*arguments)
    ids = np.asarray(ids)
    return Generation(ids, time.perf_counter() - began, size, length)


def continuation(tokenizer, ids: np.ndarray) -> str:
    """The text of sampled tokens, up to the end of the document."""
    ends = np.flatnonzero(ids == tokenizer.separator)
    return tokenizer.decode(ids[: ends[0]] if ends.size else ids)


def prompt_ids(tokenizer, text: str) -> np.ndarray:
    """The separator, which starts every document, and the tokens of `text`."""
    try:
        ids = tokenizer.encode(text.encode())
    except UnicodeEncodeError:  # bytes of another encoding, from a terminal
        raise UserError(f"the prompt {text!r} is no UTF-8: write it in UTF-8") from None
    return np.concatenate([[tokenizer.separator], ids]).astype(np.int32)
