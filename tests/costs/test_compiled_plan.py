"""`plan --topology`: the training step compiled for devices that are not present."""

import json
import os
import re
import subprocess
import sys

import pytest

from qkvjax.commands.plan import main
from qkvjax.errors import UserError
from qkvjax.parallel import topology

SMALL = (
    "--config=configs/lm.py:depth=2,sharing=q-k=v",
    "--config.model.d_model=32",
    "--config.model.num_heads=4",
    "--config.model.num_kv_heads=1",
    "--config.data.seq_len=32",
    "--config.data.batch_size=8",
    "--config.model.mlp_ratio=2.0",
)


def plan(*arguments, program=None):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100"}
    what = ["-c", program] if program else ["-m", "qkvjax", "plan"]
    command = [sys.executable, *what, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_eight_devices(tmp_path):
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=4")
    done = plan(
        *SMALL,
        *mesh,
        "--topology=cpu:8",
        "--all_sharings",
        "--batches=2,4",
        "--config.seed=3",
        f"--workdir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["fits"] and record["devices"] == 8
    assert record["mesh"] == {"replica": 1, "fsdp": 2, "context": 1, "tensor": 4, "expert": 1}
    # The golden table: a sharding that changes by accident changes this.
    table = {
        row["name"].split("blocks.0.")[-1]: row["spec"]
        for row in record["sharding"]
        if "blocks.1" not in row["name"]
    }
    assert table == {
        "embedding": "('tensor', 'fsdp')",
        "norm.gain": "(None,)",
        "attention_norm.gain": "(None, None)",
        "attention.projections.q.weight": "(None, 'fsdp', 'tensor')",
        "attention.projections.kv.weight": "(None, 'fsdp', 'tensor')",
        "attention.norms.q.gain": "(None, None)",
        "attention.norms.kv.gain": "(None, None)",
        "attention.output.weight": "(None, 'tensor', 'fsdp')",
        "mlp_norm.gain": "(None, None)",
        "mlp.up.weight": "(None, 'fsdp', 'tensor')",
        "mlp.gate.weight": "(None, 'fsdp', 'tensor')",
        "mlp.down.weight": "(None, 'tensor', 'fsdp')",
    }
    parameters = record["parameter_bytes_per_device"]
    optimizer = record["optimizer_bytes_per_device"]
    assert optimizer == 2 * parameters + 8  # two counters
    assert record["peak_bytes_per_device"] > parameters + optimizer
    assert record["collectives"]["all-reduce"]["count"] > 0
    by_sharing = {row["sharing"]: row for row in record["sharings"]}
    assert "must equal num_heads=4" in by_sharing["q=k=v"]["refused"]
    assert by_sharing["q-k=v"]["num_params"] < by_sharing["q-k-v"]["num_params"]
    peaks = [row["peak_bytes_per_device"] for row in record["batches"]]
    assert peaks[0] < peaks[1] < record["peak_bytes_per_device"]
    assert record["largest_micro_batch"] > 8
    for words in ("fsdp 2, tensor 4", "compiled, not run", "attention.projections.kv.weight"):
        assert words in done.stdout


FLOPS = """
import runpy
from qkvjax import config as configs
from qkvjax.commands import cli
from qkvjax.costs.train_program import compile_train_step
from qkvjax.parallel import topology

config = runpy.run_path(cli.find_config("configs/lm.py"))["get_config"]("depth=2,sharing=q-k=v")
small = {"d_model": 32, "num_heads": 4, "num_kv_heads": 1, "mlp_ratio": 2.0}
config = configs.resolve(config)
config = configs.changed(config, model=small, data={"seq_len": 512, "batch_size": 8})
devices = topology.devices(topology.read("cpu:4"))
for change in CASES:
    record = compile_train_step(configs.changed(config, **change), devices)
    print("ratio", record["matmul_flops_per_device"] / record["analytic_flops_per_device"])
"""


@pytest.mark.parametrize(
    "cases",
    [
        [
            {"mesh": {"fsdp": 2, "tensor": 2}, "train": {"accumulation": 2}},
            {"mesh": {"fsdp": 2, "context": 2}, "train": {"remat": "block"}},
        ],
        pytest.param(
            [
                {"mesh": {"fsdp": 4}, "train": {"accumulation": 2, "remat": "block"}},
                {"model": {"window": 100, "mlp": "gelu"}, "train": {"remat": "dots"}},
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["some", "others"],
)
def test_compiled_flops_are_the_analytic_ones(cases):
    """Where attention is much of the work, in tiles, and where layers are computed again."""
    done = plan(program=FLOPS.replace("CASES", repr(cases)))
    assert done.returncode == 0, done.stderr
    ratios = [float(line.split()[1]) for line in done.stdout.splitlines() if "ratio" in line]
    assert ratios == pytest.approx([1] * len(cases), abs=0.02)


def test_a_mesh_of_one_takes_all_devices(tmp_path):
    done = plan(*SMALL, "--topology=cpu:4", "--memory=100kB", f"--workdir={tmp_path}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "does not fit cpu:4" in done.stderr and "train.remat=block" in done.stderr
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["mesh"]["fsdp"] == 4 and record["fits"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v6e-255"], "does not exist: use one of v4-8.*v6e-4, -8, -16.*cpu:N"),
        (["--topology=cpu:0"], "does not exist"),
        (["--topology=cpu:2", "--batches=two"], "--batches=two: give whole numbers"),
        (["--all_sharings"], "--all_sharings goes with --topology"),
        (["--topology=cpu:2", "--context=3"], "--context goes with --model"),
    ],
)
def test_bad_input(capsys, arguments, message):
    assert main([*SMALL, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_a_batch_that_three_devices_cannot_share():
    done = plan(*SMALL, "--topology=cpu:3")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "8 sequences does not divide over 3 devices (mesh.replica x mesh.fsdp" in done.stderr


@pytest.mark.parametrize(
    ("name", "count"),
    [("v5e-16", 16), ("v6e-256", 256), ("v5p-128", 64), ("v4-8", 4), ("h200-8", 8), ("cpu:8", 8)],
)
def test_names(name, count):
    """v4 and v5p are named by cores, of which a chip has two."""
    assert topology.read(name).count == count


def test_without_the_compiler(monkeypatch):
    from jax.experimental import topologies

    def absent(*arguments, **options):
        raise RuntimeError("no libtpu")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    with pytest.raises(
        UserError, match=r"compiler is not installed, or another.*pip install 'qkvjax\[tpu\]'"
    ):
        topology.devices(topology.read("v5e-4"))


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize(
    ("compiler", "topology", "kind"),
    [("libtpu", "v5e-16", "TPU v5 lite"), ("jax_plugins.xla_cuda13", "h200-8", "NVIDIA H200")],
)
def test_hardware_that_is_not_present(tmp_path, compiler, topology, kind):
    pytest.importorskip(compiler, reason="its wheels compile for such hardware")
    small = [
        *SMALL,
        "--config.model.d_model=256",
        "--config.model.num_kv_heads=4",
        "--config.data.batch_size=16",
    ]
    done = plan(*small, f"--topology={topology}", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["device_kind"] == kind and record["roofline_seconds"] > 0
    ratio = record["matmul_flops_per_device"] / record["analytic_flops_per_device"]
    assert 0.5 < ratio < 1.02  # what a kernel of attention computes is not in the program's text
    peaks = [record["programs"][name]["peak_bytes_per_device"] for name in ("evaluate", "train")]
    assert 0 < peaks[0] <= peaks[1]
