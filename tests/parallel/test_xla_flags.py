"""The compiler's flags for accelerators."""

import os
import subprocess
import sys

import pytest

from qkvjax.parallel import xla_flags


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", xla_flags.SWITCH):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_this_compiler_knows_the_flags_for_gpus_and_starts_with_them():
    """A flag that it does not know ends the process."""
    added = xla_flags.add("gpu")
    assert len(added.split()) == len(xla_flags.FLAGS["gpu"])
    assert os.environ["XLA_FLAGS"] == added == xla_flags.in_force()
    program = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for flags, code in ((added, 0), (f"{added} --xla_gpu_of_no_compiler=true", 1)):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment | {"XLA_FLAGS": flags},
            capture_output=True,
            text=True,
        )
        assert bool(done.returncode) == bool(code), done.stderr[-500:]


def test_a_users_flags_win_and_ours_are_added_once(monkeypatch):
    name = "xla_gpu_enable_latency_hiding_scheduler"
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=false --xla_gpu_deterministic_ops=true")
    added = xla_flags.add("gpu")
    flags = os.environ["XLA_FLAGS"].split()
    assert f"--{name}=false" in flags and name not in added
    assert len(flags) == len(xla_flags.FLAGS["gpu"]) + 1
    assert xla_flags.add("gpu") == "" and os.environ["XLA_FLAGS"].split() == flags


def test_flags_can_be_turned_off(monkeypatch):
    monkeypatch.setenv(xla_flags.SWITCH, "off")
    assert xla_flags.add("gpu") == "" and "XLA_FLAGS" not in os.environ


def test_a_flag_that_the_compiler_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setitem(xla_flags.FLAGS, "gpu", {"xla_gpu_of_no_compiler": "true"})
    xla_flags._known.cache_clear()
    assert xla_flags.add("gpu") == ""
    xla_flags._known.cache_clear()


def test_a_machine_without_an_accelerator_gets_no_flags(monkeypatch):
    monkeypatch.setattr(xla_flags, "DEVICES", {"gpu": ("/no/gpu",), "tpu": ("/no/tpu",)})
    assert xla_flags.add() == "" and not xla_flags.in_force()


def test_accelerator_is_what_jax_will_find(monkeypatch, tmp_path):
    (tmp_path / "device").touch()
    device_files = {"gpu": (str(tmp_path / "device"),), "tpu": ("/no/tpu",)}
    monkeypatch.setattr(xla_flags, "DEVICES", device_files)
    monkeypatch.setattr(xla_flags, "PLUGINS", {"gpu": ("jax",), "tpu": ("jax",)})
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert xla_flags.accelerator() == "gpu"
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert xla_flags.accelerator() == "gpu"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert xla_flags.accelerator() is None


@pytest.mark.slow
@pytest.mark.aot
def test_libtpu_knows_the_flags_for_tpus():
    pytest.importorskip("libtpu", reason="its wheel compiles for TPUs")
    program = (
        "from qkvjax.parallel import topology, xla_flags;"
        "print(len(topology.devices(topology.read('v5e-4'))), xla_flags.in_force())"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    count, *flags = done.stdout.split()
    assert count == "4" and len(flags) == len(xla_flags.FLAGS["tpu"])
