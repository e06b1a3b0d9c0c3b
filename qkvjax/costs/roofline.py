"""What memory holds and what bandwidth allows when a model decodes: arithmetic, no jax.

A cache is described by its layers, `(bytes_per_token, window)` each: a layer holds
`bytes_per_token * min(length, window)` bytes for a sequence (window None: no limit).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from qkvjax.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15} | {
    f"{letter}I": 1024**power for power, letter in enumerate("KMGTP", start=1)
}
CacheLayers = Sequence[tuple[int, int | None]]


def parse_bytes(text: str, name: str, per_second: bool = False) -> int:
    """ "80GB" (10^9 bytes each) or "141GiB" (2^30 bytes each) as bytes; "3.35TB/s" as bytes/s.

    Raises:
      UserError: no positive number, no such unit, or "/s" where it does not belong.
    """
    rate = "/s" if per_second else ""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*)\s*([KMGTP]?I?)B" + f"({rate})?", text.strip(), re.I)
    scale = _UNITS.get(match[2].upper()) if match else None
    value = round(float(match[1]) * scale) if scale and len(match[1]) < 30 else 0
    if value < 1:
        raise UserError(
            f"{name}={text!r} is no {'bandwidth' if per_second else 'size'}: write for example"
            f" {name}=80GB{rate} (10^9 bytes each) or {name}=80GiB{rate} (2^30 bytes each)"
        )
    return value


def held_bytes(cache: CacheLayers, length: int) -> int:
    """Bytes of the cache of one sequence of `length` tokens."""
    return sum(size * (length if window is None else min(length, window)) for size, window in cache)


def longest_context(cache: CacheLayers, free: float) -> int | None:
    """Tokens of the longest single sequence whose cache fits in `free` bytes.

    None where no length is too long (every layer is windowed, and all windows fit).
    """
    if free < 0:
        return 0
    length = 0
    # Between two window sizes the cache grows by the layers that are not full yet.
    for end in [*sorted({w for _, w in cache if w is not None}), math.inf]:
        growing = sum(size for size, w in cache if w is None or w > length)
        if not growing:
            break
        fits = length + int((free - held_bytes(cache, length)) // growing)
        if fits < end:
            return fits
        length = end
    return None


def most_sequences(cache: CacheLayers, length: int, free: float) -> int:
    """How many sequences of `length` tokens fit in `free` bytes."""
    return max(0, int(free // held_bytes(cache, length)))


def decode_tokens_per_second(
    bandwidth: float, weight_bytes: float, cache_bytes: float, batch: int
) -> float:
    """Tokens a second of `batch` sequences if reading were all that takes time.

    One step makes `batch` tokens and reads `weight_bytes` once and `cache_bytes` for each
    sequence (the roofline of Williams et al. 2009, bandwidth side).
    """
    return batch * bandwidth / (weight_bytes + batch * cache_bytes)
