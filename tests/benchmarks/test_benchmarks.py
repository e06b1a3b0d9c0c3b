"""The benchmark scripts run, and write records that say what they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FACTS = {"date", "device", "jax", "python", "command", "benchmark"}


def environment(tmp_path):
    return os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}",
        "PYTHON": sys.executable,
        "MINI": "1",
        "QKVJAX_DATA_DIR": str(tmp_path / "data"),
    }


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_decode_speed_counts_half_the_cache(tmp_path):
    output = tmp_path / "decode.jsonl"
    command = [
        sys.executable,
        "benchmarks/decode_speed.py",
        "--size=tiny",
        "--batch=2",
        "--length=32",
        "--sharings=q-k-v,q-k=v",
        f"--output={output}",
    ]
    subprocess.run(command, cwd=ROOT, env=environment(tmp_path), check=True, timeout=300)
    records = lines(output)
    assert all(record.keys() >= FACTS for record in records)
    whole, raw, unrotated = (record["cache_bytes"] for record in records)
    assert whole == 2 * raw == 2 * unrotated
    assert records[0]["ratio"] == [1, 1, 1]


def test_torch_twin_without_torch_says_what_to_install(tmp_path):
    command = [
        sys.executable,
        "benchmarks/torch_twin.py",
        "--size=tiny",
        "--torch_python=/bin/false",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "pip install torch" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_gpu_day_in_miniature_twice(tmp_path):
    results = tmp_path / "results"
    command = ["bash", str(ROOT / "benchmarks/gpu_day.sh"), str(results)]
    first = subprocess.run(
        command, env=environment(tmp_path), capture_output=True, text=True, timeout=900
    )
    assert first.returncode == 0, first.stdout + first.stderr
    records = {path.stem: lines(path) for path in results.glob("*.jsonl")}
    assert records.keys() >= {"environment", "correctness", "train_speed", "decode_speed", "ops"}
    assert {record["sharing"] for record in records["train_speed"]} == {
        "q-k-v",
        "q-k=v",
        "q=k-v",
        "q=v-k",
        "q=k=v",
    }
    assert all(record.keys() >= FACTS for record in records["correctness"])
    assert (results / "study/report.html").exists()
    again = subprocess.run(
        command, env=environment(tmp_path), capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0
    assert again.stdout.count("done before") >= 5


@pytest.mark.slow
def test_full_size_in_small(tmp_path):
    """Every command, one after the other; SIGTERM arrives where the first checkpoint is whole."""
    text = tmp_path / "novel.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 2000)
    output = tmp_path / "full.jsonl"
    command = [
        sys.executable,
        "benchmarks/full_size.py",
        f"--text={text}",
        f"--output={output}",
        "--config=configs/lm.py:depth=1",
        "--labels=512",
        "--steps=40",
        "--sharings=q-k=v",
        f"--workdir={tmp_path / 'work'}",
    ]
    subprocess.run(command, cwd=ROOT, env=environment(tmp_path), check=True, timeout=600)
    records = {record["part"]: record for record in lines(output)}
    parts = "plan", "prepare", "train until SIGTERM", "train and evaluate", "evaluate", "generate"
    assert tuple(records) == parts
    assert all(record.keys() >= FACTS for record in records.values())
    for name in parts[2:]:
        assert records[name]["peak_bytes"] > records[name]["planned_bytes"] > 0
