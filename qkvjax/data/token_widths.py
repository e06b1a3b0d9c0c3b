"""How wide the ids of a file without a header are, recognised from a sample."""

from __future__ import annotations

import numpy as np

from qkvjax.data.files import listed
from qkvjax.data.token_shards import Shard, with_dtype
from qkvjax.errors import UserError

# A sample of so many blocks tells how wide ids are.
_BLOCKS, _BLOCK_BYTES = 64, 1 << 13
_FEWEST = 8  # pairs of 16 bits that allow a verdict
_SMALL = 15  # the upper 16 bits of an id of a vocabulary of up to a million


def doubt(shard: Shard) -> str:
    """Returns what speaks against the type that was named for a file without a header, or ""."""
    width = _width(shard) if not shard.offset else None
    if width in (None, shard.dtype.itemsize):
        return ""
    named = f"{shard.path} is read as {shard.dtype.name}, as it was named"
    return f"{named}, and looks like uint{8 * width}"


def recognise(shards: list[Shard], num_ids: int, name: str) -> list[Shard]:
    """Gives every shard without a header its dtype, from a sample of its content.

    The upper halves of 32-bit ids are zero or nearly so and their lower halves are not; of 16-bit
    ids both halves of a pair are alike.

    Args:
      num_ids: of the tokenizer; above 65,537 ids do not fit 16 bits.
      name: `data.source`, for messages.

    Raises:
      UserError: the sample does not tell, or the files differ.
    """
    unknown = [shard for shard in shards if shard.dtype is None]
    verdicts = {shard: _width(shard) for shard in unknown}
    for shard, width in verdicts.items():
        if width == 2 and num_ids > 2**16 + 1:
            raise UserError(
                f"{shard.path} looks like uint16 ids, and the {num_ids:,} ids of the tokenizer take"
                " 32 bits: set data.tokenizer to the one that wrote the file, or, where it uses low"
                f" ids only, name the type as {name}#uint16"
            )
    widths = set(filter(None, verdicts.values()))
    if len(widths) > 1:
        files = (f"{s.path.name} ({8 * w} bits)" for s, w in verdicts.items() if w)
        raise UserError(f"{name} has files of different widths: {listed(tuple(files))}: name one")
    if unknown and not widths:
        if num_ids <= 2**16 + 1:
            raise UserError(
                f"{unknown[0].path} does not tell whether its ids are uint16 or uint32: name the"
                f" type as {name}#uint16 or {name}#uint32"
            )
        widths = {4}
    return [
        with_dtype(shard, np.dtype(f"<u{widths.copy().pop()}")) if shard.dtype is None else shard
        for shard in shards
    ]


def _width(shard) -> int | None:
    """Bytes of an id by a sample of the file: 2, 4, 8, or None where it does not tell."""
    size = shard.path.stat().st_size
    if size % 4:
        return 2
    data = np.memmap(shard.path, "<u2", "r")
    block = _BLOCK_BYTES // 2
    starts = np.linspace(0, max(0, len(data) - block), _BLOCKS).astype(np.int64) // 4 * 4
    parts = [data[start : start + block] for start in np.unique(starts)]
    lower = np.concatenate([part[0::2] for part in parts])
    upper = np.concatenate([part[1::2] for part in parts])
    small_lower = float((lower <= _SMALL).mean())
    small_upper = float((upper <= _SMALL).mean())
    if small_upper == 1 and (not upper.any() or small_lower < 0.9):
        if len(upper) < _FEWEST or not lower.any():
            return None
        # Of 64-bit ids the upper 32 bits are zero throughout as well.
        is_wide = size % 8 == 0 and not lower[1::2].any() and not upper[1::2].any()
        return 8 if is_wide else 4
    if small_lower == 1 and small_upper < 0.5 and not lower.any():
        return None  # of another byte order, or shifted by a header
    return 2
