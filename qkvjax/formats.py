"""Numbers as people read them (2.13M, 80 KiB, +1.3 %, 3 min 20 s) and tables of plain text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

NONE = "–"
NBSP = "\u00a0"  # keeps a number and its unit on one line
NOT_MEASURED = "not measured"
WIDTH = 110  # columns of a table or a note
_GAP = "  "


def signed(text: str) -> str:
    """The text of a number with a typographic minus."""
    return text.replace("-", "−")


def count(value: float | None) -> str:
    """2_134_000 -> "2.13M"; 800_000 -> "800k"; at most three figures."""
    if value is None:
        return NONE
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return _plain(value / size) + unit
    return f"{value:,.0f}"


def num_bytes(value: float | None) -> str:
    """81_920 -> "80 KiB"."""
    if value is None:
        return NONE
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            return f"{_plain(value / 1024**power)}{NBSP}{unit}"
    return f"{value:,.0f}{NBSP}B"


def duration(seconds: float | None) -> str:
    """0.0012 -> "1.2 ms"; 200 -> "3 min 20 s"."""
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
    """A difference of scores: sign and four decimals, or 0."""
    if value is None:
        return NONE
    return "0" if value == 0 else signed(f"{value:+.4f}")


def percent(value: float | None, decimals: int | None = None, sign: bool = True) -> str:
    """0.013 -> "+1.3 %"; about two significant figures."""
    if value is None:
        return NONE
    if value == 0:
        return f"0{NBSP}%"
    if decimals is None:
        decimals = percent_decimals(value)
    return signed(f"{100 * value:{'+' if sign else ''}.{decimals}f}{NBSP}%")


def percent_decimals(value: float) -> int:
    """How many decimals `percent` gives to this value; an interval takes those of its middle."""
    size = abs(100 * value)
    return 2 if size < 0.1 else 1 if size < 10 else 0


def saved(fraction: float | None) -> str:
    """A part that is saved: 0.96875 -> "96.9 %"."""
    if fraction is None:
        return NONE
    return signed(f"{_plain(100 * fraction)}{NBSP}%")


def span(low: float | None, high: float | None, write=difference) -> str:
    """An interval: "+0.0101 to +0.0331", or a dash without one."""
    if low is None or high is None:
        return NONE
    return f"{write(low)}{NBSP}to{NBSP}{write(high)}"


def percent_span(middle: float, low: float | None, high: float | None) -> str:
    """An interval in percent with the decimals of its middle, or as many more as show on which side
    of zero its ends lie."""
    decimals = percent_decimals(middle)
    for end in (low, high):
        while end and decimals < 4 and round(100 * end, decimals) == 0:
            decimals += 1
    return span(low, high, lambda value: percent(value, decimals))


def ratio(value: float | None) -> str:
    """A ratio to the baseline: "0.93 ×"."""
    return NOT_MEASURED if value is None else f"{value:.2f}{NBSP}×" if value != 1 else "1"


def seeds(n: int) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{n} seed" if n == 1 else f"{n:,} seeds"


def listed(words: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def table(header: Sequence[tuple[str, ...]], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; the first two columns to the left, numbers to the right.

    Args:
      header: for each column its words, one a header line.
      rows: cells, as many as columns.
    """
    lines = [*zip(*header), *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [
        _GAP.join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]


def aligned(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Lines "label   text", the texts below each other."""
    width = max(len(label) for label, _ in pairs) + len(_GAP)
    return [
        line for label, text in pairs for line in _wrapped(text, label.ljust(width), " " * width)
    ]


def notes(texts: Sequence[str]) -> list[str]:
    """Each text as a point, wrapped."""
    return [line for text in texts for line in _wrapped(text, "- ", "  ")]


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest)


def _figures(value: float) -> str:
    """Three significant figures, without an exponent."""
    decimals = max(0, 2 - int(math.floor(math.log10(abs(value))))) if value else 0
    return f"{value:,.{decimals}f}"


def _plain(value: float) -> str:
    """Three significant figures without the zeros that say nothing: 80, 96.9, 2.5."""
    text = _figures(value)
    return text.rstrip("0").rstrip(".") if "." in text else text
