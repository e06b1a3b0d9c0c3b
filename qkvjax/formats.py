"""Writes numbers as people read them (2.13M, 80 KiB, +1.3 %, 3 min 20 s) and plain-text tables."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

NONE = "–"
NBSP = "\u00a0"  # no-break space: keeps a number and its unit on one line
NOT_MEASURED = "not measured"
WIDTH = 110  # columns of a table or a note
_GAP = "  "
_COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_ROUNDS_UP = 0.9995  # from here on a number is 1 of the next unit: 999_600 is "1M", not "1,000k"


def signed(text: str) -> str:
    """Returns the text of a number with a typographic minus."""
    return text.replace("-", "−")


def count(value: float | None) -> str:
    """Writes a count with at most three figures: 2_134_000 -> "2.13M", 800_000 -> "800k"."""
    if value is None:
        return NONE
    for size, unit in _COUNT_UNITS:
        if abs(value) >= size * _ROUNDS_UP:
            return _plain(value / size) + unit
    return f"{value:,.0f}"


def num_bytes(value: float | None) -> str:
    """Writes bytes: 81_920 -> "80 KiB"."""
    if value is None:
        return NONE
    for size, unit in _BYTE_UNITS:
        if abs(value) >= size:
            return f"{_plain(value / size)}{NBSP}{unit}"
    return f"{value:,.0f}{NBSP}B"


def duration(seconds: float | None) -> str:
    """Writes seconds: 0.0012 -> "1.2 ms", 200 -> "3 min 20 s"."""
    if seconds is None:
        return NONE
    if seconds < 1e-3:
        return f"{_figures(seconds * 1e6)}{NBSP}µs"
    if seconds < 1:
        return f"{_figures(seconds * 1e3)}{NBSP}ms"
    if seconds < 59.5:
        return f"{_figures(seconds)}{NBSP}s"
    if seconds < 5400:
        minutes, rest = divmod(round(seconds), 60)
        text = f"{minutes} min {rest} s" if rest else f"{minutes} min"
        return text.replace(" ", NBSP)
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min".replace(" ", NBSP)


def difference(value: float | None) -> str:
    """Writes a difference of scores: sign and four decimals, or 0."""
    if value is None:
        return NONE
    return "0" if value == 0 else signed(f"{value:+.4f}")


def percent(value: float | None, decimals: int | None = None, sign: bool = True) -> str:
    """Writes a fraction in percent: 0.013 -> "+1.3 %".

    Args:
      value: the fraction.
      decimals: None means about two significant figures.
      sign: whether a positive number gets a plus.
    """
    if value is None:
        return NONE
    if value == 0:
        return f"0{NBSP}%"
    if decimals is None:
        decimals = percent_decimals(value)
    return signed(f"{100 * value:{'+' if sign else ''}.{decimals}f}{NBSP}%")


def percent_decimals(value: float) -> int:
    """Returns the number of decimals that `percent` gives a value, about two figures."""
    size = abs(100 * value)
    if size < 0.1:
        return 2
    return 1 if size < 10 else 0


def saved(fraction: float | None) -> str:
    """Writes the part that is saved: 0.96875 -> "96.9 %"."""
    if fraction is None:
        return NONE
    return signed(f"{_plain(100 * fraction)}{NBSP}%")


def span(low: float | None, high: float | None, write: Callable[[float], str] = difference) -> str:
    """Writes an interval: "+0.0101 to +0.0331", or a dash if there is none.

    Args:
      low: lower end.
      high: upper end.
      write: writes one end.
    """
    if low is None or high is None:
        return NONE
    return f"{write(low)}{NBSP}to{NBSP}{write(high)}"


def percent_span(middle: float, low: float | None, high: float | None) -> str:
    """Writes an interval in percent, with the decimals of its middle.

    There are up to four decimals if fewer would show an end as zero, so that it is visible on which
    side of zero the end lies.
    """
    decimals = percent_decimals(middle)
    for end in (low, high):
        while end and decimals < 4 and round(100 * end, decimals) == 0:
            decimals += 1
    return span(low, high, lambda value: percent(value, decimals))


def ratio(value: float | None) -> str:
    """Writes a ratio to the baseline: "0.93 ×"; the baseline itself is "1"."""
    if value is None:
        return NOT_MEASURED
    return "1" if value == 1 else f"{value:.2f}{NBSP}×"


def seeds(n: int) -> str:
    """Writes a number of seeds: "1 seed", "3 seeds"."""
    return "1 seed" if n == 1 else f"{n:,} seeds"


def listed(words: list[str]) -> str:
    """Writes a list of words: "a", "a and b", "a, b and c"."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def table(header: Sequence[tuple[str, ...]], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table: the first two columns to the left, others to the right.

    Args:
      header: for each column one word per header line.
      rows: cells, one per column.
    """
    lines = [*zip(*header), *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [_table_line(line, widths) for line in lines]


def _table_line(cells: Sequence[str], widths: list[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2])]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:])]
    return _GAP.join([*left, *right]).rstrip()


def aligned(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Returns lines "label   text" with the texts, which are wrapped, below each other."""
    width = max(len(label) for label, _ in pairs) + len(_GAP)
    return [
        line for label, text in pairs for line in _wrapped(text, label.ljust(width), " " * width)
    ]


def notes(texts: Sequence[str]) -> list[str]:
    """Returns each text as a point of a list, wrapped."""
    return [line for text in texts for line in _wrapped(text, "- ", "  ")]


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    """Wraps a text, with `first` before its first line and `rest` before the others."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest)


def _figures(value: float) -> str:
    """Writes three significant figures, without an exponent: 80.0, 2.50, 0.000123."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def _plain(value: float) -> str:
    """Writes three significant figures without trailing zeros: 80, 96.9, 2.5."""
    text = _figures(value)
    return text.rstrip("0").rstrip(".") if "." in text else text
