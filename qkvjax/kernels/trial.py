"""Whether a kernel gives on this device what the reference gives.

What lowers a kernel changes with every version of jax, and its mistakes would be silent. So "auto"
tries a kernel on a small problem, once in a process for each head width, dtype, K = V or not and
segments or not, before it is preferred.
"""

from __future__ import annotations

import concurrent.futures
import functools

import jax
import jax.numpy as jnp

from qkvjax.kernels import reference

LENGTH, HEADS = 192, 4
TOLERANCE = 0.02  # relative: what is right has 0.004 in bfloat16


@functools.cache
def failure(kernel, decodes: bool, packed: bool, width: int, dtype: str, tied: bool) -> str | None:
    """What is wrong here with `kernel`, attention over sequences (`packed`: of several documents)
    or a token's onto a cache, as `kernels.dispatch` has them; None where nothing is."""
    # In a thread of its own: the caller may be traced, or see a mesh.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(_failure, kernel, decodes, packed, width, dtype, tied).result()


def _failure(kernel, decodes, packed, width, dtype, tied) -> str | None:
    heads = HEADS, HEADS // 2, HEADS // 2
    q, k, v, slope = (
        jax.random.normal(key, (2, LENGTH, count, width), dtype)
        for key, count in zip(jax.random.split(jax.random.key(0), 4), (*heads, HEADS))
    )
    places = jnp.arange(LENGTH)[None]
    q = q[:, -1:] if decodes else q
    segments = jnp.repeat(places > LENGTH // 3, 2, axis=0).astype(jnp.int32) if packed else None
    mask = reference.visible(
        places[:, -1:] if decodes else places, places, causal=True, q_segments=segments,
        k_segments=segments,
    )  # fmt: skip
    options = {"positions": jnp.full((2, 1), LENGTH - 1)} if decodes else {"segment_ids": segments}

    def results(function, *arrays):
        if decodes:
            return [function(*arrays)]
        out, back = jax.vjp(function, *arrays)
        return [out, *back(slope.astype(out.dtype))]

    arrays = (q, k) if tied else (q, k, v)
    truth = functools.partial(results, functools.partial(reference.attention, mask=mask))
    ours = functools.partial(results, functools.partial(kernel, **options))
    try:
        found = jax.jit(ours)(*arrays)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"it does not run here ({str(error).splitlines()[0][:200]})"
    for a, b in zip(found, jax.jit(truth)(*(x.astype(jnp.float32) for x in arrays)), strict=True):
        error = float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        if not error < TOLERANCE:
            return f"it gives other results here than the reference (off by {error:.0%})"
    return None
