"""What a run computes does not depend on its mesh.

One process with 8 virtual devices trains the same tiny model on one of them and on several meshes
and prints losses, parameters and collectives. In float64: in float32, rounding alone would make the
runs drift apart.
"""

import dataclasses
import hashlib
import re

import jax
import numpy as np
import processes
import pytest

from qkvjax import config as configs
from qkvjax.training.run import prepare_run

REPLICA = {"replica": 8}
BOTH = {"replica": 2, "fsdp": 4}
EVERY = {"fsdp": 2, "context": 2, "tensor": 2}  # two devices for one key-value head
# name: (mesh, micro-batches a step, dropout)
RUNS = {
    "one device": ({}, 1, 0.0),
    "replicas": (REPLICA, 1, 0.0),
    "sharded, 2 micro-batches": (BOTH, 2, 0.0),
    "one device, dropout": ({}, 1, 0.2),
    "sharded, dropout": (BOTH, 1, 0.2),
    "every axis, 2 micro-batches": (EVERY, 2, 0.0),
}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
STEPS = 5


def prepared(folder, mesh, accumulation=1, dropout=0.0):
    """A run of a model with one layer, with K = V and grouped heads, on one tiny text file."""
    config = configs.default()
    config.model.update(
        num_layers=1,
        d_model=16,
        num_heads=2,
        num_kv_heads=1,
        sharing="q-k=v",
        mlp_ratio=1.0,
        dropout=dropout,
        score=("role_bias", "column_bias", "score2d(3)"),
    )
    config.data.update(
        source=f"text:{folder}/corpus.txt", tokenizer="bytes", seq_len=8, batch_size=16
    )
    config.train.update(steps=STEPS, accumulation=accumulation)
    config.mesh.update(mesh)
    return prepare_run(configs.resolve(config), log=lambda line: None)


def initial(run):
    with jax.set_mesh(run.mesh):
        return run.init()


def digest(state):
    """A hash of every bit of the model."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.model)]
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


def train(run, state):
    """Five steps from `state`: losses, gradient norms, parameters and collectives."""
    fields = dataclasses.replace(run.config.train, compute_dtype="float64")  # no user can set this
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, train=fields))
    # The rate of dropout is not a leaf but part of the structure, which must be that of this run.
    state = jax.tree.unflatten(jax.tree.structure(run.abstract), jax.tree.leaves(state))
    with jax.set_mesh(run.mesh):
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, run.abstract))
        step = run.compile_step(state)
        leaves, tree = jax.tree.flatten(state)
        losses, norms = [], []
        for i in range(STEPS):
            leaves, metrics = step(leaves, run.batch(i))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
    model = jax.tree.unflatten(tree, leaves).model
    leaves = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(model)]
    text = step.as_text()
    counts = {kind: len(re.findall(rf" {kind}(-start)?\(", text)) for kind in COLLECTIVES}
    return {"loss": losses, "grad_norm": norms, "parameters": leaves, "collectives": counts}


def main(folder):
    """Runs in the process with 8 devices."""
    results = {"devices": jax.device_count()}
    with jax.enable_x64(False):
        state = initial(prepared(folder, BOTH))
        weight = state.model.stack.blocks[0].mlp.up.weight[...]
        results["dtype"] = str(weight.dtype)
        results["digest"] = digest(state)
        results["shards"] = len({str(shard.index) for shard in weight.addressable_shards})
    state = jax.device_get(initial(prepared(folder, {})))
    results["runs"] = {name: train(prepared(folder, *run), state) for name, run in RUNS.items()}
    processes.print_result(results)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    (folder / "corpus.txt").write_text("To be, or not to be, that is the question. " * 40)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    program = f"import {__name__} as t; t.main({str(folder)!r})"
    return processes.run_program(folder, program, JAX_ENABLE_X64="1")


def test_initial_values_are_equal_to_the_last_bit(results, folder, monkeypatch):
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(folder / "prepared"))
    assert results["devices"] == 8 and jax.device_count() == 1
    assert results["shards"] == 4 and results["dtype"] == "float32"
    assert results["digest"] == digest(initial(prepared(folder, {})))


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("replicas", "one device"),
        ("sharded, 2 micro-batches", "one device"),
        ("every axis, 2 micro-batches", "one device"),
        ("sharded, dropout", "one device, dropout"),
    ],
)
def test_training_does_not_depend_on_mesh_or_micro_batches(results, name, base):
    expected, got = results["runs"][base], results["runs"][name]
    assert expected["loss"][-1] < expected["loss"][0]
    np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-9)
    np.testing.assert_allclose(got["grad_norm"], expected["grad_norm"], rtol=1e-9)
    for a, b in zip(got["parameters"], expected["parameters"], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.max(np.abs(b)))


def test_collectives(results):
    """One device needs none, replicas only sums; nothing is ever sent all to all."""
    counts = {name: run["collectives"] for name, run in results["runs"].items()}
    assert set(counts["one device"].values()) == {0}
    assert counts["sharded, dropout"]["all-gather"] > 0
    for name, kinds in counts.items():
        assert kinds["all-to-all"] == kinds["collective-permute"] == 0, name
    replicas = dict(counts["replicas"])
    assert replicas.pop("all-reduce") > 0 and set(replicas.values()) == {0}
