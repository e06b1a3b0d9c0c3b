"""The parts of a report, which report_html.py and report_md.py write with equal content.

Texts are plain strings, never markup: the writers escape them. A text may be a list of
strings, of which `Strong` ones are set off.
"""

from __future__ import annotations

from typing import NamedTuple


class Strong(str):
    """A run of text in bold."""


Text = str | list[str]


class Title(NamedTuple):
    """The head of the report."""

    text: str
    subtitle: str


class Heading(NamedTuple):
    """The head of a section (level 2) or of a part of it (level 3)."""

    text: str
    level: int = 2


class Paragraph(NamedTuple):
    """Running text. style: "", "lead" (large) or "question" (italic)."""

    text: Text
    style: str = ""


class Box(NamedTuple):
    """A message that must not be missed. tone: "alarm" or "note"."""

    text: Text
    tone: str


class Cell(NamedTuple):
    """A table cell: a value, a smaller second line, and a tone (good, bad, quiet)."""

    text: str
    below: str = ""
    tone: str = ""


class Table(NamedTuple):
    """A table. The columns whose title stands in `left` hold words and are set left."""

    columns: list[str]
    rows: list[list[Cell | str]]
    left: tuple[str, ...] = ()
    caption: str = ""


def words(columns: list[str], rows: list[list[Cell | str]], caption: str = "") -> Table:
    """A table of which every column holds words."""
    return Table(columns, rows, tuple(columns), caption)


class Pairs(NamedTuple):
    """A table of names and values, without a head."""

    items: list[tuple[str, str]]


class Figure(NamedTuple):
    """A plot: its file stem under plots/, the SVG, and what it shows in words."""

    name: str
    svg: str
    caption: Text


class Code(NamedTuple):
    """Fixed-width text. `prompt` is the part before it that was given, not produced."""

    text: str
    title: str = ""
    prompt: str = ""


class Fold(NamedTuple):
    """Parts that a reader may open."""

    summary: str
    parts: list


class Terms(NamedTuple):
    """Definitions: word and meaning."""

    items: list[tuple[str, str]]


def pieces(text: Text) -> list[str]:
    """A text as its list of runs."""
    return [text] if isinstance(text, str) else list(text)


def cell(value: Cell | str) -> Cell:
    """A table entry as a Cell."""
    return value if isinstance(value, Cell) else Cell(value)
