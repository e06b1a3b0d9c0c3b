"""Decoding speed of every sharing, side by side in one process.

  python benchmarks/decode_speed.py --size=124m --dtype=bfloat16 --batch=32 --length=2048 \\
      --output=results/decode.jsonl

Greedy tokens onto a cache that is full but for them; RoPE with raw values, and for K=V also
with the output rotated back, where one tile serves as key and value. Random weights.
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

TOKENS = 16


def decode_call(size, sharing, rotary_values, dtype, batch, length):
    """(call, cache bytes): `call()` decodes TOKENS tokens."""
    config = config_of(size, sharing, dtype)
    config.model.update(position="rope", rotary_values=rotary_values)
    spec = model_spec(configs.resolve(config).model, size.vocab, length)
    model = jax.tree.map(lambda a: a.astype(dtype), build(spec))
    layers = model.stack.layers()
    held = {"cache": empty_caches(model, batch, length, jnp.dtype(dtype))}
    num_bytes = caches.num_bytes(held["cache"])
    logits = jnp.zeros((batch, spec.vocab_size))
    rest = (jnp.int32(length - TOKENS), jax.random.key(0), jnp.float32(1))
    options = {
        "dtype": jnp.dtype(dtype),
        "max_tokens": TOKENS,
        "num_ids": size.vocab,
        "greedy": True,
    }
    compiled = sample_tokens.lower(model, layers, held["cache"], logits, *rest, **options).compile()

    def call():
        ids, held["cache"] = compiled(model, layers, held["cache"], logits, *rest)
        return ids

    return call, num_bytes


def main() -> None:
    given = arguments(
        __doc__,
        size="shakespeare",
        dtype="float32",
        batch=8,
        length=512,
        sharings=list(SHARINGS),
    )
    host.keep_freed_memory()
    variants = [(sharing, "raw") for sharing in given.sharings]
    variants += [(s, "unrotated_output") for s in given.sharings if s in ("q-k=v", "q=k=v")]
    calls = {
        v: decode_call(SIZES[given.size], *v, given.dtype, given.batch, given.length)
        for v in variants
    }
    seconds = interleaved({v: repeat(call, 0.3) for v, (call, _) in calls.items()})
    for sharing, rotary_values in variants:
        variant = sharing, rotary_values
        token = float(np.median(seconds[variant])) / TOKENS
        record(
            given.output,
            benchmark="decode_speed",
            size=given.size,
            batch=given.batch,
            length=given.length,
            dtype=given.dtype,
            sharing=sharing,
            rotary_values=rotary_values,
            token_seconds=token,
            tokens_per_second=given.batch / token,
            ratio=ratio(seconds[variant], seconds[variants[0]]),
            cache_bytes=calls[variant][1],
        )


if __name__ == "__main__":
    main()
