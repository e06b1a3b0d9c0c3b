"""Samples continuations of a prompt.

Letters: B sequences, P tokens of a prompt.
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
    """Samples, and what they took.

    Attributes:
      ids: int32 [B, max_tokens], the new tokens.
      seconds: of decoding them, without compilation and prompt.
      cache_bytes: bytes of the cache's arrays.
      cache_length: tokens of each sequence that the cache has room for.
    """

    ids: np.ndarray
    seconds: float
    cache_bytes: int
    cache_length: int

    @property
    def tokens_per_second(self) -> float:
        return self.ids.size / max(self.seconds, 1e-9)


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
      model: on one device, or on a mesh (`training.restore.load_model`). On a mesh, caches are
        sharded over sequences and heads (`attention.cache`); a batch that the mesh's data axes do
        not divide is whole on every device. A model of `generation.serving.serve` is used as it
        is; of another model the layers are copied.
      prompt: int [P], P >= 1, usually the separator and the text's tokens.
      num_ids: ids of the tokenizer; logits beyond them are padding.
      max_tokens: how many tokens to sample.
      temperature: 0 takes the likeliest token.
      seed: of the random choices, from 0 to 2^31 - 1.
      batch: how many continuations.
      layout: "kv" or "shared"; None means the smallest for each layer.
      cache_length: room in tokens for each sequence; None means as much as needed. A windowed
        layer keeps at most its window, except in pages.
      cache_dtype: of the cache, a float or int8; None means `dtype`.
      page_size: slots of a page of a cache in pages; None means a contiguous one.
      dtype: of activations.

    Raises:
      UserError: a number out of its range, a cache too short or too large for this machine, a
        layout that this sharing lacks, a learned table too short, a mesh that does not divide the
        heads.
    """
    _check_numbers(max_tokens, temperature, seed, cache_length)
    needed = len(prompt) + max_tokens
    model.check_length(needed)
    itemsize(dtype)
    cache_dtype = cache_dtype or dtype
    dtype = jnp.dtype(dtype)
    with placed.on_mesh_of(model):
        check_heads(model.spec)
        layers = None if isinstance(model.stack, UnrolledStack) else model.stack.layers()
        cache, table, length = allocate(
            model, batch, needed, cache_length, cache_dtype, layout, page_size
        )
        cache_bytes = caches.num_bytes(cache)
        ids = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (batch, len(prompt)))
        logits, cache = prefill(model, layers, cache, ids, dtype=dtype, table=table)

        arguments = (
            model,
            layers,
            cache,
            logits,
            jnp.int32(len(prompt)),
            jax.random.key(seed),
            jnp.float32(temperature or 1),  # not read where 0 means greedy
            table,
        )
        compiled = sample_tokens.lower(
            *arguments,
            dtype=dtype,
            max_tokens=max_tokens,
            num_ids=num_ids,
            greedy=temperature == 0,
        ).compile()
        # JAX runs ahead of the devices: the prompt must be done before the clock starts, and the
        # tokens must be on the host before it stops.
        jax.block_until_ready(logits)
        start = time.perf_counter()
        new_ids, _ = compiled(*arguments)
        new_ids = np.asarray(new_ids)
        seconds = time.perf_counter() - start
    return Generation(new_ids, seconds, cache_bytes, length)


def _check_numbers(max_tokens, temperature, seed, cache_length) -> None:
    """Raises UserError where one of these arguments of `generate` is out of range."""
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, not {max_tokens}")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature must be at least 0 and finite, not {temperature}")
    if max_tokens >= 2**31 or (cache_length or 0) >= 2**31:
        raise UserError(
            f"max_tokens={max_tokens} and cache_length={cache_length} must be below 2^31: give"
            " fewer"
        )
    if not 0 <= seed < 2**31:
        raise UserError(f"seed={seed} must be at least 0 and below 2^31")


# ---- memory of the cache ----------------------------------------------------------------------


def allocate(model, batch, needed, length, dtype, layout, page_size):
    """Makes empty caches for `batch` sequences of `needed` tokens each.

    Args:
      length: room in tokens for each sequence; None means `needed`.
      dtype, layout, page_size: as in `decode.make_caches`.

    Returns:
      (caches, block table or None, room in tokens for each sequence).

    Raises:
      UserError: too little room, more memory than is free, or a page size or a dtype that cannot
        be.
    """
    if page_size is not None and not 1 <= page_size < 2**31:
        raise UserError(f"page_size={page_size} must be at least 1 and below 2^31")
    itemsize(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise UserError(
            f"a cache of {jnp.dtype(dtype)} needs JAX_ENABLE_X64=1: set it, or use float32"
        )
    length = needed if length is None else length
    if page_size is not None:
        length = -(-length // page_size) * page_size  # whole pages
    if length < needed:
        num_bytes = batch * _bytes_per_sequence(model.spec, needed, dtype, layout, page_size)
        raise UserError(
            f"a cache of {length} tokens is too short for the prompt and the new tokens: they need"
            f" {needed} ({num_bytes:,} bytes); raise --cache_length or shorten the prompt"
        )
    make = functools.partial(make_caches, model, batch, length, dtype, layout, page_size)
    cache, table = _make_if_it_fits(make, length)
    return cache, table, length


def _bytes_per_sequence(spec, length: int, dtype, layout, page_size) -> int:
    """Returns the bytes of the caches of all layers for one sequence of `length` tokens."""
    if page_size is None:
        return sum(layer.cache_bytes(length, dtype, layout) for layer in spec.layers)
    return sum(length * layer.cache_bytes_per_token(dtype, layout) for layer in spec.layers)


def _make_if_it_fits(make, length: int):
    """Returns make(), caches and a block table; raises UserError where memory is too small."""
    abstract_cache, _ = jax.eval_shape(make)
    num_bytes = caches.num_bytes(abstract_cache)
    too_large = UserError(
        f"the cache of {length:,} tokens takes {num_bytes:,} bytes, more than is free here: lower"
        " --max_tokens or --cache_length"
    )
    free = host.free_memory()
    if free is not None and num_bytes > free:
        raise too_large
    try:
        return make()
    except MemoryError:
        raise too_large from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise too_large from None


# ---- text -------------------------------------------------------------------------------------


def prompt_ids(tokenizer, text: str) -> np.ndarray:
    """Returns the separator, which starts every document, and the tokens of `text`: int32 [P]."""
    try:
        ids = tokenizer.encode(text.encode())
    except UnicodeEncodeError:  # the terminal passed bytes in another encoding
        raise UserError(f"the prompt {text!r} is not valid UTF-8: write it in UTF-8") from None
    return np.concatenate([[tokenizer.separator], ids]).astype(np.int32)


def continuation(tokenizer, ids: np.ndarray) -> str:
    """Returns the text of sampled tokens, up to the first separator, which ends the document."""
    ends = np.flatnonzero(ids == tokenizer.separator)
    return tokenizer.decode(ids[: ends[0]] if ends.size else ids)
