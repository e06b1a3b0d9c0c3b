"""Commands run as a user runs them, on a corpus and a model so small that a run takes seconds."""

import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
RECIPE = """
from qkvjax import config as base

def get_config(arg=None):
    given = base.parse_arg(arg, sharing="q-k-v")
    config = base.default()
    config.model.update(d_model=16, num_layers=1, num_heads=2, mlp_ratio=1.0, sharing=given.sharing)
    config.data.update(source="text:{corpus}", seq_len=16, batch_size=4)
    config.optimizer.update(learning_rate=1e-2, final_learning_rate=1e-3)
    config.train.update(steps=20, log_every=5, eval_every=10, checkpoint_every=10)
    return config
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def run_in_process(command, *args):
    """Runs a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = importlib.import_module(f"qkvjax.commands.{command}").main(
            [f"qkvjax {command}", *args]
        )
    return Result(code, out.getvalue(), err.getvalue())


def run_process(*args, **options):
    """Runs python with these arguments, in the folder above the tests."""
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, **options)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Where data, compiled programs and trained runs of this folder's tests are kept."""
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module", autouse=True)
def surroundings(folders, programs_kept_in):
    """Data folder and import path of these tests and of their processes, and a cache of compiled
    programs: most runs compile the same few."""
    patch = pytest.MonkeyPatch()
    cache = str(folders / "compiled")
    patch.setenv("QKVJAX_DATA_DIR", str(folders / "data"))
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    patch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    with programs_kept_in(cache):
        yield
    patch.undo()


@pytest.fixture(scope="session")
def corpus(folders):
    """40 documents of a few sentences that a tiny model learns quickly."""
    folder = folders / "corpus"
    folder.mkdir()
    for i in range(40):
        sentence = f"the cat number {i} sat on the mat and then the dog ran home. "
        (folder / f"{i:02d}.txt").write_text(sentence * (i % 5 + 1))
    return folder


@pytest.fixture(scope="session")
def recipe(folders, corpus):
    """A config file; takes sharing= behind the colon."""
    path = folders / "tiny.py"
    path.write_text(RECIPE.replace("{corpus}", str(corpus)))
    return path


@pytest.fixture(scope="session")
def run_command():
    return run_in_process


@pytest.fixture(scope="session")
def process():
    return run_process


@pytest.fixture(scope="session")
def tied_flags(recipe):
    """A run with everything that resuming must bring back: dropout, accumulation, moments."""
    return (
        f"--config={recipe}:sharing=q-k=v",
        "--config.model.dropout=0.1",
        "--config.train.accumulation=2",
        "--config.optimizer.schedule=wsd",
    )


@pytest.fixture(scope="session")
def kept(folders):
    """Makes each trained run once: kept("name", flags) -> its workdir.

    Once for modules that are compiled quickly and once for the others: the bits differ.
    """

    def make(name, *flags):
        quickly = jax.config.read("jax_disable_most_optimizations")
        workdir = folders / f"{name}-{quickly}"
        if not workdir.exists():
            result = run_in_process("train", *flags, f"--workdir={workdir}")
            assert result.code == 0, result.err
            (workdir / "stdout.log").write_text(result.out)
        return workdir

    return make


@pytest.fixture
def tied(kept, tied_flags):
    """The workdir of 20 steps of q-k=v. Tests that change it take a `copy`."""
    return kept("tied", *tied_flags)


@pytest.fixture
def untied(kept, recipe):
    """The workdir of 2 steps of q-k-v."""
    return kept("untied", f"--config={recipe}", "--config.train.steps=2")


@pytest.fixture
def copy(tmp_path):
    """Copies a workdir to where it may be changed."""
    return lambda workdir, name="copy": Path(shutil.copytree(workdir, tmp_path / name))


@pytest.fixture(scope="session")
def checksums():
    """The content of every file below a folder, as {relative path: sha256}."""

    def of(folder):
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    return of


@pytest.fixture(scope="session")
def lines():
    """The objects of a JSONL file, each line read strictly."""
    return lambda path: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def damage():
    """Flips a bit in every KiB of the larger array files of a checkpoint."""

    def flip(checkpoint):
        files = [f for f in (checkpoint / "state").rglob("d/*") if f.stat().st_size > 4096]
        for file in files:
            content = bytearray(file.read_bytes())
            for i in range(512, len(content), 1024):
                content[i] ^= 16
            file.write_bytes(content)
        assert files

    return flip
