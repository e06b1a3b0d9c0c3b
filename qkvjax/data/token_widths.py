"""How many bytes one id takes in a file without a header, recognised from a sample.

The upper 16 bits of 32-bit ids are zero or nearly so, and their lower 16 bits are not. Both halves
of a pair of 16-bit ids look alike. The upper 32 bits of 64-bit ids are all zero.
"""

from __future__ import annotations

import numpy as np

from qkvjax.data.files import listed
from qkvjax.data.token_shards import Shard, with_dtype
from qkvjax.errors import UserError

# The sample: blocks spaced evenly over the file.
_NUM_BLOCKS = 64
_BLOCK_BYTES = 1 << 13
_MIN_PAIRS = 8  # pairs of 16 bits; fewer do not allow a decision
_MAX_UPPER = 15  # upper 16 bits of the ids of a vocabulary of up to a million
_MAX_IDS_OF_16_BITS = 2**16 + 1  # the separator may be an id that no file uses


def width_warning(shard: Shard) -> str:
    """Returns a warning where the content contradicts the type that the user named, or "".

    Args:
      shard: with a dtype. A file with a header (`offset` > 0) gets no warning.
    """
    if shard.offset:
        return ""
    width = _recognised_width(shard)
    if width is None or width == shard.dtype.itemsize:
        return ""
    return f"{shard.path} is read as {shard.dtype.name}, as named, and looks like uint{8 * width}"


def recognise_widths(shards: list[Shard], num_ids: int, name: str) -> list[Shard]:
    """Returns the shards, each without a dtype with the one that a sample of its content shows.

    A file whose sample does not tell takes the width of the others, or 32 bits where the ids of
    the tokenizer need them.

    Args:
      num_ids: of the tokenizer; above 65,537 ids do not fit 16 bits.
      name: `data.source`, for messages.

    Raises:
      UserError: no sample tells the width, the widths of files differ, or 16-bit ids do not fit
        the tokenizer.
    """
    unknown = [shard for shard in shards if shard.dtype is None]
    if not unknown:
        return shards
    width = _common_width(unknown, num_ids, name)
    dtype = np.dtype(f"<u{width}")
    return [with_dtype(shard, dtype) if shard.dtype is None else shard for shard in shards]


def _common_width(shards: list[Shard], num_ids: int, name: str) -> int:
    """Returns the bytes of an id, the same in all files.

    Raises:
      UserError: see `recognise_widths`.
    """
    widths = {shard: _recognised_width(shard) for shard in shards}
    for shard, width in widths.items():
        if width == 2 and num_ids > _MAX_IDS_OF_16_BITS:
            raise UserError(
                f"{shard.path} looks like uint16 ids, and the {num_ids:,} ids of the tokenizer take"
                " 32 bits: set data.tokenizer to the one that wrote the file, or, if the file has"
                f" low ids only, name the type as {name}#uint16"
            )
    recognised = {shard: width for shard, width in widths.items() if width}
    distinct = set(recognised.values())
    if len(distinct) > 1:
        files = [f"{shard.path.name} ({8 * width} bits)" for shard, width in recognised.items()]
        raise UserError(f"{name} has files of different widths: {listed(tuple(files))}: name one")
    if distinct:
        return distinct.pop()
    if num_ids > _MAX_IDS_OF_16_BITS:
        return 4
    raise UserError(
        f"{shards[0].path} does not tell whether its ids are uint16 or uint32: name the type as"
        f" {name}#uint16 or {name}#uint32"
    )


def _recognised_width(shard: Shard) -> int | None:
    """Returns the bytes of an id by a sample of the file: 2, 4, 8, or None if it does not tell."""
    size = shard.path.stat().st_size
    if size % 4:
        return 2
    lower, upper = _sample(shard)
    small_lower = float((lower <= _MAX_UPPER).mean())
    small_upper = float((upper <= _MAX_UPPER).mean())
    # Every upper half is that of a small id, and the lower halves are not small as well.
    if small_upper == 1 and (not upper.any() or small_lower < 0.9):
        if len(upper) < _MIN_PAIRS or not lower.any():
            return None
        is_wide = size % 8 == 0 and not lower[1::2].any() and not upper[1::2].any()
        return 8 if is_wide else 4
    if small_lower == 1 and small_upper < 0.5 and not lower.any():
        return None  # big-endian, or shifted by a header
    return 2


def _sample(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lower and the upper halves of some 32-bit words of a file, each uint16 [n]."""
    data = np.memmap(shard.path, "<u2", "r")
    block = _BLOCK_BYTES // 2
    starts = np.linspace(0, max(0, len(data) - block), _NUM_BLOCKS).astype(np.int64)
    starts = starts // 4 * 4  # blocks begin at a multiple of 64 bits
    blocks = [data[start : start + block] for start in np.unique(starts)]
    lower = np.concatenate([block[0::2] for block in blocks])
    upper = np.concatenate([block[1::2] for block in blocks])
    return lower, upper
