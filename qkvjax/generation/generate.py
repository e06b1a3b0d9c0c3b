"""Samples continuations of a prompt.

Letters: B sequences, T new tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.attention import cache as caches
from qkvjax.attention.spec import itemsize
from qkvjax.errors import UserError
from qkvjax.generation.decode import check_heads, make_caches, prefill, sample_tokens
from qkvjax.models.lm import LanguageModel
from qkvjax.models.unrolled import UnrolledStack
from qkvjax.parallel import host, placed


class Generation(NamedTuple):
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


def allocate(model, batch, needed, length, dtype, layout, page_size):
    """(caches, block table or None, slots of each sequence) for `needed` tokens of each."""
    if page_size is not None and not 1 <= page_size < 2**31:
        raise UserError(f"page_size={page_size} must be at least 1 and below 2^31")
    itemsize(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise UserError(f"a cache of {jnp.dtype(dtype)} wants JAX_ENABLE_X64=1: use float32")
    length = needed if length is None else length
    if page_size is not None:
        length = -(-length // page_size) * page_size
    if length < needed:
        per_sequence = sum(
            layer.cache_bytes(needed, dtype, layout)
            if page_size is None
            else needed * layer.cache_bytes_per_token(dtype, layout)
            for layer in model.spec.layers
        )
        raise UserError(
            f"a cache of {length} tokens is too short for the prompt and the new tokens: they need"
            f" {needed} ({batch * per_sequence:,} bytes); raise --cache_length or shorten the"
            " prompt"
        )
    make = functools.partial(make_caches, model, batch, length, dtype, layout, page_size)
    num_bytes, free = caches.num_bytes(jax.eval_shape(make)[0]), host.free_memory()
    too_much = UserError(
        f"the cache of {length:,} tokens takes {num_bytes:,} bytes, more than is free here: lower"
        " --max_tokens or --cache_length"
    )
    if free is not None and num_bytes > free:
        raise too_much
    try:
        cache, table = make()
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise too_much from None
    return cache, table, length


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
    cache_dtype=None,
    page_size: int | None = None,
    dtype="float32",
) -> Generation:
    """Samples `batch` continuations of one prompt.

    Args:
      model: on one device, or over the devices of a mesh (`training.restore.load_model`). Caches
        are sharded over sequences and heads (`attention.cache`); a batch that the mesh's data axes
        do not divide is whole on every device. `generation.serving.serve` makes a model of which
        no second copy is needed here.
      prompt: int [P], P >= 1, usually the separator and the text's tokens.
      num_ids: ids of the tokenizer; logits beyond them are padding.
      max_tokens: how many tokens to sample.
      temperature: 0 takes the likeliest token.
      layout: "kv" or "shared"; None means the smallest for each layer.
      cache_length: room in tokens, of each sequence; None means as much as needed. A windowed
        layer keeps at most its window, except in pages.
      cache_dtype: of the cache, a float or int8; None means `dtype`.
      page_size: slots of a page of a cache in pages; None means a contiguous one.
      dtype: of activations.

    Raises:
      UserError: a cache too short, a layout that this sharing lacks, a learned table too short, a
        mesh that cannot share out the heads.
    """
    if max_tokens < 1 or not 0 <= temperature < math.inf:
        raise UserError("max_tokens must be at least 1 and temperature at least 0 and finite")
    if max_tokens >= 2**31 or (cache_length or 0) >= 2**31:
        raise UserError("max_tokens and cache_length are below 2^31: give fewer")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed={seed} must be at least 0 and below 2^31")
    model.check_length(len(prompt) + max_tokens)
    itemsize(dtype)
    with placed.on_mesh_of(model):
        check_heads(model.spec)
        return _generate(
            model,
            prompt,
            num_ids,
            max_tokens,
            temperature,
            seed,
            batch,
            layout,
            cache_length,
            cache_dtype or dtype,
            page_size,
            jnp.dtype(dtype),
        )


def _generate(
    model,
    prompt,
    num_ids,
    max_tokens,
    temperature,
    seed,
    batch,
    layout,
    cache_length,
    cache_dtype,
    page_size,
    dtype,
) -> Generation:
    """`generate` with valid arguments, on the mesh in force."""
    layers = None if isinstance(model.stack, UnrolledStack) else model.stack.layers()
    needed = len(prompt) + max_tokens
    cache, table, length = allocate(
        model, batch, needed, cache_length, cache_dtype, layout, page_size
    )
    size = caches.num_bytes(cache)
    ids = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (batch, len(prompt)))
    logits, cache = prefill(model, layers, cache, ids, dtype=dtype, table=table)
    arguments = (
        model,
        layers,
        cache,
        logits,
        jnp.int32(len(prompt)),
        jax.random.key(seed),
        jnp.float32(temperature or 1),
        table,
    )
    options = {
        "dtype": dtype,
        "max_tokens": max_tokens,
        "num_ids": num_ids,
        "greedy": temperature == 0,
    }
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
