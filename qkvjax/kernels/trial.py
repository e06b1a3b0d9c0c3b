"""Whether a kernel gives on this device what the reference gives.

What lowers a kernel changes with every version of jax, and its mistakes would be silent. So "auto"
tries a kernel before it is preferred: the kernel, the masks, the sharing and the groups of heads of
the call that it is wanted for, on a short sequence, once in a process.

Not tried: caches in int8, and keys made of states.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.kernels import reference

TOLERANCE = 0.02  # relative: what is right has 0.004 in bfloat16
# A sequence is tried at its length up to LONGEST; a longer one at LONGEST and what is left over of
# STEP, the largest tile of any kernel, so that its last tile is filled as far.
LONGEST, STEP = 1024, 512
SLOTS = 192  # of a cache


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call of attention, as far as it decides which kernel may compute it and how that is tried.

    Attributes:
      dtype: of the queries.
      width, value_width: of a head of keys and of values.
      group: query heads of a key-value head.
      length: tokens of a sequence, at most what `tried` has; new tokens onto a cache.
      causal, window, packed: the masks; `packed` says that there are segments.
      keys_are_queries, values_are_keys: what is one tensor.
      second: width of a second part of the scores, 0 without one.
      capped: whether the scores are bounded by tanh.
      decodes: whether a cache is read, in `page` slots a page if it lies in pages.
      whole: whether each device has whole sequences.
    """

    dtype: str
    width: int
    value_width: int
    group: int
    length: int
    causal: bool = True
    window: int | None = None
    packed: bool = False
    keys_are_queries: bool = False
    values_are_keys: bool = True
    second: int = 0
    capped: bool = False
    decodes: bool = False
    page: int | None = None
    whole: bool = True

    def operands(self) -> dict[str, object]:
        """Returns what a kernel's `refusal` asks for: shapes and options, by name."""
        heads = 2 * self.group
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(self.dtype))
        q = shape((2, self.length, heads, self.width))
        if self.decodes:
            values = None if self.values_are_keys else shape((2, SLOTS, 2, self.value_width))
            return {"q": q, "v": values, "page": self.page}
        values = None if self.values_are_keys else shape((2, self.length, 2, self.value_width))
        segments = jax.ShapeDtypeStruct((2, self.length), jnp.int32)
        second = shape((2, self.length, heads, self.second))
        return {
            "q": q,
            "v": values,
            "causal": self.causal,
            "window": self.window,
            "segment_ids": segments if self.packed else None,
            "softcap": 1.0 if self.capped else None,
            "q_pe": second if self.second else None,
        }


def tried(length: int, window: int | None) -> tuple[int, int | None]:
    """Returns at which length a sequence is tried, and with which window."""
    if length <= LONGEST:
        return length, window
    shorter = LONGEST + length % STEP
    return shorter, None if window is None else min(window, 2 * shorter // 3)


@functools.cache
def failure(kernel, problem: Problem) -> str | None:
    """Returns what is wrong here with `kernel` for a problem; None where nothing is.

    Args:
      kernel: attention over sequences, or of new tokens onto a cache, as `kernels.dispatch` calls
        it.
    """
    # In a thread of its own: the caller may be traced, or see a mesh.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(_failure, kernel, problem).result()


@functools.cache
def refuses(kernel, problem: Problem) -> str | None:
    """Returns why a kernel cannot even be traced, for a device that is not here; None if it can."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(_refuses, kernel, problem).result()


def _refuses(kernel, problem: Problem) -> str | None:
    ours, _, arrays = _cases(kernel, problem)
    try:
        jax.eval_shape(ours, arrays)
    except (RuntimeError, ValueError, TypeError) as error:
        return _cannot(error)
    return None


def _failure(kernel, problem: Problem) -> str | None:
    ours, truth, shapes = _cases(kernel, problem)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = {
        name: jax.random.normal(key, shape.shape, shape.dtype)
        for key, (name, shape) in zip(keys, shapes.items())
    }
    if problem.keys_are_queries:
        # A query that meets itself as a key would see little else, and gradients near 0 would
        # consist of rounding: of smaller numbers it sees all.
        arrays["q"] = arrays["q"] / 2
    try:
        found = jax.block_until_ready(jax.jit(ours)(arrays))
    except (RuntimeError, ValueError, TypeError) as error:
        return _cannot(error)
    with jax.default_matmul_precision("highest"):
        wide = {name: array.astype(jnp.float32) for name, array in arrays.items()}
        expected = jax.jit(truth)(wide)
    for name, right in expected.items():
        difference = found[name].astype(jnp.float32) - right
        error = float(jnp.linalg.norm(difference) / jnp.linalg.norm(right))
        if not error < TOLERANCE:
            return f"it gives other results here than the reference (off by {error:.0%})"
    return None


def _cannot(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return f"it does not run here ({text.splitlines()[0][:200]})"


def _cases(kernel, problem: Problem):
    """(the kernel, the reference, shapes by name): functions of arrays that give the output and,
    of whole sequences, the gradients of the arrays, by name."""
    given = problem.operands()
    q, page = given["q"], problem.page
    batch, length, heads, width = q.shape
    slots = length
    if problem.decodes:
        slots = max(SLOTS, length) if page is None else max(3, -(-length // page)) * page
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=q.dtype)
    shapes = {"q": q}
    if not problem.keys_are_queries:
        shapes["k"] = shape((batch, slots, heads // problem.group, width))
    if not problem.values_are_keys:
        shapes["v"] = shape((batch, slots, heads // problem.group, problem.value_width))
    if problem.second:
        shapes["q_pe"] = shape((batch, length, heads, problem.second))
        shapes["k_pe"] = shape((batch, slots, heads // problem.group, problem.second))
    places = np.arange(slots)[None]
    asking = places[:, slots - length :]
    segments = None
    if problem.packed and not problem.decodes:
        last = slots // 3  # of the first document
        if problem.window is not None:  # the second one is longer than the window, so it matters
            last = min(last, max(0, (slots - problem.window) // 2))
        segments = jnp.asarray(np.repeat(places > last, batch, axis=0).astype(np.int32))
    mask = reference.visible(
        asking,
        places,
        causal=problem.causal,
        window=problem.window,
        q_segments=segments,
        k_segments=segments,
    )
    options = {"window": problem.window}
    if problem.decodes:
        options["positions"] = jnp.asarray(np.repeat(asking, batch, axis=0))
    else:
        options |= {"causal": problem.causal, "segment_ids": segments}

    def results(function, arrays):
        if problem.decodes:
            return {"out": function(arrays)}
        out, back = jax.vjp(function, arrays)
        return {"out": out} | back(jnp.cos(out))[0]

    def ours(arrays):
        arrays = {"k": arrays["q"]} | arrays
        if page is None:
            return kernel(**arrays, **options)
        return kernel(**_paged(arrays, page), **options)

    def truth(arrays):
        return reference.attention(**({"k": arrays["q"]} | arrays), mask=mask)

    return functools.partial(results, ours), functools.partial(results, truth), shapes


def _paged(arrays: dict, page: int) -> dict:
    """Keys and values as pages [P, E, K, H], those of the sequences in turn, with their table."""
    batch, slots = arrays["k"].shape[:2]
    count = slots // page

    def cut(x):
        pages = x.reshape(batch, count, page, *x.shape[2:]).swapaxes(0, 1)
        return pages.reshape(batch * count, page, *x.shape[2:])

    paged = {name: cut(x) if name in ("k", "v") else x for name, x in arrays.items()}
    table = np.arange(batch * count).reshape(count, batch).T.astype(np.int32)
    return paged | {"table": jnp.asarray(table)}
