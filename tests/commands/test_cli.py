"""`qkvjax COMMAND`: help, unknown commands and flags, readers that leave."""

import importlib
import io
import os
import re
import subprocess
import sys

import pytest

from qkvjax import config as configs
from qkvjax.commands import cli
from qkvjax.errors import UserError

COMMANDS = sorted(cli.COMMANDS)


def flags_of(command):
    """The flags that a command defines."""
    return list(importlib.import_module(f"qkvjax.commands.{command}").FLAGS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_lists_every_flag(capsys, command, word):
    assert cli.main(["qkvjax", command, word]) == 0
    result = capsys.readouterr()
    assert not result.err
    for flag in flags_of(command):
        assert re.search(rf"^  --{flag}\s+\S", result.out, re.MULTILINE), flag
    assert f"qkvjax {command}" in result.out  # an example


def test_help_of_train_lists_every_field_with_its_default(capsys):
    assert cli.main(["qkvjax", "train", "--help"]) == 0
    result = capsys.readouterr().out
    words = " ".join(result.split())
    defaults = configs.flatten(configs.to_dict(configs.default()))
    for name, field in configs.FIELDS.items():
        assert f"--config.{name} {' '.join(field.help.split())} (default {defaults[name]})" in words
    groups = [line for line in result.splitlines() if re.fullmatch("[a-z]+:", line)]
    assert groups == ["flags:", "model:", "data:", "optimizer:", "train:", "mesh:"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal(capsys, command):
    assert cli.main(["qkvjax", command, "--help"]) == 0
    result = capsys.readouterr().out
    assert max(map(len, result.splitlines())) <= 100
    if command in ("study", "plan", "bench"):
        assert "`qkvjax train --help` lists the fields" in result and "--config.seed" not in result


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_version(capsys, word):
    assert cli.main(["qkvjax", word]) == 0
    assert re.match(r"qkvjax \S+.*, jax [0-9.]+, Python \d+\.\d+", capsys.readouterr().out)


def test_the_package_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "qkvjax", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("qkvjax "), done.stderr


def test_help_wins_over_everything_else(capsys):
    assert cli.main(["qkvjax", "train", "--config=nowhere.py", "--bogus", "--help"]) == 0
    assert "flags:" in capsys.readouterr().out


def test_without_a_door(capsys):
    assert cli.main(["qkvjax"]) == 2
    result = capsys.readouterr()
    assert not result.out and all(command in result.err for command in COMMANDS)
    assert cli.main(["qkvjax", "--help"]) == 0
    result = capsys.readouterr()
    assert not result.err and all(command in result.out for command in COMMANDS)


def test_an_unknown_door(capsys):
    assert cli.main(["qkvjax", "tran", "--help"]) == 2
    result = capsys.readouterr()
    assert not result.out and "did you mean 'train'?" in result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag(command, recipe, capsys):
    module = importlib.import_module(f"qkvjax.commands.{command}")
    config = [f"--config={recipe}"] if command in ("train", "study", "plan", "bench") else []
    config = ["import"] if command == "convert" else config
    assert module.main([f"qkvjax {command}", *config, "--workdri=x"]) == 2
    result = capsys.readouterr()
    assert (
        result.err == "error: unknown flag --workdri; did you mean 'workdir'?; --help lists them\n"
    )
    assert module.main([*config, "--workdir"]) == 2
    assert "Missing value for flag --workdir" in capsys.readouterr().err
    assert module.main([f"qkvjax {command}", *config, "stray"]) == 2
    assert "'stray' is not a flag" in capsys.readouterr().err


def run(body, *args, config=None):
    return cli.run(["command", *args], "Doc.", {}, body, config=config)


def test_what_a_body_raises(capsys):
    def user_error(values):
        raise UserError("do this instead", code=44)

    def interrupt(values):
        raise KeyboardInterrupt

    def bug(values):
        raise ZeroDivisionError

    assert run(user_error) == 44 and capsys.readouterr().err == "error: do this instead\n"
    assert run(interrupt) == 130 and capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):
        run(bug)
    assert run(lambda values: None) == run(lambda values: 0) == 0
    assert run(lambda values: 43) == 43


def test_config_with_a_space_and_overrides(recipe):
    seen = []
    code = run(
        lambda values: seen.append(values.config),
        "--config",
        f"{recipe}:sharing=q=k=v",
        "--config.train.steps=2ep",
        "--config.model.qk_norm=false",
        "--config.model.window=5",
        config="required",
    )
    assert code == 0
    (config,) = seen
    assert config.model.sharing == "q=k=v" and config.train.steps == "2ep"
    assert config.model.qk_norm is False and config.model.window == 5


def test_recipes_are_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.find_config("configs/lm.py").endswith("configs/lm.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "lm.py").write_text("")
    assert cli.find_config("configs/lm.py") == "configs/lm.py"  # the nearer one
    for name in ("configs/ln.py", "lm.py", "lm"):
        with pytest.raises(UserError, match="did you mean 'configs/lm.py'.*configs/quickstart.py"):
            cli.find_config(name)


def test_a_recipe_with_a_bug_keeps_its_traceback(tmp_path):
    recipe = tmp_path / "broken.py"
    recipe.write_text("def get_config(arg=None):\n    return 1 / 0\n")
    with pytest.raises(Exception, match="division by zero"):
        run(lambda values: None, f"--config={recipe}", config="required")


@pytest.mark.parametrize(
    ("arguments", "flags", "message"),
    [
        ("size=1b", [], "size='1b' is none of 30m, 124m.*did you mean '1.2b'"),
        ("depht=2", [], "no argument 'depht'.*did you mean 'depth'"),
        ("depth", [], "no argument 'depth': write NAME=VALUE"),
        ("depth=two", [], "depth='two' is not of type int"),
        ("depth=-1", [], "depth=-1 must be at least 1"),
        ("depth=2,size=30m", [], "give depth or size, not both"),
        ("recipe=old", [], "recipe='old' is none of modern, paper"),
        ("", ["--config.model.sharng=q"], "no field 'model.sharng'; did you mean 'model.sharing'"),
        ("", ["--config.modle.sharing=q"], "'modle.sharing'; did you mean 'model.sharing'"),
        ("", ["--config.evals.eval.max_labls=3"], "did you mean 'evals.eval.max_labels'"),
        ("", ["--config.data.seq_len=long"], "--config.data.seq_len=long: give a whole number$"),
        ("", ["--config.data.seq_len=1.5"], "--config.data.seq_len=1.5"),
        ("", ["--config.model=3"], "--config.model=3"),
        ("", ["--config.model.qk_norm=maybe"], "--config.model.qk_norm=maybe"),
    ],
)
def test_recipe_arguments_and_overrides(capsys, arguments, flags, message):
    colon = ":" if arguments else ""
    code = run(
        lambda values: None, f"--config=configs/lm.py{colon}{arguments}", *flags, config="required"
    )
    result = capsys.readouterr().err
    assert code == 2 and result.count("\n") == 1 and re.match(f"error: .*{message}", result), result


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.lr=1"], "no field 'lr'; did you mean 'optimizer.learning_rate'"),
        (["--config.optimizer.lr=1"], "did you mean 'optimizer.learning_rate'"),
        (["--config.learning_rate=1"], "did you mean 'optimizer.learning_rate'"),
        (["--config.train.batch_size=1"], "did you mean 'data.batch_size'"),
        (["--config.model.n_layer=1"], "did you mean 'model.num_layers'"),
        (["--config.model.num_key_value_heads=1"], "did you mean 'model.num_kv_heads'"),
        (["--config.train.max_steps=1"], "did you mean 'train.steps'"),
        (["--config.optimizer.beta2=1"], "did you mean 'optimizer.b2'"),
        (["--lr=1"], "unknown flag --lr; did you mean '--config.optimizer.learning_rate'"),
        (["--batch_size=1"], "did you mean '--config.data.batch_size'"),
        (["--config.model.d_model=None"], "config.model.d_model cannot be unset: its default"),
        (["--config.model.num_kv_heads=all"], "=all: give a whole number, or None for no value"),
        (["--config.optimizer.b1=x"], "=x: give a number$"),
        (["--config.optimizer=adamw"], "is a group; set one of its fields.*optimizer.name=VALUE"),
        (["--config.model.sharing=k=v"], "did you mean 'q-k=v'"),
        (["--config.model.sharing=Q_K=V"], "did you mean 'q-k=v'"),
        (["--config.model.sharing=q=k"], "did you mean 'q=k-v'"),
        (["--config.model.sharing=q-kv"], "did you mean 'q-k=v'"),
        (["--config.model.sharing=mqa"], "one key-value head is model.num_kv_heads=1"),
        (["--config.model.sharing=(Q=K-V)+"], "model.score="),
        (["--flagfile=nowhere.txt"], "nowhere.txt.*check --flagfile"),
    ],
)
def test_names_from_elsewhere(capsys, flags, message):
    def body(values):
        configs.resolve(values.config)

    code = run(body, "--config=configs/lm.py:depth=2", *flags, config="required")
    result = capsys.readouterr().err
    assert code == 2 and re.search(message, result), result


def test_a_recipe_argument_that_is_a_field(capsys):
    assert run(lambda values: None, "--config=configs/lm.py:lr=1", config="required") == 2
    assert "--config.optimizer.learning_rate=VALUE sets that field" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["QKV", "qkv", "Q-K-V", " q - k - v "])
@pytest.mark.parametrize("place", ["argument", "override"])
def test_a_sharing_by_its_name_in_reports(written, place):
    arguments = (f"--config=configs/lm.py:depth=2,sharing={written}",)
    if place == "override":
        arguments = ("--config=configs/lm.py:sharing=q=k=v", f"--config.model.sharing={written}")
    seen = []
    assert run(lambda values: seen.append(values.config), *arguments, config="required") == 0
    assert seen[0].model.sharing == "q-k-v"


def test_what_has_no_value_is_unset():
    seen = []
    flags = (
        "--config=configs/lm.py:size=70b,num_kv_heads=None",
        "--config.model.num_kv_heads=None",
        "--config.train.wandb=None",
        "--config.train.eval_every=None",
        "--config.evals.eval.max_labels=None",
        "--config.model.position=none",
    )
    assert run(lambda values: seen.append(values.config), *flags, config="required") == 0
    (config,) = seen
    assert config.model.num_kv_heads is None and config.train.wandb is None
    assert config.train.eval_every is None and config.evals.eval.max_labels is None
    assert config.model.position == "none"
    seen.clear()
    flags += ("--config.model.num_kv_heads=4",)
    assert run(lambda values: seen.append(values.config), *flags, config="required") == 0
    assert seen[0].model.num_kv_heads == 4  # the last one counts
    table = {"step": (int, None, "which")}
    assert cli.run(["command", "--step=None"], "Doc.", table, lambda values: values.step) == 0


def test_flags_from_a_file(tmp_path):
    file = tmp_path / "flags.txt"
    file.write_text("# a run\n--config.model.sharing=Q-K=V\n--config.train.steps=7\n")
    seen = []
    note = lambda values: seen.append(values.config)  # noqa: E731
    config = "--config=configs/lm.py:depth=2"
    assert run(note, config, f"--flagfile={file}", config="required") == 0
    assert run(note, f"--flagfile={file}", config, config="required") == 0
    file.write_text(f"{config}\n" + file.read_text())
    assert run(note, f"--flagfile={file}", config="required") == 0
    for config in seen:
        assert config.train.steps == 7 and config.model.sharing == "q-k=v"


def test_config_is_needed_or_not(capsys):
    assert run(lambda values: None, config="required") == 2
    assert "--config=PATH[:ARG] is missing" in capsys.readouterr().err
    assert run(lambda values: None, "--config.seed=1", config="optional") == 2
    assert "need --config=PATH before them" in capsys.readouterr().err
    assert run(lambda values: None, config="optional") == 0


class Closed(io.StringIO):
    def fileno(self):
        return self.descriptor

    def write(self, text):
        raise BrokenPipeError


def test_a_reader_that_leaves_is_no_error(monkeypatch, tmp_path):
    closed = Closed()
    closed.descriptor = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    monkeypatch.setattr(sys, "stdout", closed)
    assert run(lambda values: print("line")) == 141
    assert cli.main(["qkvjax", "--help"]) == 141


@pytest.mark.parametrize("words", [["plan", "--config=configs/lm.py:size=124m"], ["plan", "-h"]])
def test_plan_into_a_closed_pipe(words):
    """What the shell does in `qkvjax plan ... | head -1`, with a reader that reads nothing."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qkvjax", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 141 and not err
