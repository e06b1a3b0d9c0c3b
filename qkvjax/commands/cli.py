"""`qkvjax COMMAND`, and the one place where user errors become messages.

Every command is `main(argv) -> int` with its own FlagValues, so that one command can run another in
its process. `run` parses the flags, calls the command's body and turns a user's error into one
message and an exit code.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import flags

from qkvjax import kernels
from qkvjax.commands.help import help_text
from qkvjax.errors import UserError, did_you_mean
from qkvjax.parallel import host, xla_flags
from qkvjax.parallel.distributed import is_first

COMMANDS = {
    "train": "train one model, or go on where its workdir stopped",
    "study": "train every point of a grid and write the report",
    "evaluate": "score a checkpoint",
    "generate": "sample from one model, or several side by side",
    "convert": "bring in a model from elsewhere, or tie a trained one",
    "analyze": "look into the weights and the attention of trained models",
    "bench": "measure what every sharing costs, beside three projections",
    "plan": "what a model costs, yours or a published one, before anything is trained",
}
INTERRUPTED = 130
READER_LEFT = 141  # what the shell says of a program that SIGPIPE ended
# For commands that compute attention.
_CHOICE = ("auto", *kernels.IMPLEMENTATIONS)
ATTENTION = {"attention": (_CHOICE, "auto", "what computes it; auto: the fastest measured")}
STUDY_FIELDS = ("points", "settings", "seeds", "tuned", "reference", "prompt", "title")


def entry() -> None:
    """The `qkvjax` command."""
    sys.exit(main(sys.argv))


def for_a_reader(call: Callable[[], int]) -> int:
    """Returns call(), or READER_LEFT where stdout is closed early (`qkvjax plan | head`)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack “×” or “−”
    try:
        code = call()
        if sys.stdout is not None:  # closed by the shell's >&-
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_LEFT


def main(argv: Sequence[str]) -> int:
    """Runs the command that the first argument names; returns its exit code."""
    return for_a_reader(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    listed = "\n".join(f"  {name:10s}{what}" for name, what in COMMANDS.items())
    usage = (
        f"usage: qkvjax COMMAND --flags\n\n{listed}\n\n`qkvjax COMMAND --help` explains a command,"
        " `qkvjax --version` prints the version."
    )
    if len(argv) < 2:
        print(usage, file=sys.stderr)
        return 2
    if argv[1] in ("-h", "--help", "help"):
        print(usage)
        return 0
    if argv[1] in ("-V", "--version", "version"):
        print(version_text())
        return 0
    if argv[1] not in COMMANDS:
        near = did_you_mean(argv[1], COMMANDS)
        print(f"qkvjax: there is no command {argv[1]!r}{near}\n{usage}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"qkvjax.commands.{argv[1]}")
    return module.main([f"qkvjax {argv[1]}", *argv[2:]])


def version_text() -> str:
    """One line for bug reports: our version and revision, jax's, Python's."""
    commit = host.revision()
    at = f" ({commit})" if commit else ""
    python = ".".join(map(str, sys.version_info[:3]))
    return f"qkvjax {host.version()}{at}, jax {host.versions()['jax']}, Python {python}"


def run(
    argv: Sequence[str] | None,
    doc: str,
    table: Mapping[str, tuple],
    body: Callable[[flags.FlagValues], int | None],
    *,
    config: str | None = None,
    fields: bool = False,
) -> int:
    """Parses `argv`, runs `body(flag_values)` and returns the exit code.

    Args:
      argv: the program's name and its arguments; None means the process's own. A list that
        starts with a flag is taken to lack the name.
      doc: the command's docstring, shown by --help.
      table: the command's flags, as `define` takes them.
      body: does the work; returns None or 0 when done.
      config: "required" or "optional" where the command takes `--config` and its overrides.
      fields: --help lists every field of the config.
    """
    argv = list(sys.argv if argv is None else argv)
    if not argv or argv[0].startswith("-"):
        argv = ["qkvjax", *argv]
    return for_a_reader(lambda: _run(argv, doc, table, body, config, fields))


def define(values: flags.FlagValues, table: Mapping[str, tuple]) -> None:
    """Defines flags: name -> (type, default, help) or (type, default, help, least[, most]); a list
    is written with commas, a tuple by repeating the flag. Words for a type are the choice."""
    kinds = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
        list: flags.DEFINE_list,
        tuple: flags.DEFINE_multi_string,
    }
    for name, (kind, default, text, *bounds) in table.items():
        if isinstance(kind, tuple):
            flags.DEFINE_enum(name, default, kind, text, flag_values=values)
            continue
        bounds = dict(zip(("lower_bound", "upper_bound"), bounds))
        kinds[kind](name, default, text, flag_values=values, **bounds)


def _run(argv: list[str], doc: str, table, body, config: str | None, fields: bool) -> int:
    values = flags.FlagValues()
    try:
        define(values, table)
        if {"-h", "--help", "-help", "--helpfull"} & set(argv[1:]):
            print(help_text(doc, values, config is not None, fields))
            return 0
        _parse(values, argv, config)
        host.keep_programs()
        xla_flags.add()
        return body(values) or 0
    except UserError as error:
        if is_first() or not error.agreed:
            print(f"{error.label}: {error}", file=sys.stderr, flush=True)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print(
            f"error: {where}{error.strerror}; check the path, its permissions and the room there",
            file=sys.stderr,
            flush=True,
        )
        return 2


def _parse(values: flags.FlagValues, argv: list[str], config: str | None) -> None:
    try:
        argv = [argv[0], *values.read_flags_from_files(argv[1:], force_gnu=False)]
    except flags.Error as error:
        raise UserError(f"{error}: check --flagfile") from None
    argv, unset = _split_unset(_join_config(argv), values)
    recipes = [arg for arg in argv[1:] if arg.startswith("--config=")]
    if len(recipes) > 1:
        raise UserError("--config is given twice: name one recipe")
    recipe = next(iter(recipes), None)
    if config and recipe:
        from ml_collections import config_flags

        path, colon, recipe_arg = recipe[len("--config=") :].partition(":")
        argv.remove(recipe)  # overrides may stand before it, as in a --flagfile
        argv.insert(1, f"--config={find_config(path)}{colon}{recipe_arg}")
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    elif config == "required":
        raise UserError(
            "--config=PATH[:ARG] is missing, for example --config=configs/lm.py:depth=2"
        )
    elif any(arg.startswith("--config.") for arg in argv):
        raise UserError("overrides like --config.train.steps=100 need --config=PATH before them")
    try:
        rest = values(argv)[1:]
    except (UserError, flags.Error, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(_flag_message(error, values, argv)) from None
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag: write --name=value; --help lists them")
    if "config" in values and values.config is not None:
        from qkvjax.config import set_field

        for name in unset:
            set_field(values.config, name, None)
        set_field(values.config, "model.sharing", values.config.model.sharing)
        if "attention" in values and values["attention"].present:
            values.config.train.attention = values.attention


def _flag_message(error: Exception, values: flags.FlagValues, argv: Sequence[str]) -> str:
    """One line for what absl, ml_collections or a recipe found wrong with the flags."""
    text = str(error).strip()
    if isinstance(error, UserError):
        # ml_collections puts the recipe's traceback before the message.
        return text.rsplit("UserError: ", 1)[-1]
    if "Error whilst parsing config file" in text:
        raise error  # a recipe with a bug: its traceback is what helps
    if isinstance(error, flags.UnrecognizedFlagError):
        near = did_you_mean(error.flagname, list(values)) or _field_for(error.flagname, values)
        return f"unknown flag --{error.flagname}{near}; --help lists them"
    if bad := re.match(r"flag (--[\w.]+)=(.*): (invalid literal for int|could not convert)", text):
        kind = "a whole number" if "literal" in bad[3] else "a number"
        unset = ", or None for no value" if _may_be_unset(bad[1][2:], values, ask=True) else ""
        return f"{bad[1]}={bad[2]}: give {kind}{unset}"
    if bad := re.match(r"flag --config\.(\w+)=(.*): .*ConfigDict", text):
        return (
            f"--config.{bad[1]}={bad[2]}: {bad[1]} is a group; set one of its fields, as in"
            f" --config.{_first_field(bad[1])}=VALUE"
        )
    name = _unknown_override(text, argv)
    if name:
        near = _near(name)
        return f"config has no field {name!r}{near}; --help lists them"
    return text.splitlines()[0] if text else type(error).__name__


def _join_config(argv: list[str]) -> list[str]:
    """`--config PATH` as `--config=PATH`, so that one spelling is left."""
    args = iter(argv)
    return [f"--config={next(args, '')}" if arg in ("--config", "-config") else arg for arg in args]


def _unknown_override(error: str, argv: Sequence[str]) -> str | None:
    """The first override of a field that is not there; recipes have groups `evals`, `study`."""
    from qkvjax.config import FIELDS

    groups = {name.rpartition(".")[0] for name in FIELDS} | {"evals", "study"}
    missing = re.findall(r"'(\w+)\\?'", error)  # what ml_collections looked up in vain
    for arg in argv:
        if arg.startswith("--config."):
            name = arg[len("--config.") :].split("=")[0].split("[")[0]
            if name in FIELDS or name in groups:
                continue
            if not name.startswith(("evals.", "study.")) or set(missing) & set(name.split(".")):
                return name
    return None


def _split_unset(argv: list[str], values: flags.FlagValues) -> tuple[list[str], list[str]]:
    """(the other arguments, fields of the config that are to be unset).

    `--NAME=None` is what Python and other frameworks write where a flag or a field has no value; a
    flag without a default is then left out.

    Raises:
      UserError: a field that always has a value.
    """
    last = {arg.partition("=")[0]: i for i, arg in enumerate(argv)}
    kept, unset = [], []
    for i, arg in enumerate(argv):
        flag, equals, text = arg.partition("=")
        name = flag.lstrip("-")
        written = i and equals and flag.startswith("-") and text in ("None", "none", "null")
        if not written or not _may_be_unset(name, values):
            kept.append(arg)
        elif name.startswith("config.") and last[flag] == i:
            unset.append(name.removeprefix("config."))
    return kept, unset


def _first_field(group: str) -> str:
    from qkvjax.config import FIELDS

    return next((name for name in FIELDS if name.startswith(group + ".")), f"{group}.NAME.kind")


def _may_be_unset(flag: str, values: flags.FlagValues, ask: bool = False) -> bool:
    """Whether None unsets a flag; for others it may be a value, such as model.position=none.

    Raises:
      UserError: a number, which cannot be unset; not where this is only asked.
    """
    from qkvjax.config import FIELDS

    field = flag.removeprefix("config.")
    if field == flag:
        return flag in values and values[flag].default is None
    if field not in FIELDS:
        return field.startswith("evals.") and field.endswith(".max_labels")
    known = FIELDS[field]
    if known.kind in (bool, int, float) and not known.optional and not ask:
        raise UserError(f"config.{field} cannot be unset: its default is {known.default!r}")
    return known.optional


def _near(name: str) -> str:
    """What a name that is not a field may have been meant to be."""
    from qkvjax.config import EVALUATOR_FIELDS, FIELDS, near_field

    group = name.rpartition(".")[0]
    open_group = {"evals": EVALUATOR_FIELDS, "study": STUDY_FIELDS}.get(group.split(".")[0])
    if open_group is None:
        return near_field(name)
    fields = [*FIELDS, *(f"{group}.{field}" for field in open_group)]
    return did_you_mean(name, [field for field in fields if field != name])


def _field_for(flag: str, values: flags.FlagValues) -> str:
    """The override that was meant by a flag such as --lr, where the command takes a config."""
    from qkvjax.config import known_field

    name = flag.removeprefix("config.")
    field = known_field(name) if "config" in values else None
    return f"; did you mean '--config.{field}'?" if field else ""


def find_config(path: str) -> str:
    """A recipe's path: from the current folder, else among the installed recipes."""
    package = Path(__file__).parents[1]
    for place in (Path(path), package / path, package.parent / path):
        if place.is_file():
            return str(place)
    recipes = package / "configs"
    recipes = recipes if recipes.is_dir() else package.parent / "configs"
    known = sorted(f"configs/{p.relative_to(recipes)}" for p in recipes.rglob("[!_]*.py"))
    same = [name for name in known if Path(name).stem == Path(path).stem]
    near = f"; did you mean {same[0]!r}?" if same else did_you_mean(path, known)
    raise UserError(f"there is no recipe {path!r}{near}; those of qkvjax are: {', '.join(known)}")
