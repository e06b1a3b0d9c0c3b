"""The commands of the pages have flags, fields and recipes that are there."""

import re
import runpy

import pytest
from site_pages import PAGES, ROOT, commands, generator, name_of, shlex_lines

from qkvjax.commands import cli
from qkvjax.config import default, flatten, to_dict

FIELDS = set(flatten(to_dict(default())))
OPEN_GROUPS = ("evals.", "study.")  # a recipe names their entries
# What stands for something of the reader's: `--config=...`, `--workdir=W`.
PLACEHOLDER = re.compile(r"\.\.\.|FILE\.py|my_\w+\.py")


@pytest.fixture(scope="module")
def flags():
    """Command -> the flags that its --help lists."""
    return {
        name: set(re.findall(r"^  --([\w.]+)", generator().help_of(name), re.MULTILINE))
        for name in generator().commands()
    }


def problems(words, flags):
    """What is wrong with one command."""
    name, *arguments = words
    if name not in flags:
        yield f"{name} is not a command"
        return
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        flag, _, value = argument[2:].partition("=")
        if flag == "config":
            yield from recipe_problems(value)
        elif flag.startswith("config."):
            field = flag.removeprefix("config.")
            if field not in FIELDS and not field.startswith(OPEN_GROUPS) and field != "FIELD":
                yield f"{field} is not a field of the configuration"
        elif flag not in flags[name] | {"help"}:
            yield f"{name} has no flag --{flag}"


def recipe_problems(value):
    path, _, argument = value.partition(":")
    if PLACEHOLDER.search(path):
        return
    if not (ROOT / path).is_file():
        yield f"there is no recipe {path}"
        return
    try:
        runpy.run_path(str(ROOT / path))["get_config"](argument or None)
    except Exception as error:  # noqa: BLE001
        yield f"{value}: {error}"


WITH_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_commands_of_the_page_are_real(page, flags):
    wrong = {" ".join(words): list(problems(words, flags)) for words in commands(page)}
    assert {command: found for command, found in wrong.items() if found} == {}


def test_pages_name_every_command(flags):
    named = {words[0] for page in WITH_COMMANDS for words in commands(page)}
    assert named >= set(flags)


def test_a_wrong_command_is_noticed(flags):
    text = (
        "qkvjax train --config=configs/nowhere.py\n"
        "qkvjax study --config=configs/lm.py:deep=2 \\\n    --nothing --config.model.dmodel=3\n"
        "qkvjax dream\n"
    )
    found = [list(problems(words[1:], flags)) for words in shlex_lines(text)]
    assert [len(one) for one in found] == [1, 3, 1]


def test_every_field_and_command_is_on_its_generated_page():
    generated = generator().generated_pages()
    configuration = generated["reference/configuration.md"]
    shown = set(re.findall(r"^\| `([\w.]+)` \|", configuration, re.MULTILINE))
    evaluators = {field for field in FIELDS if field.startswith("evals.")}
    assert shown >= FIELDS - evaluators
    sections = re.findall(r"^## (\w+)$", generated["reference/commands.md"], re.MULTILINE)
    listed = cli.COMMANDS
    assert set(sections) == set(listed)


def test_every_recipe_is_on_its_generated_page():
    page = generator().generated_pages()["reference/recipes.md"]
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("[!_]*.py")}
    assert set(re.findall(r"^## `(.+)`$", page, re.MULTILINE)) == recipes
