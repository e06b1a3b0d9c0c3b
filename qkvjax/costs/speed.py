"""Times of attention alone: the op by itself, and one layer that decodes onto a full cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.attention import cache as caches
from qkvjax.attention.layer import Attention
from qkvjax.attention.spec import SHARINGS, AttentionSpec, sharing_name
from qkvjax.costs.measure import interleaved, ratio, repeat
from qkvjax.errors import UserError
from qkvjax.kernels import dispatch
from qkvjax.models.spec import layer_specs
from qkvjax.parallel import host

TOKENS = 8  # decoded by one program, so that the time to start it does not count


class Variant(NamedTuple):
    """What is timed: a sharing, its rotary values ("none" for the op alone), an implementation."""

    sharing: str
    rotary_values: str
    impl: str


def decode(config, batches: list[int], contexts: list[int], log: Callable[[str], None]) -> list:
    """Times one attention layer for one token onto a full cache, each batch with each context.

    Every sharing, rotary value and implementation that is available is timed beside three
    projections, in the same rounds.

    Returns:
      A record for each layer: seconds per token; ratio of these to QKV's in the first
      implementation, with its 95 % interval; cache_bytes; and gigabytes_per_second: the cache's
      bytes over the seconds.

    Raises:
      UserError: the config is not of a language model, or a cache does not fit into memory.
    """
    records = []
    for batch, context in _shapes(config, batches, contexts):
        calls = {}
        cache_bytes = {}
        for variant, spec in _variants(config, context, log):
            call, num_bytes = _decode_call(config, spec, batch, context, variant.impl)
            calls[variant] = repeat(call)
            cache_bytes[variant] = num_bytes
        seconds = interleaved(calls)
        first = next(iter(calls))
        for variant in calls:
            seconds_per_token = float(np.median(seconds[variant])) / TOKENS
            record = {
                "seconds": seconds_per_token,
                "ratio": ratio(seconds[variant], seconds[first]),
                "cache_bytes": cache_bytes[variant],
                "gigabytes_per_second": cache_bytes[variant] / seconds_per_token / 1e9,
            }
            records.append(_facts("decode", config, batch, context, variant) | record)
        log(f"timed {len(calls)} layers, batch {batch}, {context} tokens")
    return records


def kernels(config, batches: list[int], contexts: list[int], log: Callable[[str], None]) -> list:
    """Times the attention op over whole causal sequences, each batch with each context.

    It is timed with two tensors for keys and values and with one, forward and with its gradient, in
    every implementation that is available.

    Returns:
      A record for each: pass; seconds; ratio of these to two tensors in the first implementation,
      with its 95 % interval; and teraflops, over the seconds. The operations are
      4 B N T^2 H / 2 forward, and three and a half times as many with the backward pass.

    Raises:
      UserError: the config is not of a language model, or a cache does not fit into memory.
    """
    records = []
    for batch, context in _shapes(config, batches, contexts):
        spec = _layer_spec(config, "q-k-v", "raw", context)
        calls = {}
        for impl in _available():
            for sharing in ("q-k-v", "q-k=v"):
                variant = Variant(sharing, "none", impl)
                for name, call in _op_calls(config, spec, batch, context, variant):
                    calls[name, variant] = repeat(call)
        seconds = interleaved(calls)
        forward_flops = 2 * batch * spec.num_heads * context**2 * spec.head_dim
        baseline = Variant("q-k-v", "none", _available()[0])
        for name, variant in calls:
            times = seconds[name, variant]
            flops = forward_flops * (1 if name == "forward" else 3.5)
            record = {
                "pass": name,
                "seconds": float(np.median(times)),
                "ratio": ratio(times, seconds[name, baseline]),
                "teraflops": flops / float(np.median(times)) / 1e12,
            }
            records.append(_facts("kernels", config, batch, context, variant) | record)
        log(f"timed {len(calls)} passes, batch {batch}, {context} tokens")
    return records


def table(records: list[dict]) -> list[str]:
    """Returns the records as text, a line for each."""
    header = f"{'batch':>5} {'tokens':>7}  {'variant':<28} {'impl':<8} {'ms':>9}  of the first's"
    return [header, *(_line(record) for record in records)]


def _line(record: dict) -> str:
    variant = sharing_name(record["sharing"])
    if record["rotary_values"] not in ("raw", "none"):
        variant += f" {record['rotary_values']}"
    if "pass" in record:
        variant += f", {record['pass']}"
    if "teraflops" in record:
        rate = f"{1000 * record['teraflops']:,.0f} GFLOP/s"
    else:
        rate = f"{record['gigabytes_per_second']:.1f} GB/s"
    middle, low, high = record["ratio"]
    return (
        f"{record['batch']:>5} {record['context']:>7}  {variant:<28} {record['impl']:<8}"
        f" {1000 * record['seconds']:>9.3f}  {middle:.2f} ({low:.2f} to {high:.2f})  {rate}"
    )


def _available() -> list[str]:
    """Returns the implementations that people use and this machine has, the default one first."""
    names = [
        name
        for name in dispatch.IMPLEMENTATIONS
        if name != "reference" and not dispatch.missing(name)
    ]
    return sorted(names, key=lambda name: name != dispatch.candidates()[0])


def _shapes(config, batches: list[int], contexts: list[int]) -> list[tuple[int, int]]:
    """Returns every (batch, context).

    Raises:
      UserError: the config is not of a language model, a context is too short to decode TOKENS
        tokens, or the largest cache does not fit into memory.
    """
    if config.model.kind != "lm":
        raise UserError(
            f"model.kind={config.model.kind!r}: bench decode and bench kernels need a language"
            " model (model.kind=lm)"
        )
    spec = _layer_spec(config, "q-k-v", "raw", max(contexts))
    cache_bytes = spec.cache_bytes_per_token(config.train.compute_dtype)
    needed = max(batches) * max(contexts) * cache_bytes
    if min(contexts) < TOKENS:
        raise UserError(
            f"--contexts: the shortest is {min(contexts)}; give {TOKENS} tokens or more"
        )
    if needed > (host.free_memory() or needed):
        raise UserError(
            f"--contexts, --batches: the largest cache takes {needed:,} bytes, more than is free"
            " here: give smaller ones"
        )
    return [(batch, context) for batch in batches for context in contexts]


@functools.cache
def _environment() -> dict:
    """Returns versions and commit; cached because it starts git."""
    return host.environment()


def _facts(what: str, config, batch: int, context: int, variant: Variant) -> dict:
    """Returns what every record has."""
    return {
        "what": what,
        "sharing": variant.sharing,
        "rotary_values": variant.rotary_values,
        "impl": variant.impl,
        "batch": batch,
        "context": context,
        "dtype": config.train.compute_dtype,
        "device": host.device_name(),
        "environment": _environment(),
        "date": host.now(),
    }


def _layer_spec(config, sharing: str, rotary_values: str, length: int) -> AttentionSpec:
    """Returns the first layer of the config's model, with this sharing."""
    model = dataclasses.replace(config.model, sharing=sharing, rotary_values=rotary_values)
    return layer_specs(model, length)[0]


def _variants(config, context: int, log) -> Iterator[tuple[Variant, AttentionSpec]]:
    """Yields (variant, layer) for all that the numbers of heads allow."""
    reported = set()  # sharings whose error was logged
    for impl in _available():
        if impl in dispatch.NO_CACHE:
            continue
        for sharing in SHARINGS:
            rotary_values = ["raw"]
            if config.model.position == "rope" and sharing in ("q-k=v", "q=k=v"):
                rotary_values.append("unrotated_output")
            for values in rotary_values:
                try:
                    spec = _layer_spec(config, sharing, values, context)
                except UserError as error:
                    if sharing not in reported:
                        log(f"{sharing_name(sharing)} is left out: {error}")
                    reported.add(sharing)
                else:
                    yield Variant(sharing, values, impl), spec


def _decode_call(
    config, spec: AttentionSpec, batch: int, context: int, impl: str
) -> tuple[Callable[[], object], int]:
    """Returns (call that decodes TOKENS tokens through one layer, bytes of its cache)."""
    dtype = jnp.dtype(config.train.compute_dtype)
    layer = jax.jit(lambda key: Attention(spec, key=key))(jax.random.key(0))
    layer = jax.tree.map(lambda a: a.astype(dtype), layer)
    cache = caches.empty(spec, batch, context, dtype)
    num_bytes = caches.num_bytes(cache)
    x = jnp.ones((batch, 1, spec.d_model), dtype)

    def decode_tokens(layer, cache, x):
        rotations = caches.rotations([spec], context)
        like = jax.eval_shape(lambda: cache)

        def decode_token(carry, position):
            x, cache = carry
            cache = caches.restored(cache, like)
            x, cache = caches.attend(layer, x, cache, position, rotations=rotations, impl=impl)
            return (x, caches.carried(cache)), None

        positions = context - TOKENS + jnp.arange(TOKENS)
        (x, cache), _ = jax.lax.scan(decode_token, (x, caches.carried(cache)), positions)
        return x, caches.restored(cache, like)

    compiled = jax.jit(decode_tokens, donate_argnums=1).lower(layer, cache, x).compile()

    def call():
        nonlocal cache  # it is donated, so each call needs that of the one before
        out, cache = compiled(layer, cache, x)
        return out

    return call, num_bytes


def _op_calls(
    config, spec: AttentionSpec, batch: int, context: int, variant: Variant
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields ("forward" or "with backward", call) of the attention op."""
    dtype = jnp.dtype(config.train.compute_dtype)
    heads = [spec.num_heads, spec.num_kv_heads]
    if variant.sharing == "q-k-v":
        heads.append(spec.num_kv_heads)
    tensors = [
        jax.random.normal(jax.random.key(i), (batch, context, n, spec.head_dim), dtype)
        for i, n in enumerate(heads)
    ]
    forward = jax.jit(lambda *tensors: dispatch.attention(*tensors, impl=variant.impl))

    def loss(*tensors):
        return jnp.sum(forward(*tensors).astype(jnp.float32) ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=tuple(range(len(tensors)))))
    yield "forward", functools.partial(forward, *tensors)
    yield "with backward", functools.partial(gradient, *tensors)
