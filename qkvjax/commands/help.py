"""What `qkvjax COMMAND --help` prints."""

from __future__ import annotations

import textwrap

from absl import flags

HELP_WIDTH = 100


def help_text(doc: str, values: flags.FlagValues, with_config: bool, with_fields: bool) -> str:
    """The command's docstring and its flags, and every field of the config or where they are
    listed; no line is longer than HELP_WIDTH."""
    lines = [doc.strip(), "", "flags:"]
    if with_config:
        lines += _entry("--config", "a recipe, PATH or PATH:ARG")
        lines += _entry("--config.FIELD", "another value of one field; --flagfile=FILE reads flags")
    for name in values:
        flag = values[name]
        default = flag.default if not isinstance(flag.default, list) else ",".join(flag.default)
        shown = "" if default in (None, "") else f" (default {default})"
        text = " ".join(flag.help.split()).partition("; repeat this option")[0]
        lines += _entry(f"--{name}", text + shown)
    if with_fields:
        lines += _fields_help()
    elif with_config:
        lines += ["", "`qkvjax train --help` lists the fields of a config."]
    return "\n".join(lines)


def _fields_help() -> list[str]:
    """Every field of the config, by group, with its default."""
    from qkvjax.config import EVALUATOR_FIELDS, FIELDS

    lines = ["", "fields of a config (the default is the recipes' starting point):"]
    previous = None
    for name, field in FIELDS.items():
        group = name.rpartition(".")[0]
        if group != previous:
            lines += ["", f"{group or 'of the whole run'}:"]
            previous = group
        lines += _entry(f"--config.{name}", f"{field.help} (default {_as_written(field.default)})")
    lines += ["", "evals, which run while training:"]
    for name, field in EVALUATOR_FIELDS.items():
        lines += _entry(f"--config.evals.NAME.{name}", f"{field.help} (default {field.default})")
    return [*lines, "", 'a duration is steps (300), "2ep", "10M tokens" or "5%" of the run']


def _as_written(value: object) -> object:
    """Returns a value as --help shows it: tuples as lists."""
    return list(value) if isinstance(value, tuple) else value


def _entry(name: str, text: str) -> list[str]:
    """A flag and what it is, the text in a column of its own."""
    column = 32
    hanging = " " * column
    start = f"  {name:<{column - 3}} "
    wrapped = textwrap.wrap(
        text,
        HELP_WIDTH,
        initial_indent=start,
        subsequent_indent=hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapped or [start.rstrip()]
