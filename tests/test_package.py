"""The house rules that a machine can check: packages, imports, sizes."""

import ast
import configparser
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qkvjax.commands import cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qkvjax"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "configs").rglob("*.py")])
TREES = {file: ast.parse(file.read_text()) for file in FILES}
COMMANDS = set(cli.COMMANDS)
# Imports run downwards; what has one number may import each other.
RANK = {
    "errors": 0,
    **dict.fromkeys(("durations", "files", "formats", "progress", "workdir"), 1),
    "kernels": 2,
    "attention": 3,
    "models": 4,
    "fields": 5,
    "schema": 6,
    "config": 7,
    "sweep": 7,
    "evaluation": 8,
    "training": 9,
    "generation": 10,
    "interop": 10,
    "report": 11,
    "costs": 12,
    "studies": 13,
    "commands": 14,
    "__main__": 15,
}
BOTTOM = {name for name, rank in RANK.items() if rank <= 1}
BESIDE = {"data", "parallel"}  # import the bottom alone; anything may import them


def imports(file):
    """Modules that a file imports, anywhere in it: "qkvjax.data.split", "numpy", ..."""
    for_type_checkers = {
        inner
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in node.body
    }
    for node in ast.walk(TREES[file]):
        if node in for_type_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(file):
    """Which part of the house a file of the package is: "training", "train", ..."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def parts_imported(file):
    found = {name.split(".")[1] for name in imports(file) if name.startswith("qkvjax.")}
    return found - {part(file)}


IN_PACKAGE = [file for file in FILES if file.is_relative_to(PACKAGE)]


def test_setup_lists_every_package():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    listed = parser["options"]["packages"].split()
    folders = {file.parent.relative_to(ROOT) for file in IN_PACKAGE}
    found = {".".join(folder.parts) for folder in folders} | {
        "qkvjax.configs",
        "qkvjax.configs.paper",
        "qkvjax.configs.studies",
    }
    assert sorted(found) == sorted(listed)
    for folder in folders:
        assert (ROOT / folder / "__init__.py").is_file(), folder
    recipes = {file.parent for file in FILES} - {file.parent for file in IN_PACKAGE}
    assert recipes == {
        ROOT / "configs",
        ROOT / "configs/paper",
        ROOT / "configs/studies",
    }  # another folder of recipes below it would not be installed


def test_every_command_is_documented():
    for command in COMMANDS:
        tree = TREES[PACKAGE / "commands" / f"{command}.py"]
        assert f"qkvjax {command} " in ast.get_docstring(tree)


def loaded_after(program):
    """Top-level modules that a fresh interpreter holds after running a program."""
    program += "; import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
    )
    return set(done.stdout.split())


def test_importing_qkvjax_is_light():
    loaded = loaded_after("import qkvjax")
    heavy = {"jax", "flax", "numpy", "tensorflow", "tensorflow_datasets", "matplotlib", "orbax"}
    assert not heavy & loaded


def test_help_needs_no_jax():
    calls = "; ".join(f"cli.main(['qkvjax', '{name}', '-h'])" for name in sorted(COMMANDS))
    program = "import contextlib, io; from qkvjax.commands import cli"
    program += f"\nwith contextlib.redirect_stdout(io.StringIO()): {calls}\n0"
    assert not {"jax", "tensorflow_datasets", "matplotlib"} & loaded_after(program)


def test_a_configuration_is_checked_without_jax():
    loaded = loaded_after("from qkvjax import config; config.resolve(config.default())")
    assert not {"jax", "flax", "tensorflow_datasets"} & loaded


@pytest.mark.parametrize("file", IN_PACKAGE, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_one_way(file):
    me = part(file)
    if me == "__init__":
        return  # offers `load`, which imports when it is called
    for other in parts_imported(file):
        if other in BESIDE:
            assert me not in BESIDE or other == me, f"{me} imports {other}"
        elif me in BESIDE:
            assert other in BOTTOM, f"{me} imports {other}"
        else:
            assert RANK[other] < RANK[me], f"{me} imports {other}"


def test_every_part_of_the_house_has_a_rank():
    assert {part(file) for file in IN_PACKAGE} - {"__init__"} == RANK.keys() | BESIDE


def test_mesh_axes_are_named_in_one_place():
    """Only parallel/ makes PartitionSpecs, and only it writes the axes' names in shardings."""
    for file in IN_PACKAGE:
        if part(file) == "parallel":
            continue
        names = {node.id for node in ast.walk(TREES[file]) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(TREES[file]) if isinstance(node, ast.Attribute)}
        assert not names & {"PartitionSpec", "NamedSharding", "pjit"}, file
        assert not any(name.endswith("PartitionSpec") for name in imports(file)), file


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("orbax", {"training/checkpoint.py"}),
        ("tensorflow_datasets", {"data/builder.py", "data/tfds_source.py"}),
        ("tensorboardX", {"training/tensorboard.py"}),
        ("wandb", {"training/metrics.py"}),
        ("grain", {"data/order.py"}),
        ("pickle", set()),
        ("tensorflow", set()),
        ("torch", set()),
        ("transformers", set()),
    ],
)
def test_one_importer(module, allowed):
    found = {
        str(file.relative_to(PACKAGE))
        for file in IN_PACKAGE
        if any(name.split(".")[0] == module for name in imports(file))
    }
    assert found == allowed


def test_no_pickle_and_no_eval():
    for file in FILES:
        calls = [n.func for n in ast.walk(TREES[file]) if isinstance(n, ast.Call)]
        called = {c.id for c in calls if isinstance(c, ast.Name)}
        assert not called & {"eval", "exec", "compile", "__import__"}, file
        assert "pickle" not in file.read_text(), file


def test_no_exception_is_swallowed():
    """What catches every exception raises again, and nothing is caught without saying what."""
    for file in FILES:
        for node in ast.walk(TREES[file]):
            if not isinstance(node, ast.ExceptHandler):
                continue
            where = f"{file}:{node.lineno}"
            assert node.type is not None, f"{where}: bare except"
            if isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"):
                assert any(isinstance(inner, ast.Raise) for inner in ast.walk(node)), where


def test_nothing_is_left_to_do():
    for file in FILES:
        text = file.read_text()
        assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text), file


def test_files_stay_small():
    long = {str(f): n for f in FILES if (n := len(f.read_text().splitlines())) > 400}
    assert not long


def test_the_lock_is_of_these_requirements():
    """`uv lock` writes uv.lock again where setup.cfg changed."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lists = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    required = {
        re.split(r"[\[<>=;!~ ]", line)[0].lower().replace("_", "-")
        for text in lists
        for line in text.split("\n")
        if line.strip()
    }
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    [ours] = [package for package in packages if package["name"] == "qkvjax"]
    assert {entry["name"] for entry in ours["metadata"]["requires-dist"]} == required


def test_requirements_are_what_is_imported():
    """Every third-party module that the package imports is a requirement or an extra."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    required = parser["options"]["install_requires"].split("\n")
    for extra in parser["options.extras_require"].values():
        required += extra.split("\n")
    named = {re.split(r"[\[<>=; ]", line.strip())[0].lower().replace("_", "-") for line in required}
    # absl: of ml-collections; scipy: of jax; pyarrow: of tensorflow-datasets.
    named |= {"absl-py", "scipy", "pyarrow"}
    providers = importlib.metadata.packages_distributions()
    for file in FILES:
        for name in {name.split(".")[0] for name in imports(file)}:
            if name == "qkvjax" or name in sys.stdlib_module_names:
                continue
            offered = {d.lower().replace("_", "-") for d in providers.get(name, [name])}
            assert offered & named, f"{file} imports {name}"


def test_no_merge_left_its_marks():
    """In code, pages, scripts and notebooks alike."""
    folders = ("qkvjax", "configs", "tests", "docs", "launch", "benchmarks", "notebooks")
    suffixes = {".py", ".md", ".sh", ".sbatch", ".yaml", ".ipynb", ".cfg", ".toml"}
    files = [*ROOT.glob("*"), *(file for name in folders for file in (ROOT / name).rglob("*"))]
    marks = re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)
    for file in files:
        if file.is_file() and file.suffix in suffixes:
            assert not marks.search(file.read_text(errors="replace")), file
