"""Every command of the README is run, made small by further flags, and its Python after them."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gguf_file
import pytest

from qkvjax.commands import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
HOW_TO = [
    (ROOT / "docs/how_to" / name).read_text() for name in ("export.md", "memory.md", "plan.md")
]


def commands_of(page):
    """The lines of a page's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


COMMANDS = commands_of(README)
OURS = [command for command in COMMANDS if command.startswith("qkvjax ")]
SMALL = {
    "train": [
        "--config.data.source=text:my_folder",
        "--config.train.steps=3",
        "--config.data.seq_len=16",
        "--config.data.batch_size=2",
        "--config.model.d_model=32",
        "--config.evals.eval.max_labels=200",
    ],
    "study": [
        "--config.train.steps=3",
        "--config.data.seq_len=16",
        "--config.data.batch_size=2",
        "--config.model.d_model=16",
        "--config.evals.eval.max_labels=200",
        "--config.evals.eval_train.max_labels=200",
        "--config.study.seeds=1",
        "--config.study.points=({'model.sharing': 'q-k-v'}, {'model.sharing': 'q-k=v'})",
    ],
    "generate": ["--max_tokens=5"],
    "evaluate": [],
    "convert": [],
    "plan": [],
    "analyze": ["--num_sequences=2"],
    "bench": [
        "--batches=2",
        "--contexts=16",
        "--config.data.batch_size=2",
        "--config.data.seq_len=16",
        "--config.model.d_model=32",
    ],
}


def test_the_readme_has_commands_of_every_door():
    assert {shlex.split(command)[1] for command in OURS} == set(cli.COMMANDS)
    others = [command for command in COMMANDS if command not in OURS]
    assert others == ["pip install -e ."]


def test_the_commands_in_order(tmp_path, monkeypatch, capfd):
    """One after another in one folder, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = "the quick brown fox jumps over the lazy dog. " * 40
    (tmp_path / "my_book.txt").write_text(words)
    (tmp_path / "my_folder").mkdir()
    for i in range(25):
        (tmp_path / "my_folder" / f"{i}.txt").write_text(f"{i} {words}")
    shape = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    gguf_file.write(tmp_path / "model.gguf")
    more = [command for page in HOW_TO for command in commands_of(page)]
    more = [command for command in more if command.startswith("qkvjax ") and "v5e" not in command]
    more = [command for command in more if command not in OURS]
    for command in [*OURS, *more, "qkvjax evaluate --workdir=runs/tied --verify"]:
        argv = shlex.split(command)
        argv += SMALL[argv[1]]
        if "--topology" in command:  # more devices than this process has
            argv += ["--config.model.d_model=32", "--config.data.seq_len=16"]
            code = subprocess.run([sys.executable, "-m", "qkvjax", *argv[1:]]).returncode
        else:
            code = cli.main(argv)
        assert code == 0, (command, capfd.readouterr().err)
    assert (tmp_path / "runs/quickstart/report.html").exists()
    assert "Q-K=V" in capfd.readouterr().out
    for page in (README, HOW_TO[0]):
        code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102
    assert "403072 512" in capfd.readouterr().out


def test_its_links_and_pictures_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


@pytest.mark.slow
def test_quickstart_from_a_clean_copy_twice(tmp_path):
    """It installs, trains, reports; started again from another folder it does nothing."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to copy")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    command = ["bash", str(clone / "launch/quickstart.sh"), *SMALL["study"]]
    for again in (False, True):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
            env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("qkvjax quickstart on")
        assert str(clone / "runs/quickstart/report.html") in done.stdout
        assert ("all 2 runs are finished" in done.stdout) == again
