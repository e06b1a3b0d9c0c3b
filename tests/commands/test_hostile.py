"""Workdirs of strangers, whose authors mean harm."""

import json
import os


def test_scoring_runs_and_writes_nothing_that_the_workdir_asks_for(process, tied, copy, tmp_path):
    workdir, outside = copy(tied), tmp_path / "outside"
    canary = f"open({str(outside)!r}, 'w').close()\n"
    for name in ("config.py", "qkvjax.py", "sitecustomize.py", "conftest.py", "json.py"):
        (workdir / name).write_text(canary)
        (workdir / "checkpoints" / name).write_text(canary)
    before = set(tmp_path.rglob("*"))
    result = process("-m", "qkvjax", "evaluate", f"--workdir={workdir}")
    assert result.code == 0, result.err
    added = set(tmp_path.rglob("*")) - before
    items = workdir / "items"
    assert added == {workdir / "evaluation.jsonl", items, items / "bits_per_byte.npz"} - before
    assert not outside.exists()


def test_the_name_of_an_evaluator_is_not_a_path(run_command, tied, copy, tmp_path):
    workdir = copy(tied)
    config = json.loads((workdir / "config.json").read_text())
    config["evals"] = {str(tmp_path / "outside"): {"kind": "bits_per_byte"}}
    (workdir / "config.json").write_text(json.dumps(config))
    result = run_command("evaluate", f"--workdir={workdir}")
    assert result.code == 2 and "is not a name of an evaluator" in result.err


def test_a_configuration_that_leads_elsewhere_is_read_as_data_at_most(run_command, tied, copy):
    workdir = copy(tied)
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["tokenizer"] = "bpe:../../../../etc/passwd"
    (workdir / "config.json").write_text(json.dumps(config))
    result = run_command("evaluate", f"--workdir={workdir}")
    assert result.code == 2 and "Traceback" not in result.err and "root:" not in result.err


def test_no_secret_of_the_environment_is_written(run_command, recipe, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SOME_PASSWORD"):
        monkeypatch.setenv(name, "very-secret-indeed")
    flags = [f"--config={recipe}", "--config.train.steps=2", f"--workdir={tmp_path}"]
    assert run_command("train", *flags).code == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"very-secret-indeed" in path.read_bytes()]
    assert os.environ["HF_TOKEN"] == "very-secret-indeed"
