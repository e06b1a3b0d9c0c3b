"""`train`: what it leaves, how it goes on, what it refuses."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import qkvjax
from qkvjax import config as configs
from qkvjax.training.checkpoint import Checkpoints, digest
from qkvjax.training.run import prepare_run

SHARINGS = ("q-k-v", "q-k=v", "q=k-v", "q=v-k", "q=k=v")
TIMING = {"seconds", "tokens_per_second", "mfu"}


def state_digest(workdir, step):
    """A digest of the whole train state: parameters, both moments, counters."""
    run = prepare_run(configs.load(workdir / "config.json"), log=lambda line: None)
    checkpoints = Checkpoints(workdir / "checkpoints")
    with jax.set_mesh(run.mesh):
        state, found = checkpoints.restore(run.abstract, step)
    checkpoints.close()
    assert found == step and int(state.step) == step
    return digest(state)


def events(workdir):
    """{(tag, step): value} of the TensorBoard files, records read by hand."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in (workdir / "tensorboard").iterdir():
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def without_timing(records):
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records]


def test_what_is_left(tied, lines):
    names = {path.name for path in tied.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "tensorboard", "run.json"} <= names
    assert [p.name for p in sorted((tied / "checkpoints").iterdir())] == ["10", "20"]
    config = json.loads((tied / "config.json").read_text())
    assert config["model"]["sharing"] == "q-k=v" and config["train"]["accumulation"] == 2
    records = lines(tied / "metrics.jsonl")
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    for record in records:
        assert record["train/loss"] > 0 and record["tokens_per_second"] > 0
        assert record["tokens"] == record["step"] * 4 * 16
    evaluated = [record["step"] for record in records if "eval/bits_per_byte" in record]
    assert evaluated == [10, 20]


def test_tensorboard_has_the_same_numbers(tied, lines):
    found = events(tied)
    records = lines(tied / "metrics.jsonl")
    wanted = {(k, r["step"]): v for r in records for k, v in r.items() if k != "step"}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6)


def test_run_json(tied, untied):
    facts, other = (json.loads((w / "run.json").read_text()) for w in (tied, untied))
    assert {"jax", "python", "device", "git", "date"} <= facts["environment"].keys()
    model, _, _ = qkvjax.load(tied)
    assert facts["costs"]["num_params"] == sum(leaf.size for leaf in jax.tree.leaves(model))
    assert facts["costs"]["cache_bytes_per_token"] * 2 == other["costs"]["cache_bytes_per_token"]
    assert facts["data"]["digest"] == other["data"]["digest"]
    assert len(facts["data"]["digest"]) == 64 and facts["data"]["num_documents"] == 40


def test_the_loss_falls(tied, lines):
    records = lines(tied / "metrics.jsonl")
    losses = [record["train/loss"] for record in records]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.3
    scores = [r["eval/bits_per_byte"] for r in records if "eval/bits_per_byte" in r]
    assert scores[1] < scores[0]


def test_dry_run_prints_the_costs_and_writes_nothing(run_command, recipe, tmp_path):
    workdir = tmp_path / "never"
    result = run_command(
        "train", f"--config={recipe}:sharing=q-k=v", "--dry_run", f"--workdir={workdir}"
    )
    assert result.code == 0 and not result.err and not workdir.exists()
    for text in ("Q-K=V", "parameters", "cache bytes a token", "32 in bfloat16, 64 in float32"):
        assert text in result.out
    assert "compiled" not in result.out


def test_resuming_is_bit_for_bit(run_command, tied, tied_flags, copy, lines, checksums):
    workdir = copy(tied)
    shutil.rmtree(workdir / "checkpoints" / "20")  # metrics.jsonl keeps the lines of steps 15, 20
    result = run_command("train", *tied_flags, f"--workdir={workdir}")
    assert result.code == 0 and "resumed after step 10 of 20" in result.out
    assert state_digest(workdir, 20) == state_digest(tied, 20) != state_digest(tied, 10)
    resumed, straight = (lines(w / "metrics.jsonl") for w in (workdir, tied))
    assert without_timing(resumed) == without_timing(straight)
    assert [record["step"] for record in resumed] == [5, 10, 15, 20]
    seconds = [record["seconds"] for record in resumed]
    assert seconds == sorted(seconds)
    assert checksums(workdir)["config.json"] == checksums(tied)["config.json"]


@pytest.mark.parametrize(
    "sharing", [pytest.param(s, marks=[] if s == "q=k=v" else pytest.mark.slow) for s in SHARINGS]
)
def test_every_sharing_resumes_bit_for_bit(run_command, tied_flags, tmp_path, lines, sharing):
    flags = [*tied_flags, f"--config.model.sharing={sharing}"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert run_command("train", *flags, f"--workdir={straight}").code == 0
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "20")
    result = run_command("train", *flags, f"--workdir={resumed}")
    assert result.code == 0
    assert "resumed after step 10 of 20, bitwise as if it had never stopped" in result.out
    assert state_digest(resumed, 20) == state_digest(straight, 20)
    assert without_timing(lines(resumed / "metrics.jsonl")) == without_timing(
        lines(straight / "metrics.jsonl")
    )


def test_another_environment_is_told_not_to_be_bitwise(
    run_command, tied, tied_flags, copy, monkeypatch
):
    workdir = copy(tied)
    shutil.rmtree(workdir / "checkpoints" / "20")
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_dump_to=")
    result = run_command("train", *tied_flags, f"--workdir={workdir}")
    assert result.code == 0 and "resumed after step 10 of 20, equal within rounding" in result.out
    assert "XLA_FLAGS was " in result.out


def test_what_computes_attention_can_be_named(run_command, tied, tied_flags, copy, lines):
    workdir = copy(tied)
    shutil.rmtree(workdir / "checkpoints" / "20")
    result = run_command("train", *tied_flags, "--attention=reference", f"--workdir={workdir}")
    assert result.code == 0 and "attention was 'xla', is 'reference'" in result.out
    assert re.search(r"attention +reference\n", result.out)
    losses = [lines(run / "metrics.jsonl")[-1]["train/loss"] for run in (tied, workdir)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    result = run_command("generate", "--max_tokens=3", "--attention=tpu", f"--workdir={workdir}")
    assert result.code == 2 and "'tpu' needs a TPU: this machine has xla, reference" in result.err


def test_a_finished_run_does_nothing_and_says_so(run_command, tied, tied_flags, copy, checksums):
    workdir = copy(tied)
    before = checksums(workdir)
    result = run_command("train", *tied_flags, f"--workdir={workdir}")
    assert (
        result.code == 0 and "nothing left to train" in result.out and "step 20 of 20" in result.out
    )
    assert checksums(workdir) == before


def test_more_steps_under_wsd(run_command, tied, tied_flags, copy, lines):
    workdir = copy(tied)
    result = run_command("train", *tied_flags, f"--workdir={workdir}", "--config.train.steps=23")
    assert result.code == 0 and "resumed after step 20 of 23" in result.out
    records = lines(workdir / "metrics.jsonl")
    assert [record["step"] for record in records] == [5, 10, 15, 20, 23]
    assert records[3] == lines(tied / "metrics.jsonl")[3]
    again = run_command("train", *tied_flags, f"--workdir={workdir}")  # 20 steps are fewer
    assert again.code == 2 and "train.steps: 23 -> 20" in again.err


def test_cadence_may_change_on_resume(run_command, tied, tied_flags, copy, lines):
    workdir = copy(tied)
    shutil.rmtree(workdir / "checkpoints" / "20")
    cadence = ["log_every=2", "eval_every=0", "checkpoint_every=7", "keep_checkpoints=1"]
    flags = [f"--config.train.{item}" for item in cadence]
    result = run_command("train", *tied_flags, f"--workdir={workdir}", *flags)
    assert result.code == 0
    assert state_digest(workdir, 20) == state_digest(tied, 20)
    steps = [record["step"] for record in lines(workdir / "metrics.jsonl")]
    assert steps == [5, 10, 12, 14, 16, 18, 20]
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["20"]


def test_other_identity_keys_are_refused_with_their_names(
    run_command, tied, tied_flags, copy, checksums
):
    workdir = copy(tied)
    before = checksums(workdir)
    changed = ["--config.seed=3", "--config.model.d_model=32", "--config.optimizer.b2=0.99"]
    result = run_command("train", *tied_flags, f"--workdir={workdir}", *changed)
    assert result.code == 2 and result.err.count("error:") == 1
    for line in ("seed: 0 -> 3", "model.d_model: 16 -> 32", "optimizer.b2: 0.95 -> 0.99"):
        assert line in result.err
    assert "--workdir" in result.err and checksums(workdir) == before


def test_other_data_under_the_same_name_are_refused(run_command, recipe, tmp_path, checksums):
    book = tmp_path / "book.txt"
    book.write_text("one two three. " * 60)
    flags = [f"--config={recipe}", f"--config.data.source=text:{book}", "--config.train.steps=1"]
    flags += [f"--workdir={tmp_path / 'run'}"]
    assert run_command("train", *flags).code == 0
    before = checksums(tmp_path / "run")
    book.write_text("one two four! " * 60)
    result = run_command("train", *flags)
    assert result.code == 2 and "was trained on other data" in result.err
    assert checksums(tmp_path / "run") == before


def test_max_seconds_saves_and_the_next_start_goes_on(run_command, tied, tied_flags, tmp_path):
    flags = [*tied_flags, f"--workdir={tmp_path}"]
    result = run_command("train", *flags, "--config.train.max_seconds=0")
    assert result.code == 0 and "as train.max_seconds says" in result.out
    assert f"stopped early: {tmp_path} is at step 1 of 20" in result.out
    assert "done:" not in result.out
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
    result = run_command("train", *flags)
    assert result.code == 0 and "resumed after step 1 of 20" in result.out
    assert result.out.splitlines()[-1] == f"done: {tmp_path}"
    assert state_digest(tmp_path, 20) == state_digest(tied, 20)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 42)])
def test_a_signal_saves_and_the_next_start_goes_on(
    recipe, run_command, tmp_path, lines, number, code
):
    flags = [f"--config={recipe}", f"--workdir={tmp_path}", "--config.train.eval_every=0"]
    flags += ["--config.optimizer.schedule=constant", "--config.train.checkpoint_every=0"]
    command = [sys.executable, "-m", "qkvjax", "train", *flags, "--config.train.steps=1000000"]
    run = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(number)
    _, result = run.communicate(timeout=60)
    assert run.returncode == code, result
    step = lines(metrics)[-1]["step"]
    assert (
        result == f"stopped: saved after step {step} of 1000000: the same command goes on from"
        " there\n"
    )
    again = run_command("train", *flags, f"--config.train.steps={step + 1}")
    assert again.code == 2  # fewer steps than before are another run
    restored = qkvjax.load(tmp_path)
    assert restored[2].train.steps == 1_000_000
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [str(step)]


def test_damage_is_passed_over_set_aside_and_made_good(
    run_command, tied, tied_flags, copy, damage, lines
):
    workdir = copy(tied)
    damage(workdir / "checkpoints" / "20")
    result = run_command("train", *tied_flags, f"--workdir={workdir}")
    assert result.code == 0 and "checkpoint 20 is damaged and passed over" in result.out
    assert "resumed after step 10 of 20" in result.out
    assert state_digest(workdir, 20) == state_digest(tied, 20)  # saved anew, intact
    assert (workdir / "checkpoints" / "20.damaged").is_dir()
    result = run_command("train", *tied_flags, f"--workdir={workdir}")
    assert result.code == 0 and "nothing left to train" in result.out


def test_nothing_intact_is_code_45_and_one_message(process, tied, tied_flags, copy, damage):
    workdir = copy(tied)
    damage(workdir / "checkpoints" / "10")
    for file in (workdir / "checkpoints" / "20" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:100])  # truncated
    result = process("-m", "qkvjax", "train", *tied_flags, f"--workdir={workdir}")
    assert result.code == 45
    assert result.out.count("is damaged and passed over") == 2
    (message,) = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert "no intact checkpoint" in message and "restore it from a copy" in message
    assert "Traceback" not in result.err


def test_bfloat16_computes_and_float32_keeps(run_command, untied, recipe, tmp_path, lines):
    flags = [f"--config={recipe}", "--config.train.steps=2", f"--workdir={tmp_path}"]
    assert run_command("train", *flags, "--config.train.compute_dtype=bfloat16").code == 0
    ours, full = (lines(w / "metrics.jsonl")[-1]["train/loss"] for w in (tmp_path, untied))
    assert ours != full and abs(ours - full) < 0.05
    model, _, config = qkvjax.load(tmp_path)
    assert config.train.compute_dtype == "bfloat16"
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model)} == {"float32"}


def test_wandb_without_the_package(run_command, recipe, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else real(name, *a)
    )
    result = run_command(
        "train", f"--config={recipe}", "--config.train.wandb=me", f"--workdir={tmp_path}"
    )
    assert result.code == 2 and "pip install 'qkvjax[wandb]'" in result.err
    assert not list(tmp_path.iterdir())


def test_epochs_count_the_training_records(run_command, recipe):
    result = run_command("train", f"--config={recipe}", "--dry_run", "--config.train.steps=2ep")
    tokens = int(result.out.split("train ")[1].split(" tokens")[0].replace(",", ""))
    assert f"{2 * (tokens // 16 // 4):,} steps of 64 tokens" in result.out


def test_tensorflow_is_not_imported_where_it_is_installed(process, recipe, untied, tmp_path):
    for package in ("tensorflow", "transformers"):
        (tmp_path / "site" / package).mkdir(parents=True)
        (tmp_path / "site" / package / "__init__.py").write_text(f"raise SystemExit('{package}!')")
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from qkvjax.commands import train"
    program += "; sys.exit(train.main(sys.argv[1:]))"
    flags = [f"--config={recipe}", "--config.train.steps=2", f"--workdir={tmp_path / 'run'}"]
    result = process("-c", program, str(tmp_path / "site"), *flags)
    assert result.code == 0, result.err
    assert state_digest(tmp_path / "run", 2) == state_digest(untied, 2)


@pytest.mark.slow
def test_the_newest_recipes_train(run_command, corpus, tmp_path):
    """Both recipes of configs/lm.py, one step each."""
    for recipe in ("modern", "paper"):
        result = run_command(
            "train",
            f"--config=configs/lm.py:depth=1,recipe={recipe}",
            "--config.train.steps=1",
            f"--config.data.source=text:{corpus}",
            "--config.data.seq_len=16",
            "--config.data.batch_size=2",
            f"--workdir={tmp_path / recipe}",
        )
        assert result.code == 0, result.err


def test_a_run_says_first_how_to_use_idle_devices(process, recipe):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = ("-m", "qkvjax", "train", f"--config={recipe}", "--dry_run")
    result = process(*command, env=os.environ | flags)
    assert result.code == 0, result.err
    first = result.out.splitlines()[0]
    assert first.startswith("1 of 4 devices is used: ")
    assert "--config.mesh.fsdp=-1" in first and "qkvjax study --jobs=4" in first
    result = process(*command, "--config.mesh.fsdp=-1", env=os.environ | flags)
    assert result.code == 0 and "devices" not in result.out.splitlines()[0]
