"""Whether a kernel gives on this device what the reference gives.

What lowers a kernel changes with every version of jax, and its mistakes would be silent. So "auto"
tries a kernel before it takes it: with the masks, the sharing and the groups of heads of the very
call, on a short sequence, once in a process.

Not tried: caches in int8, and keys made from states.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.kernels import reference

TOLERANCE = 0.02  # relative; the error of a correct kernel is 0.004 in bfloat16
# A sequence of up to LONGEST tokens is tried at its length. A longer one is tried at LONGEST plus
# its length modulo STEP, the largest tile of any kernel, so that its last tile is filled as far.
LONGEST = 1024
STEP = 512
SLOTS = 192  # of a cache
# What a kernel raises that cannot be traced, lowered or run. A mistake of ours would be another.
FAILURES = (RuntimeError, ValueError, TypeError)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call of attention: what decides which kernel may compute it and how that is tried.

    Attributes:
      dtype: of the queries.
      width, value_width: of a head of keys and of values.
      group: query heads for each key-value head.
      length: tokens of a sequence, at most what `trial_length` returns; of a cache, new tokens.
      causal, window: of the mask.
      packed: whether there are segments.
      keys_are_queries, values_are_keys: which roles are one tensor.
      second: width of the second part of the scores, 0 without one.
      decodes: whether a cache is read.
      page: slots of a page, if the cache is in pages.
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
    decodes: bool = False
    page: int | None = None
    whole: bool = True

    def operands(self) -> dict[str, object]:
        """Returns the arguments of a kernel's `refusal`: shapes and options, by name."""
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
            "q_pe": second if self.second else None,
        }


def trial_length(length: int, window: int | None) -> tuple[int, int | None]:
    """Returns at which length a sequence is tried, and with which window."""
    if length <= LONGEST:
        return length, window
    shorter = LONGEST + length % STEP
    return shorter, None if window is None else min(window, 2 * shorter // 3)


# ---- trials -----------------------------------------------------------------------------------


@functools.cache
def failure(kernel, problem: Problem) -> str | None:
    """Returns what is wrong with a kernel on this device; None where nothing is.

    Args:
      kernel: attention over sequences, or of new tokens onto a cache, as `kernels.dispatch` calls
        it.
    """
    # In a thread of its own: the caller may be inside a trace, or a mesh may be in force.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(_failure, kernel, problem).result()


@functools.cache
def refuses(kernel, problem: Problem) -> str | None:
    """Returns why a kernel cannot even be traced, for a device that is not here; None if it can."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(_refuses, kernel, problem).result()


def _refuses(kernel, problem: Problem) -> str | None:
    candidate, _, shapes = _functions(kernel, problem)
    try:
        jax.eval_shape(candidate, shapes)
    except FAILURES as error:
        return _reason(error)
    return None


def _failure(kernel, problem: Problem) -> str | None:
    candidate, truth, shapes = _functions(kernel, problem)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = {
        name: jax.random.normal(key, shape.shape, shape.dtype)
        for key, (name, shape) in zip(keys, shapes.items())
    }
    if problem.keys_are_queries:
        # A query has its largest product with itself. With numbers of size 1 it would see little
        # else, and the gradients would be near 0 and consist of rounding errors.
        arrays["q"] = arrays["q"] / 2
    try:
        results = jax.block_until_ready(jax.jit(candidate)(arrays))
    except FAILURES as error:
        return _reason(error)
    with jax.default_matmul_precision("highest"):
        wide = {name: array.astype(jnp.float32) for name, array in arrays.items()}
        expected = jax.jit(truth)(wide)
    for name, right in expected.items():
        difference = results[name].astype(jnp.float32) - right
        error = float(jnp.linalg.norm(difference) / jnp.linalg.norm(right))
        if not error < TOLERANCE:  # so written that nan fails
            return f"it gives other results here than the reference (off by {error:.0%})"
    return None


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return f"it does not run here ({text.splitlines()[0][:200]})"


# ---- what is compared -------------------------------------------------------------------------


def _functions(kernel, problem: Problem):
    """Returns (the kernel, the reference, the shapes of their arguments by name).

    Both are functions of a dict of arrays. They return the output and, of whole sequences, the
    gradients of the arrays, by name.
    """
    shapes = _shapes(problem)
    q_positions, slots = _positions(problem)
    segments = _segments(problem, slots)
    mask = reference.visible(
        jnp.asarray(q_positions),
        jnp.asarray(slots),
        causal=problem.causal,
        window=problem.window,
        q_segments=segments,
        k_segments=segments,
    )
    options = {"window": problem.window}
    if problem.decodes:
        options["positions"] = jnp.asarray(np.repeat(q_positions, 2, axis=0))
    else:
        options |= {"causal": problem.causal, "segment_ids": segments}

    def candidate(arrays):
        arrays = {"k": arrays["q"]} | arrays
        if problem.page is None:
            return kernel(**arrays, **options)
        return kernel(**_paged(arrays, problem.page), **options)

    def truth(arrays):
        return reference.attention(**({"k": arrays["q"]} | arrays), mask=mask)

    def results(function, arrays):
        if problem.decodes:
            return {"out": function(arrays)}
        out, back = jax.vjp(function, arrays)
        return {"out": out} | back(jnp.cos(out))[0]

    return functools.partial(results, candidate), functools.partial(results, truth), shapes


def _num_slots(problem: Problem) -> int:
    """Returns S, the number of keys that are tried."""
    if not problem.decodes:
        return problem.length
    if problem.page is None:
        return max(SLOTS, problem.length)
    return max(3, -(-problem.length // problem.page)) * problem.page


def _shapes(problem: Problem) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the arrays that the kernel takes, by name."""
    q = problem.operands()["q"]
    batch, length, heads, width = q.shape
    kv_heads = heads // problem.group
    slots = _num_slots(problem)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=q.dtype)
    shapes = {"q": q}
    if not problem.keys_are_queries:
        shapes["k"] = shape((batch, slots, kv_heads, width))
    if not problem.values_are_keys:
        shapes["v"] = shape((batch, slots, kv_heads, problem.value_width))
    if problem.second:
        shapes["q_pe"] = shape((batch, length, heads, problem.second))
        shapes["k_pe"] = shape((batch, slots, kv_heads, problem.second))
    return shapes


def _positions(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions of the queries [1, T], the last ones, and of the keys [1, S]."""
    slots = np.arange(_num_slots(problem))[None]
    return slots[:, slots.shape[1] - problem.length :], slots


def _segments(problem: Problem, slots: np.ndarray) -> jax.Array | None:
    """Returns the segments int32 [2, T] of two documents, or None."""
    if not problem.packed or problem.decodes:
        return None
    length = slots.shape[1]
    last = length // 3  # position of the first document
    if problem.window is not None:
        # The second document is longer than the window: otherwise a kernel could forget the window.
        last = min(last, max(0, (length - problem.window) // 2))
    return jnp.asarray(np.repeat(slots > last, 2, axis=0).astype(np.int32))


def _paged(arrays: dict, page: int) -> dict:
    """Returns the arrays with keys and values as pages [P, E, K, H], and with their block table.

    The pages of the sequences alternate, so that a kernel that ignores the table fails.
    """
    batch, slots = arrays["k"].shape[:2]
    count = slots // page

    def cut(x):
        pages = x.reshape(batch, count, page, *x.shape[2:]).swapaxes(0, 1)
        return pages.reshape(batch * count, page, *x.shape[2:])

    paged = {name: cut(x) if name in ("k", "v") else x for name, x in arrays.items()}
    table = np.arange(batch * count).reshape(count, batch).T.astype(np.int32)
    return paged | {"table": jnp.asarray(table)}
