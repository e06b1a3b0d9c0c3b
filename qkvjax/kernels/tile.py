"""The mathematics of one tile, in plain jnp: every kernel imports it, whatever its backend.

A tile has r rows (queries) and c columns (keys). Softmax is in base 2, its scores multiplied by
log2(e), since exp2 is what the hardware computes.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

LOG2E = math.log2(math.e)
HIDDEN = -1e30  # finite: the difference of two hidden scores is a number


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when a kernel of whole sequences is compiled; `length` is without padding,
    `forward` and `backward` are its backend's tile sizes."""

    causal: bool
    window: int | None
    scale: float
    length: int
    forward: object
    backward: object
    interpret: object

    @property
    def limits(self) -> dict:
        return {"causal": self.causal, "window": self.window, "length": self.length}

    def edges(self, places: int, segments, turned: bool = False) -> tuple[bool, bool]:
        """Whether a tile of queries (`turned`: of keys) meets tiles in need of a mask before those
        that it sees whole, and behind them."""
        if segments is not None or self.window is not None or places > self.length:
            return True, True
        return self.causal and turned, self.causal and not turned


def padded(tree, length: int, step: int):
    """Arrays [B, T, ...] of a tree with zeros behind them, up to a multiple of `step` places."""
    fill = -length % step

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2)) if fill else x

    return jax.tree.map(pad, tree)


def specs(*pairs) -> list:
    """Block specs of trees of arrays, each with the function that makes them."""
    return [jax.tree.map(make, tree) for tree, make in pairs]


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product of two matrices over `axes` of the first and the second, in float32."""
    contract = ((axes[0],), (axes[1],)), ((), ())
    # Products of narrow numbers are exact in float32; Mosaic compiles no other wish for them.
    precision = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, contract, precision=precision, preferred_element_type=jnp.float32
    )


def products(rows, columns) -> jax.Array:
    """Unscaled scores [r, c] of queries [r, P] and keys [c, P] in parts, which are summed."""
    parts = [dot(a, b, (1, 1)) for a, b in zip(rows, columns)]
    return sum(parts[1:], parts[0])


def visible(rows, columns, *, causal, window, length, row_segments=None, column_segments=None):
    """bool of the broadcast shape: which of the keys at `columns` the queries at `rows` see.

    Args:
      rows, columns: int places that broadcast, such as [r, 1] and [1, c]; either may come first.
      length: keys there are; places from there on are padding.
      row_segments, column_segments: int, of the same shapes as the places.
    """
    distance = rows - columns
    seen = columns < length
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= jnp.abs(distance) < window
    if row_segments is not None:
        seen &= row_segments == column_segments
    return seen


def spans(
    queries: int, keys: int, places: int, *, causal, window, length, segments=None, turned=False
) -> jax.Array:
    """Which tiles of keys each tile of queries needs: int32 [B, tiles of queries, 4].

    (begin, whole, rest, end): tiles begin, ..., end - 1 hold all that is seen, and of tiles
    whole, ..., rest - 1 every pair is seen, so that they need no mask. `walk` goes along them.

    Args:
      queries, keys: sizes of the tiles, which divide `places`.
      segments: int [B, places]; without any, B is 1.
      turned: which tiles of queries each tile of keys needs instead.
    """

    def edges(size):
        first = jnp.arange(0, places, size)
        of = (None, None)
        if segments is not None:
            parts = segments.reshape(segments.shape[0], -1, size)
            of = jnp.min(parts, axis=2), jnp.max(parts, axis=2)
        return first, first + size - 1, *of

    first, last, low, high = (None if x is None else x[..., :, None] for x in edges(queries))
    begin, end, least, most = (None if x is None else x[..., None, :] for x in edges(keys))
    some = (begin < length) & (first < length)
    every = jnp.broadcast_to(end < length, some.shape)
    if causal:
        some, every = some & (begin <= last), every & (end <= first)
    if window is not None:
        some &= (first - end < window) & (begin - last < window)
        every &= (last - begin < window) & (end - first < window)
    some, every = some[None], every[None]
    if segments is not None:
        some = some & (low <= most) & (least <= high)
        every = every & (low == high) & (least == most) & (low == least)
    every &= some
    if turned:
        some, every = jnp.swapaxes(some, 1, 2), jnp.swapaxes(every, 1, 2)
    behind = jnp.arange(1, some.shape[2] + 1)
    reach = lambda x: jnp.max(jnp.where(x, behind, 0), axis=2)  # noqa: E731
    end, rest = reach(some), reach(every)
    begin = jnp.min(jnp.where(some, behind - 1, end[..., None]), axis=2)
    whole = reach(~every & (behind < rest[..., None]))  # of several runs, the last
    # Without a whole tile, all are on the side where a causal mask cuts tiles (`Options.edges`).
    none, edge = rest == 0, end if turned else begin
    whole, rest = jnp.where(none, edge, whole), jnp.where(none, edge, rest)
    return jnp.stack([begin, whole, rest, end], axis=2).astype(jnp.int32)


def walk(span, step, state, edges: tuple[bool, bool] = (True, True)):
    """step(tile, state, masked) along one row of `spans`; `edges` says whether there may be tiles
    in need of a mask before the whole ones and behind them."""
    parts = (0, edges[0], True), (1, True, False), (2, edges[1], True)
    for i, there, masked in parts:
        if there:
            body = functools.partial(lambda masked, j, state: step(j, state, masked), masked)
            state = jax.lax.fori_loop(span[i], span[i + 1], body, state)
    return state


def nothing(rows: int, widths: list[int]):
    """The state of `absorb` before the first tile; values come in pieces of these widths."""
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)  # noqa: E731
    top = jnp.full((rows,), HIDDEN, jnp.float32)
    return top, zeros(rows), [zeros(rows, width) for width in widths]


def weigh(top, products, seen, scale: float):
    """(largest score, by what sums so far shrink, both [r]; weights [r, c]) after a tile.

    One step of the online softmax (Milakov & Gimelshein 2018). The scale is a positive number and
    costs no operation per element: exp2(scale s - top) is one multiply-add and one exp2.

    Args:
      top: largest score so far [r], in base 2.
      products: unscaled scores [r, c].
      seen: bool [r, c]; None means all.
    """
    assert scale > 0, scale
    products = products if seen is None else jnp.where(seen, products, HIDDEN)
    new_top = jnp.maximum(top, jnp.max(products, axis=1) * (scale * LOG2E))
    weights = jnp.exp2(products * (scale * LOG2E) - down(new_top, products))
    return new_top, jnp.exp2(top - new_top), _hide(weights, seen)


def absorb(state, products, seen, values, scale: float):
    """The state after a tile (Dao et al. 2022, algorithm 1).

    Args:
      state: (largest score [r], sum of weights [r], weighted values [r, H] in pieces), float32.
      values: [c, H] in the same pieces.
    """
    top, total, mixed = state
    top, shrink, weights = weigh(top, products, seen, scale)
    mixed = [
        old * down(shrink, old) + dot(weights.astype(piece.dtype), piece)
        for old, piece in zip(mixed, values)
    ]
    return top, total * shrink + jnp.sum(weights, axis=1), mixed


def down(x: jax.Array, like: jax.Array) -> jax.Array:
    """[r] -> [r, c], the shape of `like`."""
    return jax.lax.broadcast_in_dim(x, like.shape, (0,))


def merge(top, total, mixed, axis: int):
    """Softmax's result from states of disjoint keys that lie along `axis` (flash decoding).

    top, total: [..., s, ..., r]; mixed: [..., s, ..., r, H]; the result has no s.
    """
    share = jnp.exp2(top - jnp.max(top, axis=axis, keepdims=True))
    total = jnp.sum(total * share, axis=axis)
    return jnp.sum(mixed * share[..., None], axis=axis) / total[..., None]


def weights_and_slopes(products, seen, normaliser, value_products, delta, scale: float):
    """Softmax's weights P of a tile, and the loss's slopes of its unscaled scores.

    scale P * (dP - rowsum(O * dO)) with dP = dO V^T (Dao et al. 2022, algorithm 4). All arguments
    broadcast to the tile, which may lie either way round; `seen` may be None, and `delta` is
    scale rowsum(O * dO).
    """
    weights = _hide(jnp.exp2(products * (scale * LOG2E) - normaliser), seen)
    return weights, weights * (value_products * scale - delta)


def delta(out: jax.Array, slope: jax.Array, scale: float) -> jax.Array:
    """scale rowsum(O * dO) [B, N, T] of [B, T, N, H]."""
    wide = lambda x: x.astype(jnp.float32)  # noqa: E731
    return scale * jnp.einsum("btnh,btnh->bnt", wide(out), wide(slope))


def _hide(weights, seen):
    return weights if seen is None else jnp.where(seen, weights, 0.0)
