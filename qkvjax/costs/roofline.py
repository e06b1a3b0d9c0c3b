"""How many tokens fit into memory and how fast they decode at a bandwidth: arithmetic, no jax.

A cache is described by its layers, each `(bytes_per_token, window)`: a layer keeps
`bytes_per_token * min(length, window)` bytes for a sequence; with window None,
`bytes_per_token * length`.
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
    """Returns the bytes of "80GB" (10^9 bytes each) or "141GiB" (2^30 bytes each).

    Args:
      text: what the user wrote.
      name: of the flag, for the message.
      per_second: whether it is a bandwidth, which may end in "/s".

    Raises:
      UserError: the text is not a positive number with a known unit, or has "/s" without
        `per_second`.
    """
    rate = "/s" if per_second else ""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*)\s*([KMGTP]?I?)B" + f"({rate})?", text.strip(), re.I)
    scale = _UNITS.get(match[2].upper()) if match else None
    value = round(float(match[1]) * scale) if scale and len(match[1]) < 30 else 0
    if value < 1:
        raise UserError(
            f"{name}={text!r} is not a {'bandwidth' if per_second else 'size'}: write for example"
            f" {name}=80GB{rate} (10^9 bytes each) or {name}=80GiB{rate} (2^30 bytes each)"
        )
    return value


def sequence_bytes(cache: CacheLayers, length: int) -> int:
    """Returns the bytes of the cache of one sequence of `length` tokens."""
    return sum(size * (length if window is None else min(length, window)) for size, window in cache)


def longest_context(cache: CacheLayers, free: float) -> int | None:
    """Returns the tokens of the longest single sequence whose cache fits into `free` bytes.

    None if every length fits: every layer has a window, and all windows fit.
    """
    if free < 0:
        return 0
    length = 0
    # Between two window sizes the cache grows by a constant for each token: the layers that are not
    # full yet.
    windows = sorted({window for _, window in cache if window is not None})
    for end in [*windows, math.inf]:
        growth = sum(size for size, window in cache if window is None or window > length)
        if not growth:
            break
        longest = length + int((free - sequence_bytes(cache, length)) // growth)
        if longest < end:
            return longest
        length = end
    return None


def most_sequences(cache: CacheLayers, length: int, free: float) -> int:
    """Returns how many sequences of `length` tokens fit into `free` bytes."""
    return max(0, int(free // sequence_bytes(cache, length)))


def decode_tokens_per_second(
    bandwidth: float, weight_bytes: float, cache_bytes: float, batch: int
) -> float:
    """Returns tokens per second of `batch` sequences, if nothing but reading took time.

    One step makes `batch` tokens. It reads `weight_bytes` once and `cache_bytes` for each sequence
    (the bandwidth side of the roofline of Williams et al. 2009).

    Args:
      bandwidth: bytes per second.
      weight_bytes: of all weights that a step reads.
      cache_bytes: of the cache of one sequence.
      batch: number of sequences.
    """
    return batch * bandwidth / (weight_bytes + batch * cache_bytes)
