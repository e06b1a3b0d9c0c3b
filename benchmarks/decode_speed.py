"""Decoding speed of every sharing, side by side in one process.

  python benchmarks/decode_speed.py --size=124m --dtype=bfloat16 --batch=32 --length=2048 \\
      --output=results/decode.jsonl

Decodes TOKENS greedy tokens onto a cache that is full up to them, with random weights. Positions
are RoPE with raw values; for K=V also with the output rotated back, where one tile serves as key
and value.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ours import arguments, config_of, record
from sizes import SIZES

from qkvjax import config as configs
from qkvjax.attention import cache as caches
from qkvjax.attention.spec import SHARINGS
from qkvjax.costs.measure import interleaved, ratio, repeat
from qkvjax.generation.decode import empty_caches, sample_tokens
from qkvjax.models.build import build
from qkvjax.models.spec import model_spec
from qkvjax.parallel import host

TOKENS = 16  # that one call decodes


def decode_call(size, sharing, rotary_values, dtype, batch, length):
    """Returns (call, cache bytes): `call()` decodes TOKENS tokens.

    Args:
      size: of the model.
      sharing: such as "q-k=v".
      rotary_values: "raw" or "unrotated_output".
      dtype: of weights, cache and computation.
      batch: sequences.
      length: tokens of a sequence that the cache has room for.
    """
    config = config_of(size, sharing, dtype)
    config.model.update(position="rope", rotary_values=rotary_values)
    spec = model_spec(configs.resolve(config).model, size.vocab, length)
    model = jax.tree.map(lambda array: array.astype(dtype), build(spec))
    layers = model.stack.layers()
    cache = empty_caches(model, batch, length, jnp.dtype(dtype))
    num_bytes = caches.num_bytes(cache)
    logits = jnp.zeros((batch, spec.vocab_size))
    first_position = jnp.int32(length - TOKENS)
    rest = (first_position, jax.random.key(0), jnp.float32(1))  # the last is the temperature
    options = {
        "dtype": jnp.dtype(dtype),
        "max_tokens": TOKENS,
        "num_ids": size.vocab,
        "greedy": True,
    }
    compiled = sample_tokens.lower(model, layers, cache, logits, *rest, **options).compile()

    def call():
        nonlocal cache
        ids, cache = compiled(model, layers, cache, logits, *rest)
        return ids

    return call, num_bytes


def main() -> None:
    options = arguments(
        __doc__,
        size="shakespeare",
        dtype="float32",
        batch=8,
        length=512,
        sharings=list(SHARINGS),
    )
    host.keep_freed_memory()
    tied_kv = [sharing for sharing in options.sharings if sharing in ("q-k=v", "q=k=v")]
    variants = [(sharing, "raw") for sharing in options.sharings]
    variants += [(sharing, "unrotated_output") for sharing in tied_kv]
    timers = {}
    cache_bytes = {}
    for variant in variants:
        call, cache_bytes[variant] = decode_call(
            SIZES[options.size], *variant, options.dtype, options.batch, options.length
        )
        timers[variant] = repeat(call, 0.3)
    seconds = interleaved(timers)
    for variant in variants:
        sharing, rotary_values = variant
        token = float(np.median(seconds[variant])) / TOKENS
        record(
            options.output,
            benchmark="decode_speed",
            size=options.size,
            batch=options.batch,
            length=options.length,
            dtype=options.dtype,
            sharing=sharing,
            rotary_values=rotary_values,
            token_seconds=token,
            tokens_per_second=options.batch / token,
            ratio=ratio(seconds[variant], seconds[variants[0]]),
            cache_bytes=cache_bytes[variant],
        )


if __name__ == "__main__":
    main()
