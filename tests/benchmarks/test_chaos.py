"""A run that is killed, stopped, frozen, starved of disk and damaged ends as if it had not been."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "flags",
    [
        ("--rounds=1", "--only=kill"),
        pytest.param(("--rounds=10", "--only=kill"), marks=pytest.mark.slow),
        pytest.param(("--minutes=3",), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_the_end_is_that_of_an_undisturbed_run(flags):
    done = subprocess.run(
        [sys.executable, "benchmarks/chaos.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=1200,
    )
    print(done.stdout)  # the seed
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same fingerprints: yes" in done.stdout and "times resumed" in done.stdout
