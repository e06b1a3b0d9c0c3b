"""The default attention of a train step for accelerators that are not here: no buffer of T x T."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LENGTHS = 2048, 4096
PROGRAM = """
import json, runpy, sys
from qkvjax import config as configs
from qkvjax.models.spec import model_spec
from qkvjax.parallel import topology
from qkvjax.parallel.mesh import make_mesh
from qkvjax.training.run import compile_for

name, sharing, implementation, *lengths = sys.argv[1:]
device = topology.devices(topology.read(name))[:1]
for length in map(int, lengths):
    config = runpy.run_path("configs/lm.py")["get_config"](f"size=124m,sharing={sharing}")
    config.model.num_layers = 1
    config.data.update(seq_len=length, batch_size=2)
    config.train.update(accumulation=1, remat="none")
    spec = model_spec(configs.resolve(config).model, 257, length, implementation=implementation)
    compiled, _ = compile_for(configs.resolve(config), spec, make_mesh({}, device))
    found = {"text": compiled.as_text(), "bytes": compiled.memory_analysis().temp_size_in_bytes}
    print("found:", json.dumps(found), flush=True)
"""


def steps(topology, sharing, impl):
    """[(bytes of temporary memory, shapes with two axes of the length)], by LENGTHS."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology, sharing, impl, *map(str, LENGTHS)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("found: ")]
    for length, line in zip(LENGTHS, lines, strict=True):
        found = json.loads(line.removeprefix("found: "))
        shapes = set(re.findall(r"\w+\[[\d,]+\]", found["text"]))
        yield found["bytes"], [s for s in shapes if len(re.findall(rf"\b{length}\b", s)) > 1]


def needs(*compilers):
    if not any(map(importlib.util.find_spec, compilers)):
        pytest.skip(f"needs one of {', '.join(compilers)}")


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize(
    ("topology", "sharing"),
    [
        ("h200-1", "q-k-v"),
        ("h200-1", "q-k=v"),
        ("h200-1", "q=k=v"),
        ("v5e-4", "q-k-v"),
        ("v5e-4", "q-k=v"),
        ("v5p-8", "q-k-v"),
        ("v6e-4", "q-k=v"),
    ],
)
def test_memory_grows_with_the_length(topology, sharing):
    needs(*(["jax_cuda12_plugin", "jax_cuda13_plugin"] if topology == "h200-1" else ["libtpu"]))
    (short, squares), (long, more) = steps(topology, sharing, "auto")
    assert squares == more == []
    # A TPU keeps part of the shorter one on the chip, which temporary memory does not count.
    assert long < 2.6 * short


@pytest.mark.slow
@pytest.mark.aot
def test_through_xla_it_would_grow_with_the_square():
    """So that the test above can fail."""
    needs("jax_cuda12_plugin", "jax_cuda13_plugin")
    (short, squares), (long, more) = steps("h200-1", "q-k=v", "xla")
    assert squares and more and long > 3 * short
