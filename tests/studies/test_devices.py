"""Which devices the runs of a study get, without any GPU or TPU."""

import sys

import pytest

from qkvjax.errors import UserError
from qkvjax.studies import devices
from qkvjax.studies.devices import Devices, environments, jobs_at_a_time

ONE = {"replica": 1, "fsdp": 1, "context": 1, "tensor": 1, "expert": 1}
ALL = ONE | {"fsdp": -1}
GPUS = Devices("cuda", tuple("01234567"))
TPU = Devices("tpu", tuple("0123"))


@pytest.mark.parametrize(
    ("requested", "machine", "mesh", "jobs"),
    [
        (None, GPUS, ONE, 1),
        (1, GPUS, ALL, 1),
        (8, GPUS, ONE, 8),
        (8, GPUS, ALL, 8),
        (3, GPUS, ALL, 3),
        (20, GPUS, ONE, 8),
        (8, GPUS, ONE | {"tensor": 4}, 2),
        (8, GPUS, ONE | {"tensor": 16}, 1),
        (4, TPU, ALL, 4),
        (9, TPU, ONE, 4),
    ],
)
def test_jobs_at_a_time(requested, machine, mesh, jobs):
    assert jobs_at_a_time(requested, machine, [ONE, mesh]) == jobs


def test_several_chips_for_each_of_several_runs_are_refused():
    with pytest.raises(UserError, match="gets one chip, and these want 2.*--jobs=1"):
        jobs_at_a_time(2, TPU, [ONE | {"fsdp": 2}])
    assert jobs_at_a_time(1, TPU, [ONE | {"fsdp": 2}]) == 1


def test_no_two_runs_see_the_same_gpu():
    one_each = environments(GPUS, 8)
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in one_each] == list("01234567")
    two_each = [variables["CUDA_VISIBLE_DEVICES"] for variables in environments(GPUS, 3)]
    assert two_each == ["0,1", "2,3", "4,5"]
    assert environments(GPUS, 1) == [{}] and environments(Devices("cpu", ("0",)), 2) == [{}, {}]
    named = Devices("rocm", ("3", "5"))
    assert environments(named, 2) == [{"HIP_VISIBLE_DEVICES": "3"}, {"HIP_VISIBLE_DEVICES": "5"}]


def test_each_run_has_a_chip_and_a_port():
    variables = environments(TPU, 4)
    assert [one["TPU_VISIBLE_CHIPS"] for one in variables] == list("0123")
    assert len({one["TPU_PROCESS_PORT"] for one in variables}) == 4
    for one in variables:
        assert one["TPU_PROCESS_ADDRESSES"] == f"localhost:{one['TPU_PROCESS_PORT']}"
        assert one["TPU_PROCESS_BOUNDS"] == one["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,1,1"


def test_devices_that_are_visible_already():
    """What a cluster selected stays selected, by number or by name."""
    ids = devices._ids("cuda", 2, {"CUDA_VISIBLE_DEVICES": "5, GPU-8a1,7"})
    assert ids == ("5", "GPU-8a1")
    assert devices._ids("cuda", 2, {"CUDA_VISIBLE_DEVICES": ""}) == ("0", "1")
    assert devices._ids("tpu", 2, {"CUDA_VISIBLE_DEVICES": "5"}) == ("0", "1")


def test_jax_is_asked_in_another_process(monkeypatch):
    import os

    with_jax = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert devices.find({**with_jax, "JAX_PLATFORMS": ""}).platform == "cpu"
    with pytest.raises(UserError, match="jax finds no device .JAX_PLATFORMS='nothing'"):
        devices.find({**with_jax, "JAX_PLATFORMS": "nothing"})
