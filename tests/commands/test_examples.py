"""Encoders and their tasks through the commands: train, evaluate, analyze, plan, study."""

import json

import pytest

from qkvjax import config as configs

RECIPE = """
import ml_collections
from qkvjax import config as base
from qkvjax.sweep import axis

def get_config(arg=None):
    config = base.default()
    config.model.update(
        kind="encoder", d_model=16, num_layers=1, num_heads=2, mlp_ratio=1.0, position="learned",
        tie_embeddings=False, max_length=12,
    )
    config.data.update(source="synthetic:copy:train=64:test=20", seq_len=6, batch_size=8)
    config.train.update(steps=8, log_every=4, eval_every=4, checkpoint_every=8)
    config.evals = {"eval": {"kind": "accuracy"}, "inside": {"kind": "inside"}}
    config.study = ml_collections.ConfigDict({
        "points": axis("model.sharing", ("q-k-v", "q=k-v")),
        "settings": (
            {"label": "copy", "data.source": "synthetic:copy:train=64:test=20"},
            {"label": "sub wide", "data.source": "synthetic:sub:train=64:test=20",
             "model.d_model": 32},
        ),
        "seeds": 1,
        "reference": {"source": "nobody", "metric": "accuracy",
                      "values": {"copy": {"QKV": [0.5, 0.6]}}},
    })
    return config
"""


@pytest.fixture(scope="module")
def task(folders):
    path = folders / "task.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def encoder(run_command, task, folders):
    """The workdir of a trained encoder."""
    workdir = folders / "encoder"
    result = run_command("train", f"--config={task}", f"--workdir={workdir}")
    assert result.code == 0, result.err
    return workdir


def test_metrics_of_training(encoder, lines):
    last = lines(encoder / "metrics.jsonl")[-1]
    assert last["eval/error"] == pytest.approx(1 - last["eval/accuracy"])
    assert last["eval/num_labels"] == 120 and 0 < last["inside/diagonal_mass"] < 1
    assert json.loads((encoder / "run.json").read_text())["costs"]["cache_bytes_per_token"] == 0


def test_evaluate_scores_what_training_scored(run_command, encoder, lines, copy):
    workdir = copy(encoder)
    for size in (1, 7):
        assert run_command("evaluate", f"--workdir={workdir}", f"--batch_size={size}").code == 0
    records = lines(workdir / "evaluation.jsonl")
    assert [r["metric"] for r in records] == ["accuracy", "class_accuracy"] * 2
    last = lines(encoder / "metrics.jsonl")[-1]
    assert records[0]["value"] == records[2]["value"] == last["eval/accuracy"]
    assert records[0]["num_items"] == 120 and "tokenizer" not in records[0]
    result = run_command("evaluate", f"--workdir={workdir}", "--tasks=bits_per_byte")
    assert result.code == 2 and "needs text" in result.err
    result = run_command("evaluate", f"--workdir={workdir}", "--data=synthetic:sort:test=30")
    assert result.code == 0 and "180 labels of synthetic:sort" in result.out


def test_analyze_and_generate(run_command, encoder, copy):
    workdir = copy(encoder)
    result = run_command("analyze", f"--workdir={workdir}", "--num_sequences=3")
    assert result.code == 0 and "QKV, 18 tokens" in result.out
    result = run_command("generate", f"--workdir={workdir}")
    assert result.code == 2 and "generate needs a language model of text" in result.err


def test_data_that_the_model_was_not_made_for(run_command, encoder):
    for source, result in (
        (
            "synthetic:induction:symbols=30",
            "has tokens of 31 symbols and 31 classes, the model 10 and 10",
        ),
        ("anomaly:digits", "sets of 10 images: set data.seq_len=10"),
    ):
        for name in ("evaluate", "analyze"):
            said = run_command(name, f"--workdir={encoder}", f"--data={source}")
            assert said.code == 2 and result in said.err, said.err


def test_plan_counts_an_encoder_without_a_cache(run_command, task, tmp_path):
    result = run_command("plan", f"--config={task}", f"--workdir={tmp_path}")
    assert result.code == 0, result.err
    assert "nothing is decoded" in result.out and "cache a" not in result.out
    record = json.loads((tmp_path / "plan.json").read_text())
    by_hand = 16 * (10 + 10 + 12) + 16 * 3 + 4 * 16 * 16 + 2 * 8 + 3 * 16 * 16  # + gains, swiglu
    assert record["num_params"] == by_hand


def test_a_study_with_settings(run_command, task, tmp_path, lines):
    flags = (f"--config={task}", f"--workdir={tmp_path}")
    result = run_command("study", *flags, "--list")
    assert result.code == 0 and len(result.out.splitlines()) == 1 + 2 * 2
    result = run_command("study", *flags, "--jobs=2")
    assert result.code == 0, result.err
    results = lines(tmp_path / "results.jsonl")
    assert {(r["label"], r["setting"], r["seed"]) for r in results} == {
        (label, setting, 0) for label in ("QKV", "Q=K-V") for setting in ("copy", "sub wide")
    }
    assert {r["metric"] for r in results} == {"error"}
    assert all(r["status"] == "done" and r["inside"]["entropy"] > 0 for r in results)
    assert len({r["data_digest"] for r in results}) == 2
    looked = {(r["label"], r["setting"]) for r in results if r["spectra"]}
    assert looked == {("QKV", "copy"), ("Q=K-V", "copy")}
    study = json.loads((tmp_path / "study.json").read_text())
    assert study["environment"]["jax"] and study["command"].endswith("--jobs=2")
    page = (tmp_path / "report.md").read_text()
    assert "mean over layers, first seed of copy." in page
    assert "Setting by setting" in page and "The reference is nobody" in page
    assert not (tmp_path / ".compiled").exists()  # nothing is left to share
    result = run_command("study", *flags)
    assert result.code == 0 and "all 4 runs are finished" in result.out


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"settings": ({"model.d_model": 16}, {"model.d_model": 16})}, "are called"),
        ({"settings": ({"model.sharing": "q-k=v"}, {"seed": 3})}, "sets `seed`"),
        ({"settings": ({"model.sharing": "q-k=v"}, {})}, "is set in a point and in a setting"),
        ({"settings": ({"model.d_model": 15}, {})}, "is not a valid configuration"),
    ],
)
def test_bad_settings(run_command, task, tmp_path, study, message):
    path = tmp_path / "bad.py"
    change = f"    config.study.update({study!r})\n    return config\n"
    path.write_text(task.read_text().replace("    return config\n", change))
    result = run_command("study", f"--config={path}", f"--workdir={tmp_path / 'w'}", "--list")
    assert result.code == 2 and message in result.err and result.err.count("error:") == 1


def test_an_inside_evaluator_has_no_other_field(run_command, task, tmp_path):
    result = run_command(
        "train", f"--config={task}", f"--workdir={tmp_path}", "--config.evals.inside.split=train"
    )
    assert result.code == 2 and result.err.count("error:") == 1
    config = configs.default()
    config.evals.inside = {"kind": "inside", "max_labels": 3}
    with pytest.raises(Exception, match="has no other field"):
        configs.resolve(config)
