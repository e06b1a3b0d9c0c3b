"""Writes a report as Markdown, with the content of the HTML page; plots are linked files."""

from __future__ import annotations

import re

from qkvjax.analysis import document as d


def render(parts: list) -> str:
    """The Markdown for the parts of a report; texts are escaped, so that they stay texts."""
    return "\n\n".join(_part(part) for part in parts) + "\n"


def _part(part) -> str:
    match part:
        case d.Title():
            return f"# {_escape(part.text)}\n\n{_escape(part.subtitle)}"
        case d.Heading():
            return f"{'#' * part.level} {_escape(part.text)}"
        case d.Paragraph():
            text = _text(part.text)
            return f"*{text}*" if part.style == "question" else text
        case d.Box():
            return f"> {'⚠ ' if part.tone == 'alarm' else ''}{_text(part.text)}"
        case d.Table():
            return _table(part)
        case d.Pairs():
            rows = [f"| {_escape(name)} | {_cell(d.Cell(value))} |" for name, value in part.items]
            return "\n".join(["| | |", "| --- | --- |", *rows])
        case d.Figure():
            caption = _text(part.caption)
            return f"![{part.name}](plots/{part.name}.svg)\n\n{caption}"
        case d.Code():
            text = part.prompt + part.text
            longest = max((len(run) for run in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            title = f"**{_escape(part.title)}**\n\n" if part.title else ""
            return f"{title}{fence}text\n{text}\n{fence}"
        case d.Fold():
            return "\n\n".join([f"**{_escape(part.summary)}**", *map(_part, part.parts)])
        case d.Terms():
            return "\n".join(f"- **{_escape(w)}**: {_escape(m)}" for w, m in part.items)
    raise TypeError(f"no part of a report: {part!r}")


def _escape(text: str) -> str:
    """Text that Markdown and the HTML inside it leave alone, on one line."""
    text = re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", text)
    return re.sub(r"\s*[\r\n]+\s*", " ", text)


def _text(text: d.Text) -> str:
    runs = ((_escape(run), isinstance(run, d.Strong)) for run in d.pieces(text))
    return "".join(f"**{run}**" if strong else run for run, strong in runs)


def _table(table: d.Table) -> str:
    lines = [
        "| " + " | ".join(_escape(column) or " " for column in table.columns) + " |",
        "| " + " | ".join("---" if c in table.left else "---:" for c in table.columns) + " |",
    ]
    for row in table.rows:
        lines.append("| " + " | ".join(_cell(d.cell(value)) for value in row) + " |")
    caption = f"\n\n{_escape(table.caption)}" if table.caption else ""
    return "\n".join(lines) + caption


def _cell(cell: d.Cell) -> str:
    text = "<br>".join(_escape(line) for line in cell.text.splitlines())
    return text + (f" ({_escape(cell.below)})" if cell.below else "")
