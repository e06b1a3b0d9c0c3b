"""Programs that do not fit are refused before they run."""

import re

import jax
import jax.numpy as jnp
import pytest

from qkvjax.errors import UserError
from qkvjax.parallel import host
from qkvjax.training.fits import added_bytes, check_arrays, compile_all, peak_bytes


def program():
    return jax.jit(lambda x: jnp.sort(x @ x.T)).lower(jnp.zeros((256, 4))).compile()


def test_what_is_free_decides(monkeypatch):
    compiled = program()
    assert peak_bytes(compiled) == added_bytes(compiled) + 256 * 4 * 4
    assert added_bytes(compiled) >= 256 * 256 * 4
    monkeypatch.setattr(host, "free_device_memory", lambda: added_bytes(compiled))
    assert compile_all({"the step": lambda: [compiled], "nothing": lambda: []})["nothing"] == []
    monkeypatch.setattr(host, "free_device_memory", lambda: 2**10)
    with pytest.raises(UserError) as refused:
        compile_all({"the step": lambda: [compiled]})
    message = str(refused.value)
    assert re.search(r"the step does not fit: a device needs .* GiB too little", message)
    assert "train.accumulation" in message and "train.remat=block" in message
    monkeypatch.setattr(host, "free_device_memory", lambda: None)  # where devices do not say
    compile_all({"the step": lambda: [compiled]})


def test_a_compiler_that_finds_no_room_is_one_message():
    def compile_step():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: used 20G of 16G hbm")

    with pytest.raises(UserError, match="the train step does not fit a device .*used 20G"):
        compile_all({"the train step": compile_step})


def test_this_machine_says_what_is_free():
    free = host.free_device_memory()
    assert free is None or free > 2**20


def test_arrays_that_do_not_fit_are_refused_before_they_are_made(monkeypatch):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = [jax.ShapeDtypeStruct((2**20,), jnp.float32, sharding=place)]
    monkeypatch.setattr(host, "free_device_memory", lambda: 2**22)
    check_arrays("the train state", arrays, "take more devices")
    monkeypatch.setattr(host, "free_device_memory", lambda: 2**22 - 1)
    with pytest.raises(UserError, match="the train state does not fit: .*: take more devices"):
        check_arrays("the train state", arrays, "take more devices")
