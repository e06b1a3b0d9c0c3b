"""`generate`: text and the true bytes of the cache, side by side."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qkvjax import config as base
from qkvjax.training.restore import abstract_model, new_workdir, save_model

ROOT = Path(__file__).parents[2]

BYTES = 1 * 2 * 8 * 4  # layers, key-value heads, width of a head, float32


def printed_bytes(result):
    assert result.code == 0, result.err
    return [int(n.replace(",", "")) for n in re.findall(r"cache ([\d,]+) bytes", result.out)]


def test_one_model(run_command, tied):
    flags = [f"--workdir={tied}", "--prompt=the cat", "--max_tokens=6"]
    result = run_command("generate", *flags)
    length = 1 + len("the cat") + 6
    assert printed_bytes(result) == [length * BYTES]
    assert "Q-K=V" in result.out and "the cat" in result.out and "tokens/s" in result.out
    again, other = run_command("generate", *flags), run_command("generate", *flags, "--seed=1")
    text = [t.out.split("tokens/s")[0].rpartition("\n\n")[0] for t in (result, again, other)]
    assert text[0] == text[1] != text[2]


def test_two_models_side_by_side(run_command, tied, untied):
    flags = ["--prompt=the", "--max_tokens=4", "--temperature=0"]
    result = run_command("generate", f"--workdir={untied}", f"--workdir={tied}", *flags)
    assert printed_bytes(result) == [8 * BYTES * 2, 8 * BYTES]
    lines = result.out.splitlines()
    assert all(" |" in line for line in lines if line.strip())
    assert "QKV" in result.out and "Q-K=V" in result.out


def test_the_kv_layout_doubles_the_bytes_and_changes_no_token(run_command, tied):
    flags = [f"--workdir={tied}", "--prompt=dog", "--max_tokens=5", "--temperature=0"]
    shared, kv = (
        run_command("generate", *flags),
        run_command("generate", *flags, "--cache_layout=kv"),
    )
    assert printed_bytes(shared) * 2 == [9 * BYTES] * 2
    assert printed_bytes(kv) == [2 * 9 * BYTES]
    assert shared.out.split("tokens/s")[0].split("\n")[:4] == kv.out.split("\n")[:4]
    longer = run_command("generate", *flags, "--cache_length=64")
    assert printed_bytes(longer) == [64 * BYTES]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache_layout=shared"], "'shared'.*use layout 'kv'"),
        (["--cache_layout=paged"], "'paged' is unknown: use one of kv, shared"),
        (["--cache_length=5"], r"cache of 5 tokens is too short.*raise --cache_length"),
        (["--cache_length=0"], r"cache of 0 tokens is too short"),
        (["--max_tokens=0"], "max_tokens must be at least 1"),
        (["--temperature=nan"], "temperature must be at least 0 and finite"),
        (["--seed=99999999999999999999"], "below 2"),
        (["--step=7"], r"no step 7; it has \[2\]"),
        (["--prompt=\udcff"], "not valid UTF-8"),
    ],
)
def test_bad_input(run_command, untied, checksums, flags, message):
    before = checksums(untied)
    result = run_command("generate", f"--workdir={untied}", *flags)
    assert result.code == 2 and not result.out
    assert result.err.startswith("error: ") and re.search(message, result.err)
    assert checksums(untied) == before


@pytest.mark.slow
def test_half_a_gigabyte(tmp_path):
    """A cache of 1 GiB and its twin of one tensor: their processes' peaks differ by half."""
    peaks = {}
    for sharing in ("q-k-v", "q-k=v"):
        config = base.default()
        config.model.update(
            d_model=128, num_layers=8, num_heads=4, sharing=sharing, position="none", qk_norm=False
        )
        folder = new_workdir(str(tmp_path / sharing))
        config = base.resolve(config)
        shapes = abstract_model(config)[1]
        save_model(folder, config, {n: np.zeros(s.shape) for n, s in shapes.items()}, {})
        tokens = 2**30 // (2 * 8 * 128 * 4)
        command = [
            sys.executable,
            "-m",
            "qkvjax",
            "generate",
            f"--workdir={folder}",
            "--temperature=0",
            f"--cache_length={tokens}",
            "--max_tokens=3",
            "--prompt=a",
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        result = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        wanted = 2**30 if sharing == "q-k-v" else 2**29
        assert f"cache {wanted:,} bytes: {tokens} tokens" in result
        peaks[sharing] = 1024 * usage.ru_maxrss
    saved = (peaks["q-k-v"] - peaks["q-k=v"]) / 2**29
    assert 0.9 < saved < 1.1, peaks
