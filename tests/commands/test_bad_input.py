"""What a user types wrongly: code 2, one readable message with the remedy, nothing overwritten."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from qkvjax.workdir import only_one, open_workdir


def refused(result, message):
    """Asserts that a command refused its input, with this in its only message."""
    assert result.code == 2, (result.code, result.out[-300:])
    assert result.err.startswith("error: ") and result.err.count("error: ") == 1
    assert "Traceback" not in result.err + result.out
    assert re.search(message, result.err), result.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["model.sharing=q=k"], "not a partition of q, k and v.*use one of q-k-v, q-k=v"),
        (["model.sharing=k-q-v"], "is written 'q-k-v'"),
        (["model.sharing=q,k,v"], "not a partition"),
        (["model.num_heads=3"], "num_heads=3 does not divide d_model=16: change one of them"),
        (["model.num_heads=0"], "num_heads=0 must be at least 1"),
        (["model.num_kv_heads=1", "model.sharing=q=k-v"], "must equal num_heads=2"),
        (["model.rotary_values=rotated"], "use rotary_values='raw'"),
        (["model.position=rop"], "did you mean 'rope'"),
        (["model.d_model=0"], "d_model=0 must be at least 1"),
        (["model.num_layers=-1"], "num_layers=-1 must be at least 1"),
        (["model.mlp_ratio=nan"], "model.mlp_ratio=nan"),
        (["model.dropout=1"], r"must be in \[0, 1\)"),
        (["model.kind=rnn"], "is not one of lm, encoder, vit"),
        (["model.layer_overrides=3"], "is not a tuple of dicts"),
        (["model.layer_overrides=({'num_heads': 'x'},)"], "num_heads='x' is not of type int"),
        (["seed=-1"], "seed=-1 must be at least 0"),
        (["seed=99999999999999999999"], "below 2147483648"),
        (["data.source=text:nowhere"], "nothing is at /.*nowhere: check the path"),
        (["data.source=txt:nowhere"], "did you mean 'text'"),
        (["data.tokenizer=words"], "is not one of bytes, bpe:PATH, gpt2:PATH"),
        (["data.seq_len=0"], "data.seq_len=0 must be at least 1"),
        (["data.seq_len=100000"], "use more text or a smaller data.seq_len"),
        (["data.batch_size=3", "train.accumulation=2"], "choose a divisor"),
        (["optimizer.learning_rate=0"], "learning_rate=0"),
        (["optimizer.learning_rate=inf"], "learning_rate=inf"),
        (["optimizer.b2=1.5"], "optimizer.b2=1.5 must be at least 0 and below 1"),
        (["optimizer.clip_norm=-1"], "optimizer.clip_norm=-1"),
        (["optimizer.schedule=linear"], "is not one of cosine, wsd, multistep, constant"),
        (["train.steps=ten"], 'write steps \\(300\\), "2ep"'),
        (["train.steps=5%"], "a percentage of train.steps"),
        (["train.steps=0"], "nothing to train"),
        (["train.steps=" + "9" * 400], "fewer than 2\\^31"),
        (["train.log_every=2 years"], "train.log_every='2 years' is not a duration"),
        (["train.compute_dtype=float16"], "did you mean 'bfloat16'"),
        (["train.max_seconds=-1"], "train.max_seconds=-1"),
        (["train.keep_checkpoints=0"], "keep_checkpoints=0 must be at least 1"),
        (["mesh.fsdp=3"], "needs a multiple of 3 devices, jax has 1"),
        (["mesh.fsdp=0"], "sizes must be at least 1"),
        (["evals.eval.split=test"], "'test' is not one of train, validation"),
        (["evals.eval.kind=bits_per_bite"], "did you mean 'bits_per_byte'"),
        (["evals.eval.max_labels=0"], "max_labels=0 must be at least 1"),
    ],
)
def test_train_refuses(run_command, recipe, tmp_path, flags, message):
    workdir = tmp_path / "run"
    overrides = [f"--config.{flag}" for flag in flags]
    refused(run_command("train", f"--config={recipe}", f"--workdir={workdir}", *overrides), message)
    assert not workdir.exists() or not list(workdir.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "holds no text: all its documents are empty"),
        (b"too short", "train split 8 tokens.*use more text or a smaller data.seq_len"),
        (b"x" * 100, "leaves the validation split 10 tokens, less than one row of data.seq_len"),
    ],
)
def test_too_little_text(run_command, recipe, tmp_path, text, message):
    book, workdir = tmp_path / "book.txt", tmp_path / "run"
    book.write_bytes(text)
    flags = [f"--config={recipe}", f"--config.data.source=text:{book}", f"--workdir={workdir}"]
    refused(run_command("train", *flags), message)
    assert not workdir.exists()


def test_an_unwritable_workdir(run_command, recipe, grid_flags, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for name, flags in (("train", [f"--config={recipe}"]), ("study", grid_flags)):
        result = run_command(name, *flags, f"--workdir={file}/below")
        refused(result, "cannot be written .*: choose another with --workdir")
        refused(run_command(name, *flags), "--workdir=DIR is missing")
    assert file.read_text() == "mine"


@pytest.fixture
def grid_flags(tmp_path, recipe):
    path = tmp_path / "grid.py"
    path.write_text(
        recipe.read_text().replace(
            "return config", 'config.study = {"points": ({}, {"label": "b"})}\n    return config'
        )
    )
    return [f"--config={path}"]


def test_a_workdir_is_opened_by_many_at_once(tmp_path):
    """The processes of a study start together in one folder."""
    with ThreadPoolExecutor(8) as pool:
        opened = set(pool.map(open_workdir, [str(tmp_path / "study")] * 400))
    assert opened == {tmp_path / "study"} and not list((tmp_path / "study").iterdir())


def test_an_unwritable_evaluation(run_command, tied, copy):
    workdir = copy(tied)
    (workdir / "evaluation.jsonl").mkdir()
    refused(run_command("evaluate", f"--workdir={workdir}"), "evaluation.jsonl cannot be written")


@pytest.mark.parametrize("name", ["evaluate", "generate"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing: is this the workdir of a training run?"),
        (b"", "is not JSON .*: restore it from a copy"),
        (b'{"model": {', "is not JSON .*: restore it from a copy"),
        (b"\xff\xfe{}", "is not JSON .*: restore it from a copy"),
        (b"[1, 2]", "is not a JSON object: restore it from a copy"),
        (b'{"model": 3}', "config.model=3 is not a group"),
        (b'{"evals": {"eval": 3}}', "config.evals.eval=3 is not an evaluator"),
        (b'{"model": {"sharng": "q-k-v"}}', "did you mean 'model.sharing'"),
        (b'{"model": {"d_model": "wide"}}', "config.model.d_model='wide' is not of type int"),
        (b'{"model": {"d_model": null}}', "config.model.d_model cannot be unset"),
        (b'{"data": {"seq_len": 0}}', "seq_len=0 must be at least 1"),
        (b"{}", "has float32 .* where the model has float32 .*saved by another configuration"),
    ],
)
def test_a_corrupt_config(run_command, tied, copy, checksums, name, content, message):
    workdir = copy(tied)
    (workdir / "config.json").unlink()
    if content is not None:
        (workdir / "config.json").write_bytes(content)
    before = checksums(workdir)
    refused(run_command(name, f"--workdir={workdir}"), message)
    assert checksums(workdir) == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "config.json is not JSON .*: restore it from a copy"),
        ("run.json", b"{", "run.json is not JSON .*: restore it from a copy, or delete it"),
        ("run.json", b"[]", "run.json is not a JSON object"),
        ("metrics.jsonl", b'{"step": 5}\nno\n{"step": 9}\n', "line 2, is not a JSON object"),
        ("metrics.jsonl", b"\xff\xff\n3\n", "metrics.jsonl, line 1, is not a JSON"),
    ],
)
def test_a_corrupt_workdir(run_command, tied, tied_flags, copy, checksums, file, content, message):
    workdir = copy(tied)
    (workdir / file).write_bytes(content)
    before = checksums(workdir)
    refused(run_command("train", *tied_flags, f"--workdir={workdir}"), message)
    assert checksums(workdir) == before


def test_another_models_checkpoints(run_command, tied, untied, copy, checksums):
    """A config.json that was swapped: the message names the first parameter that differs."""
    workdir = copy(untied)
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["sharing"] = "q-k=v"
    (workdir / "config.json").write_text(json.dumps(config))
    before = checksums(workdir)
    result = run_command("evaluate", f"--workdir={workdir}")
    refused(
        result, r"has nothing for model.stack\S+gain where the model has .*another configuration"
    )
    assert checksums(workdir) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--workdir=DIR is missing"),
        (["--workdir=nowhere"], "there is no workdir nowhere: train a model first"),
        (["--workdir={tied}", "--step=3"], r"has no step 3; it has \[10, 20\]"),
        (["--workdir={tied}", "--step=last"], "--step=last"),
    ],
)
@pytest.mark.parametrize("name", ["evaluate", "generate"])
def test_which_checkpoint(run_command, tied, checksums, name, flags, message):
    before = checksums(tied)
    refused(run_command(name, *(flag.format(tied=tied) for flag in flags)), message)
    assert checksums(tied) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks=f1"], "no task 'f1': use bits_per_byte, accuracy"),
        (["--tasks=bits_per_bite"], "did you mean 'bits_per_byte'"),
        (["--tasks="], "no task ''"),
        (["--batch_size=0"], "--batch_size=0: 0 is not an integer in the range"),
        (["--batch_size=x"], "--batch_size=x"),
        (["--data=text:nowhere"], "nothing is at"),
        (["--data="], "data.source='' is unknown: use one of"),
        (["--data=text:{empty}"], "holds no text"),
    ],
)
def test_evaluate_refuses(run_command, tied, tmp_path, checksums, flags, message):
    (tmp_path / "empty.txt").touch()
    before = checksums(tied)
    flags = [flag.format(empty=tmp_path / "empty.txt") for flag in flags]
    refused(run_command("evaluate", f"--workdir={tied}", *flags), message)
    assert checksums(tied) == before


def test_a_workdir_without_checkpoints(run_command, untied, copy):
    import shutil

    workdir = copy(untied)
    shutil.rmtree(workdir / "checkpoints")
    refused(run_command("evaluate", f"--workdir={workdir}"), "holds no checkpoint: train first")
    refused(run_command("generate", f"--workdir={workdir}"), "holds no checkpoint: train first")


def test_the_message_of_a_process(process, recipe, tmp_path):
    """The same from a shell: one line on stderr, nothing else."""
    flags = [f"--config={recipe}", "--config.model.sharing=q", f"--workdir={tmp_path / 'run'}"]
    result = process("-m", "qkvjax", "train", *flags)
    assert result.code == 2 and result.err.startswith("error: ") and result.err.count("\n") == 1


# ---- files of ours that something else has changed, and processes that meet --------------------


def test_a_refused_run_leaves_its_configuration(run_command, tied, tied_flags, copy, checksums):
    workdir = copy(tied)
    metrics = workdir / "metrics.jsonl"
    metrics.write_text("no line\n" + metrics.read_text())
    before = checksums(workdir)
    result = run_command("train", *tied_flags, f"--workdir={workdir}", "--config.train.log_every=7")
    refused(result, "line 1, is not a JSON object")
    assert checksums(workdir) == before


def test_two_trainings_in_one_workdir(run_command, recipe, tmp_path):
    with only_one(tmp_path):
        result = run_command("train", f"--config={recipe}", f"--workdir={tmp_path}")
    refused(result, "another process is at work in")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"a": 1}\n', "line 1, has no 'step' of type int"),
        ("metrics.jsonl", '{"step": null}\n', "has no 'step' of type int"),
        ("run.json", '{"data": 3}', "has no 'data' of type dict"),
        ("run.json", '{"data": {"digest": null}}', "has no 'digest' of type str"),
        ("config.json", '{"data": null}', "config.data=None is not a group"),
        ("checkpoints/20/manifest/metadata", "[]", None),
        ("checkpoints/20/manifest/metadata", "null", None),
    ],
)
def test_damaged_files_of_a_run(run_command, tied, tied_flags, copy, name, content, message):
    workdir = copy(tied)
    (workdir / name).write_text(content)
    result = run_command("train", *tied_flags, f"--workdir={workdir}")
    if message:
        refused(result, message)
    else:
        assert result.code == 0 and "checkpoint 20 is damaged and passed over" in result.out


def test_checkpoints_that_are_no_folder(run_command, recipe, tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    refused(
        run_command("train", f"--config={recipe}", f"--workdir={tmp_path}"),
        "is not a folder: remove it",
    )


def test_a_diverged_training_is_code_44_and_saves_nothing(run_command, recipe, tmp_path):
    flags = [f"--config={recipe}", f"--workdir={tmp_path}"]
    flags += ["--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0"]
    result = run_command("train", *flags)
    assert result.code == 44 and "training diverged" in result.err and "Traceback" not in result.err
    assert "done:" not in result.out and not list((tmp_path / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_device_that_is_not_here(process, recipe, tmp_path, monkeypatch, platform):
    if platform == "cuda" and importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("this installation has CUDA")
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    result = process("-m", "qkvjax", "train", f"--config={recipe}", f"--workdir={tmp_path}")
    refused(result, f"JAX_PLATFORMS='{platform}'.*unset")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/lm.py", "--config=configs/quickstart.py"], "--config is given twice"),
        (["--config=configs/lm.py", "--config.model.score=(('a',),)"], "not a tuple of modifiers"),
        (["--config=configs/lm.py", "--config.model.score=({},)"], "not a tuple of modifiers"),
        (["--config=configs/lm.py", "--config.model.score[0]=1"], "index out of range"),
        (["--config=configs/lm.py", "--config.data.seq_len=" + "9" * 400], "seq_len"),
        (["--config=configs/lm.py", "--config.data.tokenizer=bpe:~nobody-here/x"], "in full"),
        (["--model=config.json", "--context=" + "9" * 400], "context"),
        (["--model=/dev/zero"], "is not a file"),
        (["--model=" + "x" * 5000], "too long"),
    ],
)
def test_plan_refuses(run_command, flags, message):
    refused(run_command("plan", *flags), message)


def test_prepared_data_that_is_damaged(run_command, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path / "data"))
    flags = [f"--config={recipe}", "--config.train.steps=1"]
    assert run_command("train", *flags, f"--workdir={tmp_path / 'first'}").code == 0
    (record,) = (tmp_path / "data").rglob("*train.array_record*")
    record.write_bytes(record.read_bytes()[: record.stat().st_size // 2])
    result = run_command("train", *flags, f"--workdir={tmp_path / 'second'}")
    refused(result, "the prepared data in .* is damaged .*: delete that folder")


def test_sizes_beyond_any_memory(run_command, tied):
    flags = [f"--workdir={tied}", "--prompt=the"]
    refused(
        run_command("generate", *flags, "--cache_length=2000000000"), "more than is free here|below"
    )
    refused(run_command("generate", *flags, "--max_tokens=" + "9" * 15), "below 2\\^31")


def test_output_that_nobody_can_take(process, tmp_path):
    plan = [sys.executable, "-m", "qkvjax", "plan", "--config=configs/lm.py"]
    closed = subprocess.run(["bash", "-c", f"{shlex.join(plan)} >&-"], capture_output=True)
    assert closed.returncode == 0 and b"Traceback" not in closed.stderr
    full = subprocess.run(["bash", "-c", f"{shlex.join(plan)} >/dev/full"], capture_output=True)
    assert full.returncode == 2 and b"No space left" in full.stderr
    assert b"Traceback" not in full.stderr
    result = process(
        "-m",
        "qkvjax",
        "plan",
        "--config=configs/lm.py",
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert result.code == 0 and "KiB" in result.out
