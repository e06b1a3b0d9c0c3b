"""Builds the pages of the site that are made and not written; mkdocs calls it as a hook.

  mkdocs serve          the site at http://127.0.0.1:8000
  mkdocs build --strict

Three things happen here:

  - The reference of configuration, commands and recipes is made from the program itself: from
    what `--help` prints and from the docstrings of configs/.
  - Files of the repository outside docs/ become pages: LOG.md, RESULTS.md, CONTRIBUTING.md and the
    reports in benchmarks/results.
  - Links are written for a reader of the repository, relative to the file. On the site a link to a
    file that has no page there becomes its path.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import html
import io
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Files of the repository that are pages, or pictures of pages: path -> its place in docs/.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "LOG.md": "results/log.md",
    "RESULTS.md": "results/index.md",
    "benchmarks/README.md": "results/benchmarks.md",
}
REPORTS = ROOT / "benchmarks" / "results"
RECIPES_PAGE = "reference/recipes.md"
# README.md has no page of its own: the site begins with docs/index.md.
SAME_PAGE = {"README.md": "index.md"}
LINK = re.compile(r"\]\(([^)\s]+)\)")
# The line of `qkvjax train --help` between the flags and the fields.
FIELDS_HEADING = re.compile(r"^fields of a config.*$", re.MULTILINE)


def on_files(files, config):
    """Adds the generated pages and the files from outside docs/."""
    from mkdocs.structure.files import File  # the tests read this file without mkdocs, too

    for place, content in generated_pages().items():
        files.append(File.generated(config, place, content=content))
    for path, place in outside_pages().items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links between files of the repository into links between pages of the site."""
    places = outside_pages()
    paths = {place: path for path, place in places.items()}
    place = page.file.src_uri
    folder = os.path.dirname(paths.get(place, f"docs/{place}"))

    def link(match: re.Match) -> str:
        target, hash_sign, anchor = match[1].partition("#")
        if not target or "://" in target:
            return match[0]
        path = os.path.normpath(os.path.join(folder, target))
        new = site_place(path, places)
        if new is not None:
            return f"]({os.path.relpath(new, os.path.dirname(place) or '.')}{hash_sign}{anchor})"
        # A file of the repository without a page: "[text](path)" becomes "[text] (`path`)".
        return f"] (`{path}`)" if (ROOT / path).exists() else match[0]

    return LINK.sub(link, markdown)


def site_place(path: str, places: dict[str, str]) -> str | None:
    """Returns where a file of the repository is in docs/; None where it has no page."""
    if path.startswith("configs/") and path.endswith(".py"):
        return RECIPES_PAGE
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return places.get(path) or SAME_PAGE.get(path)


@functools.cache
def outside_pages() -> dict[str, str]:
    """Returns path -> place of the files outside docs/ that the site shows."""
    reports = {}
    for report in sorted(REPORTS.glob("*/report.md")):
        for file in (report, *sorted(report.parent.glob("plots/*.svg"))):
            path = file.relative_to(ROOT).as_posix()
            reports[path] = f"results/reports/{file.relative_to(REPORTS).as_posix()}"
    return PAGES | reports


@functools.cache
def generated_pages() -> dict[str, str]:
    """Returns place -> text of the pages that are made from the program."""
    return {
        "reference/commands.md": commands_page(),
        "reference/configuration.md": configuration_page(),
        RECIPES_PAGE: recipes_page(),
    }


def help_of(*arguments: str) -> str:
    """Returns what `qkvjax ARGUMENTS --help` prints."""
    from qkvjax.commands import cli

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main(["qkvjax", *arguments, "--help"])
    return printed.getvalue()


def commands() -> dict[str, str]:
    """Returns command -> one line about it, as `qkvjax --help` lists them."""
    return dict(re.findall(r"^  (\w+) +(\S.*)$", help_of(), re.MULTILINE))


def commands_page() -> str:
    """Returns the page of all commands: the text of their --help, its flags as a table."""
    lines = ["# Commands", "", "What `qkvjax COMMAND --help` prints.", ""]
    for name, summary in commands().items():
        text, _, rest = help_of(name).partition("\nflags:\n")
        flags = listed(FIELDS_HEADING.split(rest)[0])
        lines += [f"## {name}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
        lines += ["```text", text.rstrip(), "```", "", *table("flag", flags[""])]
    return "\n".join(lines)


def listed(text: str) -> dict[str, list[tuple[str, str, str]]]:
    """Returns group -> (name, default, meaning) of a list as --help prints it.

    An entry is `  --NAME   MEANING (default VALUE)`, and goes on in indented lines. A line without
    indentation that ends in ":" begins a group; what stands before the first is in the group "".
    """
    groups: dict[str, list[tuple[str, str, str]]] = {"": []}
    rows = groups[""]
    entry = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith(" " * 8):
            entry += " " + line.strip()
            continue
        if match := re.match(r"(--\S+)\s*(.*?)(?: \(default (.*)\))?$", entry):
            rows.append((match[1], match[3] or "", match[2]))
        entry = line.strip()
        if line.endswith(":") and not line.startswith(" "):
            rows = groups.setdefault(line.rstrip(":"), [])
    return groups


def table(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
    """Returns the lines of a Markdown table of flags or fields."""
    lines = [f"| {title} | default | meaning |", "| --- | --- | --- |"]
    for name, default, meaning in rows:
        shown = f"`{default}`" if default else ""
        text = re.sub(r"([|*])", r"\\\1", html.escape(meaning, quote=False))
        lines.append(f"| `{name}` | {shown} | {text} |")
    return [*lines, ""]


def configuration_page() -> str:
    """Returns the page of every field of a configuration, as `qkvjax train --help` lists them."""
    lines = [
        "# Configuration",
        "",
        "Every field, as `qkvjax train --help` lists them. A recipe (`--config=FILE.py`) starts",
        "from these defaults, and `--config.FIELD=VALUE` changes one of them. A duration is a",
        "number of steps (`300`), epochs (`2ep`), tokens (`10M tokens`) or a part of the run",
        "(`5%`).",
        "",
    ]
    fields = FIELDS_HEADING.split(help_of("train"))[-1]
    for group, rows in listed(fields).items():
        if rows:
            rows = [(name.removeprefix("--config."), *rest) for name, *rest in rows]
            lines += [f"## {group}", "", *table("field", rows)]
    return "\n".join(lines)


def recipes_page() -> str:
    """Returns the page of the recipes: the docstrings of configs/."""
    lines = ["# Recipes", "", "The docstring of each file in `configs/`.", ""]
    for file in sorted((ROOT / "configs").rglob("[!_]*.py")):
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        if doc:
            path = file.relative_to(ROOT).as_posix()
            lines += [f"## `{path}`", "", "```text", doc, "```", ""]
    return "\n".join(lines)
