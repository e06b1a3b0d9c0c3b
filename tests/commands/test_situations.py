"""Where people run the commands: without a home folder, in an ASCII locale, in a SLURM shell."""

import os
import pwd

import pytest

from qkvjax.data import store
from qkvjax.errors import UserError
from qkvjax.parallel import host

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def homeless(monkeypatch):
    """A process of a user whom the system does not know, without HOME."""

    def unknown(*args):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("QKVJAX_DATA_DIR", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


def test_no_home(homeless, run_command, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    host.keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert run_command("plan", "--config=configs/lm.py:depth=2").code == 0
    with pytest.raises(UserError, match="there is none .HOME is unset.*set QKVJAX_DATA_DIR"):
        store.data_folder()
    result = run_command("train", "--config=configs/lm.py:depth=2", f"--workdir={tmp_path / 'run'}")
    assert result.code == 2 and "set QKVJAX_DATA_DIR" in result.err
    result = run_command(
        "train",
        "--config=configs/paper/vision.py",
        "--config.data.source=tfds:mnist",
        f"--workdir={tmp_path / 'run'}",
    )
    assert result.code == 2 and "set TFDS_DATA_DIR" in result.err
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path))
    assert store.data_folder() == tmp_path


def test_an_ascii_locale(process, untied, tmp_path):
    """Neither what is read nor what is printed is ASCII."""
    environment = {k: v for k, v in os.environ.items() if k not in ("LANG", "PYTHONIOENCODING")}
    command = (
        "-m",
        "qkvjax",
        "generate",
        f"--workdir={untied}",
        "--prompt=caf\u00e9",
        "--max_tokens=3",
    )
    result = process(*command, env=environment | ASCII, encoding="utf-8")
    assert result.code == 0, result.err
    assert "caf?" in result.out  # the terminal has no é


def test_a_tokenizer_is_written_in_any_locale(process, tmp_path):
    gguf_file = pytest.importorskip("gguf_file")
    pytest.importorskip("gguf")
    gguf_file.write(tmp_path / "a.gguf")
    command = ("-m", "qkvjax", "convert", "import", f"--source={tmp_path}/a.gguf")
    result = process(*command, f"--workdir={tmp_path}/run", env=os.environ | ASCII)
    assert result.code == 0, result.err
    assert "\u0120the" in (tmp_path / "run" / "tokenizer.json").read_text(encoding="utf-8")


def test_a_shell_of_slurm_says_for_whom_it_waits(process, recipe, tmp_path):
    """Its variables are those of a step of four tasks, and nobody started the others."""
    variables = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    command = ("-m", "qkvjax", "train", f"--config={recipe}", f"--workdir={tmp_path}/run")
    result = process(*command, "--init_seconds=5", env=os.environ | variables)
    assert result.code == 2
    first = result.err.splitlines()[0]
    assert "process 0 of 4 waits at localhost:" in first and "processes 1, 2, 3" in first
    assert "SLURM job 77 say 4 tasks" in first and "--num_processes=1" in first
