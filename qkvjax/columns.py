"""Tables, labelled lines and notes as plain text of at most 110 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 110
_GAP = "  "


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
