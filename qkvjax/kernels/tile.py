"""The mathematics of one tile, in plain jnp: every kernel imports it, whatever its backend.

A tile is a piece of the score matrix, r rows (queries) by c columns (keys). A kernel holds what
belongs to one tile of queries (or, for the gradients of keys, to one tile of keys) and walks over
the tiles that it meets. `ranges` says beforehand which tiles those are, and which of them need a
mask. For causal attention with a window of 192, in tiles of 64 by 64:

    tile of keys    0 1 2 3 4 5
    queries 0       m . . . . .      .  skipped: no pair is visible
    queries 1       F m . . . .      m  masked: some pairs are visible
    queries 2       F F m . . .      F  full: all pairs are visible, no mask is computed
    queries 3       m F F m . .
    queries 4       . m F F m .      (begin, full_begin, full_end, end) = (1, 2, 4, 5)

Softmax is in base 2, and its scores are multiplied by log2(e), because exp2 is what the hardware
computes. Letters: B sequences, T positions, N query heads, H head width.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

LOG2E = math.log2(math.e)
# The score of a hidden pair. It is finite because minus infinity minus itself is not a number,
# which a row would meet whose pairs so far are all hidden.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when a kernel of whole sequences is compiled.

    Attributes:
      causal, window: of the mask, as in `visible`.
      scale: of the scores.
      length: T without padding.
      forward, backward: tile sizes, of a class of the backend.
      interpret: whether to interpret the kernel, in the form that its backend wants.
    """

    causal: bool
    window: int | None
    scale: float
    length: int
    forward: object
    backward: object
    interpret: object

    @property
    def mask_rules(self) -> dict:
        """Returns the arguments of `visible` and `ranges` that do not depend on the tile."""
        return {"causal": self.causal, "window": self.window, "length": self.length}

    def masked_ends(self, num_positions: int, segments, by_keys: bool = False) -> tuple[bool, bool]:
        """Returns whether there may be masked tiles before the full ones, and behind them.

        A kernel compiles a loop only where the answer is True.

        Args:
          num_positions: T with padding.
          by_keys: as in `ranges`.
        """
        if segments is not None or self.window is not None or num_positions > self.length:
            return True, True
        # Only the diagonal is masked. It is the last tile of a row, and the first of a column.
        return self.causal and by_keys, self.causal and not by_keys


# ---- arrays of whole sequences ----------------------------------------------------------------


def padded(tree, length: int, step: int):
    """Returns arrays [B, T, ...] of a tree with zeros behind them, up to a multiple of `step`."""
    fill = -length % step

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2)) if fill else x

    return jax.tree.map(pad, tree)


def block_specs(*pairs) -> list:
    """Returns the block specs of trees of arrays, from pairs (tree, array -> its block spec)."""
    return [jax.tree.map(make, tree) for tree, make in pairs]


# ---- which tiles meet -------------------------------------------------------------------------


def visible(rows, columns, *, causal, window, length, row_segments=None, column_segments=None):
    """Returns which keys the queries see: bool of the shape to which rows and columns broadcast.

    Args:
      rows, columns: int positions of the queries and of the keys, such as [r, 1] and [1, c];
        [1, r] and [c, 1] give the transposed mask.
      causal: a query sees no later key.
      window: a query sees keys fewer than `window` positions away; None means all.
      length: the number of keys; positions from there on are padding.
      row_segments, column_segments: int, of the shapes of rows and columns.
    """
    distance = rows - columns
    mask = columns < length
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= jnp.abs(distance) < window
    if row_segments is not None:
        mask &= row_segments == column_segments
    return mask


def ranges(
    queries: int,
    keys: int,
    num_positions: int,
    *,
    causal,
    window,
    length,
    segments=None,
    by_keys=False,
) -> jax.Array:
    """Returns which tiles of keys each tile of queries needs: int32 [B, tiles of queries, 4].

    Each row is (begin, full_begin, full_end, end). The tiles begin, ..., end - 1 contain every
    visible pair. In the tiles full_begin, ..., full_end - 1 all pairs are visible, so that they
    need no mask. `walk` goes along them.

    Args:
      queries, keys: sizes of the tiles, which divide `num_positions`.
      num_positions: T with padding.
      causal, window, length: as in `visible`.
      segments: int [B, T with padding]; without segments B is 1.
      by_keys: return which tiles of queries each tile of keys needs instead.
    """

    def bounds(size):
        """(first position, last position, smallest segment, largest segment) of each tile."""
        first = jnp.arange(0, num_positions, size)
        extremes = (None, None)
        if segments is not None:
            tiled = segments.reshape(segments.shape[0], -1, size)
            extremes = jnp.min(tiled, axis=2), jnp.max(tiled, axis=2)
        return first, first + size - 1, *extremes

    # Tiles of queries lie along the second-to-last axis, tiles of keys along the last one.
    q_first, q_last, q_low, q_high = (
        None if x is None else x[..., :, None] for x in bounds(queries)
    )
    k_first, k_last, k_low, k_high = (None if x is None else x[..., None, :] for x in bounds(keys))
    some = (k_first < length) & (q_first < length)
    every = jnp.broadcast_to(k_last < length, some.shape)
    if causal:
        some, every = some & (k_first <= q_last), every & (k_last <= q_first)
    if window is not None:
        some &= (q_first - k_last < window) & (k_first - q_last < window)
        every &= (q_last - k_first < window) & (k_last - q_first < window)
    some, every = some[None], every[None]
    if segments is not None:
        # Segments may come in any order, so a tile is known by its extremes. If these overlap,
        # a pair may be visible; only if all four are equal is every pair visible.
        some = some & (q_low <= k_high) & (k_low <= q_high)
        every = every & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    every &= some
    if by_keys:
        some, every = jnp.swapaxes(some, 1, 2), jnp.swapaxes(every, 1, 2)

    next_tile = jnp.arange(1, some.shape[2] + 1)  # the number of each tile, plus one

    def behind_last(tiles):
        return jnp.max(jnp.where(tiles, next_tile, 0), axis=2)

    end = behind_last(some)
    full_end = behind_last(every)
    begin = jnp.min(jnp.where(some, next_tile - 1, end[..., None]), axis=2)
    # Full tiles may come in several runs (of segments). The last run is taken, and the tiles
    # before it are masked.
    full_begin = behind_last(~every & (next_tile < full_end[..., None]))
    # Without a full tile, all tiles belong to the end that may be masked (`masked_ends`).
    has_none = full_end == 0
    empty_run = end if by_keys else begin
    full_begin = jnp.where(has_none, empty_run, full_begin)
    full_end = jnp.where(has_none, empty_run, full_end)
    return jnp.stack([begin, full_begin, full_end, end], axis=2).astype(jnp.int32)


def walk(tile_range, step, state, masked_ends: tuple[bool, bool] = (True, True)):
    """Returns the state after step(tile, state, masked) on the tiles of one row of `ranges`.

    Args:
      tile_range: (begin, full_begin, full_end, end).
      masked_ends: of `Options.masked_ends`.
    """
    # Three loops and not one: the loop over full tiles, where most of the time goes, has no mask.
    loops = ((0, masked_ends[0], True), (1, True, False), (2, masked_ends[1], True))
    for i, is_needed, masked in loops:
        if is_needed:
            body = functools.partial(lambda masked, j, state: step(j, state, masked), masked)
            state = jax.lax.fori_loop(tile_range[i], tile_range[i + 1], body, state)
    return state


# ---- products ---------------------------------------------------------------------------------


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    """Returns the product of two matrices over `axes` of the first and the second, in float32."""
    contract = ((axes[0],), (axes[1],)), ((), ())
    # Products of 16-bit numbers are exact in float32, and Mosaic refuses to compile a higher
    # precision for them, which `jax.default_matmul_precision` might ask for.
    precision = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, contract, precision=precision, preferred_element_type=jnp.float32
    )


def scores(rows, columns) -> jax.Array:
    """Returns the unscaled scores [r, c], the sum over parts of queries [r, P] and keys [c, P]."""
    parts = [dot(a, b, (1, 1)) for a, b in zip(rows, columns)]
    return sum(parts[1:], parts[0])


def along_rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """Broadcasts one number a row, [r], to the shape [r, c] of `like`."""
    return jax.lax.broadcast_in_dim(x, like.shape, (0,))


# ---- softmax, forward -------------------------------------------------------------------------


def empty_state(rows: int, widths: list[int]):
    """Returns the state of `accumulate` before the first tile.

    Args:
      widths: of the pieces in which values come.
    """
    row_max = jnp.full((rows,), MASKED, jnp.float32)
    row_sum = jnp.zeros((rows,), jnp.float32)
    return row_max, row_sum, [jnp.zeros((rows, width), jnp.float32) for width in widths]


def online_softmax(row_max, scores, mask, scale: float):
    """Takes one step of the online softmax (Milakov & Gimelshein 2018).

    Args:
      row_max: the largest score so far [r], in base 2.
      scores: unscaled [r, c].
      mask: bool [r, c]; None means that all pairs are visible.
      scale: of the scores, positive.

    Returns:
      (the largest score [r], the factor [r] for all sums so far, the tile's weights [r, c]).
    """
    assert scale > 0, scale
    scores = scores if mask is None else jnp.where(mask, scores, MASKED)
    # The scale costs no operation per element: the maximum is scaled as one number a row, and
    # exp2(scale * s - max) is one multiply-add and one exp2.
    new_max = jnp.maximum(row_max, jnp.max(scores, axis=1) * (scale * LOG2E))
    weights = jnp.exp2(scores * (scale * LOG2E) - along_rows(new_max, scores))
    return new_max, jnp.exp2(row_max - new_max), _hide(weights, mask)


def accumulate(state, scores, mask, values, scale: float):
    """Returns the state after a tile (Dao et al. 2022, algorithm 1).

    Args:
      state: (largest score [r], sum of weights [r], weighted values [r, H] in pieces), float32.
      scores, mask, scale: as in `online_softmax`.
      values: [c, H] in the same pieces.
    """
    row_max, row_sum, acc = state
    row_max, rescale, weights = online_softmax(row_max, scores, mask, scale)
    acc = [
        old * along_rows(rescale, old) + dot(weights.astype(piece.dtype), piece)
        for old, piece in zip(acc, values)
    ]
    return row_max, row_sum * rescale + jnp.sum(weights, axis=1), acc


def merge(row_max, row_sum, acc, axis: int):
    """Returns softmax's result from states of disjoint keys (flash decoding).

    Args:
      row_max, row_sum: [..., s, ..., r], with the s states along `axis`.
      acc: [..., s, ..., r, H].

    Returns:
      [..., ..., r, H], without the axis of states.
    """
    share = jnp.exp2(row_max - jnp.max(row_max, axis=axis, keepdims=True))
    row_sum = jnp.sum(row_sum * share, axis=axis)
    return jnp.sum(acc * share[..., None], axis=axis) / row_sum[..., None]


# ---- softmax, backward ------------------------------------------------------------------------


def weights_and_d_scores(scores, mask, lse, d_weights, delta, scale: float):
    """Returns softmax's weights P of a tile, and the gradient dS of its unscaled scores.

    dS = scale P * (dP - rowsum(O * dO)) with dP = dO V^T (Dao et al. 2022, algorithm 4). All
    arguments broadcast to the tile, which may be [r, c] or [c, r].

    Args:
      scores: unscaled.
      mask: bool; None means that all pairs are visible.
      lse: log2 of each row's sum of exp2(scaled scores), from the forward pass.
      d_weights: dP.
      delta: scale rowsum(O * dO), of `delta`.
    """
    weights = _hide(jnp.exp2(scores * (scale * LOG2E) - lse), mask)
    return weights, weights * (d_weights * scale - delta)


def delta(out: jax.Array, d_out: jax.Array, scale: float) -> jax.Array:
    """Returns scale rowsum(O * dO), float32 [B, N, T], of [B, T, N, H]."""
    out, d_out = (x.astype(jnp.float32) for x in (out, d_out))
    return scale * jnp.einsum("btnh,btnh->bnt", out, d_out)


def _hide(weights, mask):
    """Sets the weights of hidden pairs to zero.

    Their scores are MASKED, but in a row that has no visible pair so far that is the maximum, and
    exp2(0) would be 1.
    """
    return weights if mask is None else jnp.where(mask, weights, 0.0)
