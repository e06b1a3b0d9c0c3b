"""Writes a report as one self-contained HTML page: no scripts, nothing from the network."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from qkvjax.analysis import document as d
from qkvjax.analysis.plots import FAINT, INK, PAPER

STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def render(parts: list) -> str:
    """The page for the parts of a report; every text is escaped."""
    title = next(part.text for part in parts if isinstance(part, d.Title))
    body = "\n".join(_part(part) for part in parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def _part(part) -> str:
    match part:
        case d.Title():
            return f'<h1>{escape(part.text)}</h1>\n<p class="subtitle">{escape(part.subtitle)}</p>'
        case d.Heading():
            return f"<h{part.level}>{escape(part.text)}</h{part.level}>"
        case d.Paragraph():
            style = f' class="{part.style}"' if part.style else ""
            return f"<p{style}>{_text(part.text)}</p>"
        case d.Box():
            return f'<div class="box {part.tone}" role="note">{_text(part.text)}</div>'
        case d.Table():
            return _table(part)
        case d.Pairs():
            rows = (
                f'<tr><th scope="row">{escape(n)}</th>{_cell(d.Cell(v), "left")}</tr>'
                for n, v in part.items
            )
            return f'<div class="scroll"><table class="pairs">{"".join(rows)}</table></div>'
        case d.Figure():
            caption = f"<figcaption>{_text(part.caption)}</figcaption>"
            return f"<figure>{_inline(part)}\n{caption}</figure>"
        case d.Code():
            title = f'<p class="pretitle">{escape(part.title)}</p>\n' if part.title else ""
            given = f'<span class="given">{escape(part.prompt)}</span>' if part.prompt else ""
            return f"{title}<pre>{given}{escape(part.text)}</pre>"
        case d.Fold():
            inside = "\n".join(_part(p) for p in part.parts)
            return f"<details><summary>{escape(part.summary)}</summary>\n{inside}\n</details>"
        case d.Terms():
            items = (f"<dt>{escape(w)}</dt><dd>{escape(meaning)}</dd>" for w, meaning in part.items)
            return f"<dl>{''.join(items)}</dl>"
    raise TypeError(f"no part of a report: {part!r}")


def _text(text: d.Text) -> str:
    runs = ((escape(run), isinstance(run, d.Strong)) for run in d.pieces(text))
    return "".join(f"<strong>{run}</strong>" if strong else run for run, strong in runs)


def _table(table: d.Table) -> str:
    left = ["left" if column in table.left else "" for column in table.columns]
    titles = zip(table.columns, left)
    head = "".join(f'<th scope="col" class="{side}">{escape(c)}</th>' for c, side in titles)
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    rows = ["".join(_cell(d.cell(c), side) for c, side in zip(row, left)) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}'
        "</tbody></table></div>"
    )


def _cell(cell: d.Cell, side: str) -> str:
    lines = cell.text.splitlines()
    wrap = ""
    if any(len(word) > 30 for word in cell.text.split()):
        wrap = " long"  # paths and hashes may break anywhere
    elif len(lines) > 1 and max(map(len, lines)) < 34:
        wrap = " lines"  # short lines break where they say
    text = escape(cell.text)
    if cell.tone:
        text = f'<span class="{cell.tone}">{text}</span>'
    below = f"<small>{escape(cell.below)}</small>" if cell.below else ""
    return f'<td class="{side}{wrap}">{text}{below}</td>'


def _inline(figure: d.Figure) -> str:
    """The SVG without its XML head, its ids made unique, its neutral colours the page's."""
    svg = figure.svg[figure.svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{figure.name}-", svg)
    for colour, name in ((INK, "ink"), (PAPER, "paper"), (FAINT, "faint")):
        svg = svg.replace(colour, f"var(--{name})")
    label = escape("".join(d.pieces(figure.caption)), quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
