"""Times of attention alone: the op by itself, and one layer that decodes onto a full cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

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

TOKENS = 8  # decoded by one program: what starts it should not count


def decode(config, batches: list[int], contexts: list[int], log: Callable[[str], None]) -> list:
    """A record a layer that decodes a token onto `context` ones: every sharing, rotary value and
    implementation that is here, beside three projections in the same rounds.

    A record has seconds a token, their ratio to QKV's in the first implementation with its 95 %
    interval, the cache's bytes, and gigabytes_per_second: those bytes over the seconds.

    Raises:
      UserError: no language model.
    """
    records = []
    for batch, context in _places(config, batches, contexts):
        found = {}
        for (sharing, values, impl), spec in _variants(config, context, log):
            found[sharing, values, impl] = _layer(config, spec, batch, context, impl)
        seconds = interleaved({name: repeat(call) for name, (call, _) in found.items()})
        first = next(iter(found))
        for name, (_, cache_bytes) in found.items():
            token = float(np.median(seconds[name])) / TOKENS
            records.append(
                _facts("decode", config, batch, context, name)
                | {
                    "seconds": token,
                    "ratio": ratio(seconds[name], seconds[first]),
                    "cache_bytes": cache_bytes,
                    "gigabytes_per_second": cache_bytes / token / 1e9,
                }
            )
        log(f"timed {len(found)} layers, batch {batch}, {context} tokens")
    return records


def kernels(config, batches: list[int], contexts: list[int], log: Callable[[str], None]) -> list:
    """A record a pass (forward; forward and backward) of the op over whole causal sequences, with
    two tensors and with one, for every implementation that is here.

    A record has seconds, their ratio to two tensors in the first implementation with its 95 %
    interval, and teraflops: 4 B N T^2 H / 2 operations forward, three and a half times as many
    with the backward pass, over the seconds.

    Raises:
      UserError: no language model.
    """
    records = []
    for batch, context in _places(config, batches, contexts):
        spec = _spec(config, "q-k-v", "raw", context)
        passes = {}
        for impl in _here():
            for tied in (False, True):
                for name, call in _passes(config, spec, batch, context, impl, tied):
                    passes[name, tied, impl] = repeat(call)
        seconds = interleaved(passes)
        first = {name: (name, False, _here()[0]) for name, *_ in passes}
        flops = 2 * batch * spec.num_heads * context**2 * spec.head_dim
        for name, tied, impl in passes:
            times = seconds[name, tied, impl]
            work = flops * (1 if name == "forward" else 3.5)
            variant = "q-k=v" if tied else "q-k-v", "none", impl
            records.append(
                _facts("kernels", config, batch, context, variant)
                | {
                    "pass": name,
                    "seconds": float(np.median(times)),
                    "ratio": ratio(times, seconds[first[name]]),
                    "teraflops": work / float(np.median(times)) / 1e12,
                }
            )
        log(f"timed {len(passes)} passes, batch {batch}, {context} tokens")
    return records


def table(records: list[dict]) -> list[str]:
    """The records as text, a line each."""
    lines = [f"{'batch':>5} {'tokens':>7}  {'variant':<28} {'impl':<8} {'ms':>9}  of the first's"]
    for r in records:
        values = "" if r["rotary_values"] in ("raw", "none") else f" {r['rotary_values']}"
        variant = f"{sharing_name(r['sharing'])}{values}"
        variant = f"{variant}, {r['pass']}" if "pass" in r else variant
        middle, low, high = r["ratio"]
        if "teraflops" in r:
            rate = f"{1000 * r['teraflops']:,.0f} GFLOP/s"
        else:
            rate = f"{r['gigabytes_per_second']:.1f} GB/s"
        lines.append(
            f"{r['batch']:>5} {r['context']:>7}  {variant:<28} {r['impl']:<8}"
            f" {1000 * r['seconds']:>9.3f}  {middle:.2f} ({low:.2f} to {high:.2f})  {rate}"
        )
    return lines


def _here() -> list[str]:
    """Implementations that people use and this machine has, the usual one first."""
    names = [n for n in dispatch.IMPLEMENTATIONS if n != "reference" and not dispatch.missing(n)]
    return sorted(names, key=lambda name: name != dispatch.candidates()[0])


def _places(config, batches, contexts) -> list[tuple[int, int]]:
    if config.model.kind != "lm":
        raise UserError(f"model.kind={config.model.kind!r}: speed is measured of kind lm")
    spec, dtype = _spec(config, "q-k-v", "raw", max(contexts)), config.train.compute_dtype
    needed = max(batches) * max(contexts) * spec.cache_bytes_per_token(dtype)
    if min(contexts) < TOKENS or needed > (host.free_memory() or needed):
        free = f"what is free here, of which the largest would take {needed:,} bytes"
        raise UserError(f"--contexts, --batches: from {TOKENS} tokens on, up to caches of {free}")
    return [(batch, context) for batch in batches for context in contexts]


@functools.cache
def _environment() -> dict:
    """Asked once: it starts git."""
    return host.environment()


def _facts(what: str, config, batch: int, context: int, variant) -> dict:
    sharing, values, impl = variant
    return {
        "what": what,
        "sharing": sharing,
        "rotary_values": values,
        "impl": impl,
        "batch": batch,
        "context": context,
        "dtype": config.train.compute_dtype,
        "device": host.device_name(),
        "environment": _environment(),
        "date": host.now(),
    }


def _spec(config, sharing: str, values: str, length: int) -> AttentionSpec:
    """The first layer of the config's model, with this sharing."""
    model = dataclasses.replace(config.model, sharing=sharing, rotary_values=values)
    return layer_specs(model, length)[0]


def _variants(config, context: int, log) -> Iterator[tuple[tuple[str, str, str], AttentionSpec]]:
    """((sharing, rotary values, implementation), layer) of all that these heads allow."""
    told = set()
    for impl in [name for name in _here() if name not in dispatch.NO_CACHE]:
        for sharing in SHARINGS:
            turned = config.model.position == "rope" and sharing in ("q-k=v", "q=k=v")
            for values in ("raw", "unrotated_output") if turned else ("raw",):
                try:
                    spec = _spec(config, sharing, values, context)
                except UserError as error:
                    if sharing not in told:
                        log(f"{sharing_name(sharing)} is left out: {error}")
                    told.add(sharing)
                    continue
                yield (sharing, values, impl), spec


def _layer(config, spec: AttentionSpec, batch: int, context: int, impl: str):
    """(call that decodes TOKENS tokens through one layer, bytes of its cache)."""
    dtype = jnp.dtype(config.train.compute_dtype)
    layer = jax.jit(lambda key: Attention(spec, key=key))(jax.random.key(0))
    layer = jax.tree.map(lambda a: a.astype(dtype), layer)
    cache = caches.empty(spec, batch, context, dtype)
    num_bytes = caches.num_bytes(cache)
    held = {"cache": cache}
    x = jnp.ones((batch, 1, spec.d_model), dtype)

    def tokens(layer, cache, x):
        turns, like = caches.turns([spec], context), jax.eval_shape(lambda: cache)

        def one(carry, place):
            x, cache = carry[0], caches.restored(carry[1], like)
            x, cache = caches.attend(layer, x, cache, place, turns=turns, impl=impl)
            return (x, caches.carried(cache)), None

        places = context - TOKENS + jnp.arange(TOKENS)
        x, cache = jax.lax.scan(one, (x, caches.carried(cache)), places)[0]
        return x, caches.restored(cache, like)

    compiled = jax.jit(tokens, donate_argnums=1).lower(layer, cache, x).compile()

    def call():
        out, held["cache"] = compiled(layer, held["cache"], x)
        return out

    return call, num_bytes


def _passes(config, spec: AttentionSpec, batch: int, context: int, impl: str, tied: bool):
    """("forward" or "with backward", call) of the op."""
    dtype = jnp.dtype(config.train.compute_dtype)
    heads = (spec.num_heads, spec.num_kv_heads) + (() if tied else (spec.num_kv_heads,))
    tensors = [
        jax.random.normal(jax.random.key(i), (batch, context, n, spec.head_dim), dtype)
        for i, n in enumerate(heads)
    ]
    forward = jax.jit(lambda *tensors: dispatch.attention(*tensors, impl=impl))
    loss = lambda *tensors: jnp.sum(forward(*tensors).astype(jnp.float32) ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss, argnums=tuple(range(len(tensors)))))
    yield "forward", lambda: forward(*tensors)
    yield "with backward", lambda: gradient(*tensors)
