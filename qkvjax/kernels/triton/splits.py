"""How the Triton decode kernel cuts a cache into splits and tiles, and a head into pieces.

    cache of a head     | split 0             | split 1             | ...    `per_split` slots each
    tiles               | tile | tile | tile  | tile | tile | tile  | ...    `tile` slots each

Letters: B sequences, S slots, K key-value heads, H head width; P pages of E slots.
"""

from __future__ import annotations

import dataclasses

from qkvjax.kernels.triton.blocks import Blocks

# Two programs fit each of the 132 processors of a Hopper GPU where a tile of all that is cached has
# TILE_BYTES and three stages; where there are more programs than that, larger tiles are faster.
# Timed on an H200 (benchmarks/results/h200/splits.jsonl).
PROGRAMS = 264
FEWEST_SLOTS = 256  # of a split
TILE_BYTES = 32 * 1024


def block_of(width: int, itemsize: int, tied: bool, programs: int, makes_keys: bool) -> Blocks:
    """Returns tile sizes.

    Args:
      tied: whether one tensor is cached.
      programs: how many there are without splits.
    """
    if makes_keys:  # its pieces and their wide copies take registers, so tiles are small
        return Blocks(64, 64 if width <= 128 else 32, 4, 3)
    size = TILE_BYTES * (1 if programs <= PROGRAMS else 2) // (width * itemsize)
    return Blocks(64, min(256, size if tied else size // 2), 4, 3)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when the kernel is compiled.

    Attributes:
      window, scale: as in `kernels.dispatch.decode_attention`.
      slots: S, of a sequence.
      splits: how many there are.
      per_split: slots of a split, a multiple of `tile`.
      tile: slots of a tile.
      page: slots of a page; S in a contiguous cache.
      pieces: widths of the pieces of a head.
    """

    window: int | None
    scale: float
    slots: int
    splits: int
    per_split: int
    tile: int
    page: int
    pieces: tuple[int, ...]


def options_of(
    k, table, window, scale, width, key, block: Blocks, splits, programs: int
) -> Options:
    """Returns how a cache [B, K, S, H] or [P, K, E, H] is cut."""
    page = k.shape[2]
    # A tile lies within a page, or within a contiguous cache.
    size = min(block.keys, 1 << (page.bit_length() - 1))
    slots = page * (1 if table is None else table.shape[1])
    if splits is None:
        splits = max(1, min(PROGRAMS // programs, slots // FEWEST_SLOTS))
    per_split = -(-slots // splits // size) * size if slots // splits >= size else size
    return Options(
        window=window,
        scale=width**-0.5 if scale is None else float(scale),
        slots=slots,
        splits=-(-slots // per_split),
        per_split=per_split,
        tile=size,
        page=page,
        pieces=(width,) if key is None else pieces_of(key.width, width),
    )


def pieces_of(rotated: int, width: int) -> tuple[int, ...]:
    """Returns the widths of the pieces of a head: the two rotated halves, then powers of two.

    A tile's sides are powers of two, so the rest is cut: of 128 numbers of which 32 are rotated,
    16 + 16 are rotated and 64 + 32 are the rest.
    """
    rest = width - rotated
    powers = (1 << i for i in reversed(range(rest.bit_length())) if rest >> i & 1)
    return (rotated // 2, rotated // 2, *powers)
