"""Prints every message of the errors that a user can cause, to be read as one list.

python docs/list_messages.py            each message with its file and line
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qkvjax"
# What makes an error of its first argument, or of another one.
ERRORS = ("UserError", "Damaged", "Unencodable", "require")


def messages() -> Iterator[tuple[str, str]]:
    """Yields ("file:line", message); what is filled in stands in braces."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and _name(node.func) in ERRORS:
                texts = [_text(argument) for argument in node.args]
                longest = max(texts, key=len, default="")
                if longest.strip():
                    yield f"{file.relative_to(PACKAGE.parent)}:{node.lineno}", longest


def _name(function: ast.expr) -> str:
    """Returns the last word of what is called."""
    return getattr(function, "id", getattr(function, "attr", ""))


def _text(node: ast.expr) -> str:
    """Returns the text of a string, an f-string or a sum of them; "" for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ""


if __name__ == "__main__":
    for place, message in messages():
        print(f"{place}: {message}")
