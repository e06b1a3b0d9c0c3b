"""The parts of a report, which report_html.py and report_md.py write with equal content.

Texts are plain strings, never markup: the writers escape them. A text may be a list of
strings, of which `Strong` ones are set off.
"""

from __future__ import annotations

import dataclasses


class Strong(str):
    """A run of text in bold."""


Text = str | list[str]


@dataclasses.dataclass(frozen=True)
class Title:
    """The head of the report."""

    text: str
    subtitle: str


@dataclasses.dataclass(frozen=True)
class Heading:
    """The head of a section (level 2) or of a part of it (level 3)."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Running text. style: "", "lead" (large) or "question" (italic)."""

    text: Text
    style: str = ""


@dataclasses.dataclass(frozen=True)
class Box:
    """A message that must not be missed. tone: "alarm" or "note"."""

    text: Text
    tone: str


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table cell: a value, a smaller second line, and a tone (good, bad, quiet)."""

    text: str
    below: str = ""
    tone: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table. The columns whose title stands in `left` hold words and are set left."""

    columns: list[str]
    rows: list[list[Cell | str]]
    left: tuple[str, ...] = ()
    caption: str = ""


def words(columns: list[str], rows: list[list[Cell | str]], caption: str = "") -> Table:
    """A table of which every column holds words."""
    return Table(columns, rows, tuple(columns), caption)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A table of names and values, without a head."""

    items: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot: its file stem under plots/, the SVG, and what it shows in words."""

    name: str
    svg: str
    caption: Text


@dataclasses.dataclass(frozen=True)
class Code:
    """Fixed-width text. `prompt` is the part before it that was given, not produced."""

    text: str
    title: str = ""
    prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Fold:
    """Parts that a reader may open."""

    summary: str
    parts: list


@dataclasses.dataclass(frozen=True)
class Terms:
    """Definitions: word and meaning."""

    items: list[tuple[str, str]]


def pieces(text: Text) -> list[str]:
    """A text as its list of runs."""
    return [text] if isinstance(text, str) else list(text)


def cell(value: Cell | str) -> Cell:
    """A table entry as a Cell."""
    return value if isinstance(value, Cell) else Cell(value)
