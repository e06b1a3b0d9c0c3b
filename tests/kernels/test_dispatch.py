"""What "auto" is on hardware that is not here."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from qkvjax.errors import UserError
from qkvjax.kernels import choice, dispatch, trial
from qkvjax.kernels.trial import Problem
from qkvjax.parallel.mesh import AXES

ROOT = Path(__file__).parents[2]


def mesh_of(kind, platform):
    """A mesh of one device of a kind that need not be here."""
    device = {"device_kind": kind, "num_cores": 1}
    if "platform" in AbstractDevice.__dataclass_fields__:
        device["platform"] = platform
    explicit = (AxisType.Explicit,) * len(AXES)
    return AbstractMesh(
        (1,) * len(AXES), AXES, axis_types=explicit, abstract_device=AbstractDevice(**device)
    )


H200 = mesh_of("NVIDIA H200", "gpu")
TPU = mesh_of("TPU v5 lite", "tpu")
TIED = Problem("bfloat16", 64, 64, 1, 256)
UNTIED = dataclasses.replace(TIED, values_are_keys=False)


@pytest.fixture
def no_trial(monkeypatch):
    def failure(*arguments, **options):
        raise AssertionError("a device that is not here cannot try a kernel")

    monkeypatch.setattr(trial, "failure", failure)


def test_the_device_of_the_mesh_decides_and_not_that_of_the_process(no_trial, capsys):
    with use_abstract_mesh(H200):
        assert dispatch.missing("hopper") is None and dispatch.missing("tpu") == "a TPU"
        assert choice.choose("auto", TIED) == "hopper"
        assert choice.choose("auto", UNTIED) in ("cudnn", "hopper")
    assert "hopper; not tried, because no NVIDIA H200 is here" in capsys.readouterr().err
    with use_abstract_mesh(TPU):
        assert dispatch.missing("tpu") is None
        assert choice.choose("auto", TIED) == "tpu"
        assert choice.choose("auto", UNTIED) == "splash"
        with pytest.raises(UserError, match="'triton' needs an NVIDIA GPU"):
            choice.choose("triton", TIED)


PROGRAM = """
import re, sys
import jax, jax.numpy as jnp
from qkvjax.kernels import dispatch
from qkvjax.parallel import rules, topology
from qkvjax.parallel.mesh import make_mesh

name, impl = sys.argv[1:]
mesh = make_mesh({"fsdp": -1}, topology.devices(topology.read(name)))
with jax.set_mesh(mesh):
    heads = rules.sharding(mesh, "batch", "length", "heads", None)
    tokens = rules.sharding(mesh, "batch", "length")
    x = jax.ShapeDtypeStruct((8, 512, 4, 64), jnp.bfloat16, sharding=heads)
    segments = jax.ShapeDtypeStruct((8, 512), jnp.int32, sharding=tokens)

    def loss(q, k, segments):
        out = dispatch.attention(q, k, segment_ids=segments, impl=impl)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, x, segments).compile()
print("found:", *sorted(set(re.findall(r"attention_[a-z_]+", compiled.as_text()))))
"""


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize(
    ("compilers", "topology", "impl", "kernel"),
    [
        (["jax_cuda12_plugin", "jax_cuda13_plugin"], "h200-8", "auto", "hopper_forward"),
        (["libtpu"], "v5e-4", "tpu", "attention_forward"),
    ],
)
def test_kernels_under_a_mesh_of_absent_devices(compilers, topology, impl, kernel):
    """Through shard_map, with gradients, by `jax.jit(...).lower(...).compile()`."""
    if not any(importlib.util.find_spec(name) for name in compilers):
        pytest.skip(f"needs one of {compilers}")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology, impl],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert kernel in done.stdout.partition("found:")[2]
