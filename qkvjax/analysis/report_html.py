"""Writes a report as one self-contained HTML page: no scripts, nothing from the network."""

from __future__ import annotations

import re
from html import escape

from qkvjax.analysis import document as d
from qkvjax.analysis.plots import FAINT, INK, PAPER

STYLE = """
:root { color-scheme: light dark; --paper: #fffffe; --ink: #22272e; --soft: #5c6670;
  --line: #dfe3e7; --wash: #f5f6f7; --faint: #a0a8b0; --good: #00704f; --bad: #b03a00;
  --alarm: #a30d1f; --alarm-wash: #fdecee; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191d; --ink: #e4e7ea;
  --soft: #9aa4ae; --line: #30363d; --wash: #1e2227; --faint: #6b747d; --good: #4cc79b;
  --bad: #ff9355; --alarm: #ff8a95; --alarm-wash: #35171b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 "Source Sans 3", "Segoe UI", system-ui, -apple-system, "Helvetica Neue",
  Arial, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 72px 32px 96px; }
h1 { font-size: 34px; line-height: 1.2; font-weight: 650; letter-spacing: -.015em;
  margin: 0 0 10px; }
.subtitle { color: var(--soft); margin: 0; max-width: none; }
h2 { font-size: 22px; font-weight: 650; letter-spacing: -.01em; margin: 72px 0 18px; }
h3 { font-size: 16px; font-weight: 650; margin: 36px 0 8px; }
p { margin: 0 0 14px; max-width: 74ch; }
p.question { color: var(--soft); font-style: italic; font-size: 18px; }
p.lead { font-size: 19px; line-height: 1.55; }
caption, figcaption { color: var(--soft); font-size: 14px; line-height: 1.5; }
.box { border-left: 4px solid var(--faint); background: var(--wash); padding: 14px 20px;
  margin: 24px 0 0; border-radius: 0 6px 6px 0; }
.box.alarm { border-color: var(--alarm); background: var(--alarm-wash); color: var(--alarm); }
.scroll { overflow-x: auto; margin: 0 0 36px; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding: 10px 0 0; }
th { color: var(--soft); font-weight: 600; font-size: 13px; vertical-align: bottom;
  border-bottom: 1px solid var(--faint); }
th, td { padding: 8px 10px; text-align: right; }
td { vertical-align: top; white-space: pre-line; border-bottom: 1px solid var(--line); }
th.left, td.left { text-align: left; } td.long { overflow-wrap: anywhere; }
td.lines { white-space: pre; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
td:first-child { font-weight: 600; }
td small { display: block; color: var(--soft); font-size: 12.5px; font-weight: 400;
  white-space: nowrap; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.quiet { color: var(--soft); }
table.pairs { font-size: 14px; } .pairs th, .pairs td { padding: 4px 0; font-size: 14px;
  text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  font-weight: 400; }
.pairs th { width: 34%; color: var(--soft); padding-right: 16px; }
figure { margin: 0 0 48px; } figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
figcaption { margin-top: 8px; max-width: 84ch; }
pre { background: var(--wash); border-radius: 6px; padding: 12px 16px; margin: 4px 0 20px;
  font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre .given { color: var(--soft); } .pretitle { font-size: 14px; font-weight: 600; margin: 0; }
details { margin: 8px 0 28px; } summary { cursor: pointer; color: var(--soft); padding: 6px 0; }
dl { margin: 0; max-width: 84ch; font-size: 14.5px; } dt { font-weight: 600; margin-top: 12px; }
dd { margin: 0; color: var(--soft); }
@media (max-width: 640px) { main { padding: 32px 16px; } }
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #ccc;
    --wash: #f4f4f4; --good: #00563c; --bad: #8a2d00; --alarm: #a30d1f; --alarm-wash: #fdecee; }
  @page { margin: 16mm 15mm; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; }
  h1 { font-size: 20pt; } h2 { font-size: 13pt; margin-top: 26pt; } p.lead { font-size: 11.5pt; }
  p.question { font-size: 11pt; } table caption, figcaption, th { font-size: 8.5pt; }
  table { font-size: 8.5pt; } th, td { padding: 3pt 4pt; } td small { font-size: 7.5pt; }
  .scroll { overflow: visible; } h2, h3, .pretitle { break-after: avoid; }
  figure, tr, .box, pre { break-inside: avoid; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
}
"""


def render(parts: list) -> str:
    """The page for the parts of a report; every text is escaped."""
    title = next(part.text for part in parts if isinstance(part, d.Title))
    body = "\n".join(_part(part) for part in parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
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
            return (
                f"<figure>{_inline(part)}\n<figcaption>{_text(part.caption)}</figcaption></figure>"
            )
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
    head = "".join(
        f'<th scope="col" class="{side}">{escape(c)}</th>' for c, side in zip(table.columns, left)
    )
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
