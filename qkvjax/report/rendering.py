"""Fills in the templates of this folder, and makes texts and plots safe to stand in them."""

from __future__ import annotations

import html
import re
from pathlib import Path

from qkvjax.report import drawing

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, values: dict) -> str:
    """Returns a template with its values filled in.

    HTML escapes every text by itself; the Markdown template does so by the filter `md`.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["md"] = markdown
    environment.filters["inline_svg"] = inline_svg
    environment.filters["fence"] = fence
    environment.globals["style"] = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(values)


def markdown(text: str) -> str:
    """Returns a text on one line, with the characters escaped that mean something in Markdown or
    in HTML inside it."""
    text = re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", str(text))
    return re.sub(r"\s*[\r\n]+\s*", " ", text)


def fence(text: str) -> str:
    """Returns a row of backquotes longer than any in the text, to stand around it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)


def inline_svg(svg: str, name: str, caption: str) -> str:
    """Returns an SVG that can stand in an HTML page.

    The XML head is cut off, ids get a prefix so that those of two plots do not collide, and the
    three neutral colours become those of the page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, role in ((drawing.INK, "ink"), (drawing.PAPER, "paper"), (drawing.FAINT, "faint")):
        svg = svg.replace(colour, f"var(--{role})")
    label = html.escape(caption, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
