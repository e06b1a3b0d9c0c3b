"""The pages as a reader meets them: code blocks, links, headings."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "RESULTS.md"]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*FRONT, *DOCS]
# Made by docs/generate.py when the site is built.
GENERATED = {
    ROOT / "docs/reference" / name for name in ("commands.md", "configuration.md", "recipes.md")
}


def name_of(page: Path) -> str:
    """Returns a page's path, as the name of a test."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """Returns the code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def prose(page: Path) -> str:
    """Returns a page without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Returns the words of each `qkvjax` command of a page's shell blocks and inline code.

    Comments end a command, and a backslash joins lines. Commands inside a launcher's arguments
    (`sbatch ... study --config=...`) count as commands too.
    """
    lines = [line for block in blocks(page, "bash") for line in shlex_lines(block)]
    inline = re.findall(r"`(qkvjax [a-z]+ --[^`]+)`", prose(page))
    found = []
    for words in [*lines, *(shlex.split(text) for text in inline)]:
        launchers = ("launch/slurm.sbatch", "launch/tpu_vm.sh", "launch/local.sh")
        launcher = next((word for word in words if word in launchers), None)
        if words[0] == "qkvjax":
            found.append(words[1:])
        elif launcher == "launch/slurm.sbatch":
            found.append(words[words.index(launcher) + 1 :])
        elif launcher:
            flags = [word for word in words[words.index(launcher) :] if word.startswith("--")]
            found.append(["train", *flags])
    return found


def shlex_lines(block: str) -> list[list[str]]:
    """Returns the words of each command of a shell block."""
    commands, text = [], ""
    for line in block.splitlines():
        text += line.removesuffix("\\") + ("\n" if not line.endswith("\\") else "")
        if line.endswith("\\"):
            continue
        try:
            words = shlex.split(re.sub(r"(?m)(^|\s)#\s.*$", "", text))
        except ValueError:  # a quoted argument goes on in the next line
            continue
        if words:
            commands.append(words)
        text = ""
    assert not text.strip(), f"a command without an end: {text}"
    return commands


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip() for heading in headings]
    return {re.sub(r"[\s-]+", "-", heading.lower()) for heading in plain}


@functools.cache
def generator():
    """Returns the module docs/generate.py."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
