"""What is read is data: nothing of it runs, leads elsewhere, or gives secrets away."""

import ast
from pathlib import Path

import pytest

from qkvjax.sweep import slug

ROOT = Path(__file__).parents[1]
CODE = sorted((ROOT / "qkvjax").rglob("*.py"))
# Modules and calls that turn data into code, or archives into files anywhere.
MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "tarfile", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "unpack_archive", "extractall"}


def names(path):
    """(line, name) of every module that a file imports and every function that it calls."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.lineno, f"{node.func.id}()"
            elif isinstance(node.func, ast.Attribute) and node.func.attr != "compile":
                yield node.lineno, f"{node.func.attr}()"
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and keyword.value.value is True:
                    yield node.lineno, f"{keyword.arg}=True"


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_turns_data_into_code(path):
    forbidden = MODULES | {f"{call}()" for call in CALLS} | {"allow_pickle=True", "shell=True"}
    assert not [found for found in names(path) if found[1] in forbidden]


@pytest.mark.parametrize(
    "label", ["../../etc/passwd", "/etc/passwd", "..", ".", "a\\..\\b", "\0", "~root", "x/../y", ""]
)
def test_names_become_folders_below_the_workdir(label):
    name = slug(label)
    assert name not in ("", ".", "..") and not set(name) & set("/\\\0~")
    assert (Path("/work") / name).resolve().parent == Path("/work")
