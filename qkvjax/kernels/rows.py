"""New tokens of all query heads of a key-value head as the rows of one matrix, for decoding.

One matrix, because a tile of the cache is then loaded once for all of them. With T = 2 tokens and
G = 3 query heads for each key-value head:

    row        0     1     2     3     4     5     6 ...
    token      0     0     0     1     1     1     padding, up to R rows
    head       0     1     2     0     1     2     of the group

Letters: B sequences, T new tokens, N query heads, K key-value heads, G = N / K, H head width,
R >= G T rows.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def packed(
    x: Shaped[Array, "B T N H"], kv_heads: int, rows: int
) -> Shaped[Array, "B {kv_heads} {rows} H"]:
    """Returns the rows of each key-value head, [B, K, R, H], with zeros behind the tokens."""
    batch, length, heads, width = x.shape
    group = heads // kv_heads
    x = x.reshape(batch, length, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
    x = x.reshape(batch, kv_heads, length * group, width)
    return jnp.pad(x, [(0, 0), (0, 0), (0, rows - length * group), (0, 0)])


def unpacked(
    x: Shaped[Array, "B K R H"], length: int, heads: int
) -> Shaped[Array, "B {length} {heads} H"]:
    """Returns [B, T, N, H] from what `packed` made of it."""
    batch, kv_heads, _, width = x.shape
    group = heads // kv_heads
    x = x[:, :, : length * group].reshape(batch, kv_heads, length, group, width)
    return x.transpose(0, 2, 1, 3, 4).reshape(batch, length, heads, width)


def row_positions(positions: Int[Array, "B T"], group: int, rows: int) -> Int[Array, "B {rows}"]:
    """Returns the positions of the rows, int32 [B, R]; padding has that of the last token."""
    repeated = jnp.repeat(positions.astype(jnp.int32), group, axis=1)
    return jnp.pad(repeated, [(0, 0), (0, rows - repeated.shape[1])], mode="edge")


def ranges(positions: Int[Array, "B T"], window: int | None, size: int) -> Int[Array, "B 4"]:
    """Returns which tiles of `size` slots the new tokens see, int32 [B, 4], as `tile.ranges` does.

    All tokens of a sequence walk over the same tiles: from the first slot that any of them sees to
    the last. Slot s holds position s, and tokens see no later position.
    """
    first = jnp.min(positions, axis=1)
    last = jnp.max(positions, axis=1)

    def tiles_until(slots):
        return -(-slots // size)

    end = tiles_until(last + 1)
    full_end = (first + 1) // size  # the first token is the one that sees the fewest late slots
    begin = full_begin = jnp.zeros_like(end)
    if window is not None:
        # The window of position p is p - window + 1, ..., p: of all tokens the first one sees the
        # earliest slot, and a tile is full from where the last one sees it whole.
        begin = jnp.maximum(first - window + 1, 0) // size
        full_begin = tiles_until(jnp.maximum(last - window + 1, 0))
    full_begin = jnp.clip(full_begin, begin, end)
    full_end = jnp.clip(full_end, full_begin, end)
    return jnp.stack([begin, full_begin, full_end, end], axis=1).astype(jnp.int32)
