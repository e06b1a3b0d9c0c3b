"""The TPU kernels lowered and compiled for a TPU that is not here.

What compiles them (`-m aot`) is libtpu, of the version that belongs to this jax, and runs with
JAX_PLATFORMS=cpu.
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from qkvjax.kernels.stored import Int8, KeyOfState
from qkvjax.kernels.tpu import attention as tpu
from qkvjax.kernels.tpu import decode as tpu_decode


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def training(one_tile, width, dtype=jnp.bfloat16, **options):
    """(a loss's gradient, its arguments) of packed sequences with a second part of scores."""
    size = functools.partial(shape, dtype=dtype)
    arrays = {
        "q": size(2, 4096, 8, width),
        "k": size(2, 4096, 2, width),
        "q_pe": size(2, 4096, 8, 64),
        "k_pe": size(2, 4096, 2, 64),
    }
    if not one_tile:
        arrays["v"] = arrays["k"]

    def loss(arrays, segments):
        out = tpu.attention(**arrays, segment_ids=segments, **options)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return jax.grad(loss), (arrays, shape(2, 4096, dtype=jnp.int32))


def serving(mode, width, dtype=jnp.bfloat16, tokens=1, page=None, int8=False):
    """(decode, its arguments) of a cache that is stored heads first."""
    size = functools.partial(shape, dtype=dtype)
    held = size(2, 8, 4000, width) if page is None else size(64, 8, page, width)
    if int8:
        held = Int8(shape(*held.shape, dtype=jnp.int8), shape(*held.shape[:3]))
    arrays = {"k": held, "v": held if mode == "two tensors" else None}
    table = None if page is None else shape(2, 32, dtype=jnp.int32)

    def run(q, arrays, positions, gain, table):
        arrays = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), arrays)
        key = KeyOfState(1e4, width, gain) if mode.startswith("raw") else None
        return tpu_decode.decode(q, **arrays, positions=positions, key=key, table=table)

    positions, gain = shape(2, tokens, dtype=jnp.int32), shape(width, dtype=jnp.float32)
    return run, (size(2, tokens, 32, width), arrays, positions, gain, table)


def abstract(kind="TPU v5 lite", cores=1):
    """A mesh of one TPU to lower for."""
    device = {"device_kind": kind, "num_cores": cores}
    if "platform" in AbstractDevice.__dataclass_fields__:
        device["platform"] = "tpu"
    return AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice(**device)
    )


def lowered(function, arguments):
    """The TPU module, from a machine without one."""
    with use_abstract_mesh(abstract()):
        return export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("one_tile", [False, True])
def test_lowers_for_tpus(width, one_tile):
    module = lowered(*training(one_tile, width, window=1000))
    assert all(f"attention_{kernel}" in module for kernel in ("forward", "keys", "queries"))
    mode = "one tensor" if one_tile else "two tensors"
    assert "attention_decode" in lowered(*serving(mode, width))
    assert "attention_decode" in lowered(*serving("raw", width, page=64, int8=one_tile))


@pytest.fixture(params=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def vmem(request, monkeypatch):
    """Compiles for one such chip: (function, arguments) -> kernel's name -> bytes of VMEM."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: install the version that belongs to this jax")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(request.param, platform="tpu").devices[0]
    chip = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())

    def run(function, arguments):
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arguments
        )
        with use_abstract_mesh(abstract(device.device_kind, getattr(device, "num_cores", 1))):
            compiled = jax.jit(function).lower(*arguments).compile().as_text()
        calls = [line for line in compiled.splitlines() if '"tpu_custom_call"' in line]
        sizes = {
            re.search(r"attention_[a-z]+", call).group(): int(size)
            for call in calls
            for size in re.findall(r'"memory_space":"1","offset":"0","size":"(\d+)"', call)
        }
        assert len(sizes) == len(calls)
        print(request.param, sizes)
        return sizes

    return run


@pytest.mark.aot
@pytest.mark.slow
def test_a_wish_for_precision_compiles(vmem):
    with jax.default_matmul_precision("highest"):
        assert vmem(*training(True, 128)) and vmem(*serving("raw", 128))


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("width", [16, 64, 128, 256, 512])
def test_the_default_blocks_fit(vmem, width, dtype):
    tied, untied = (vmem(*training(one_tile, width, dtype)) for one_tile in (True, False))
    assert set(tied) == {"attention_forward", "attention_keys", "attention_queries"}
    assert tied["attention_keys"] < untied["attention_keys"]


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128, 256])
def test_decoding_fits(vmem, width):
    for dtype, tokens, page, int8 in (
        (jnp.bfloat16, 1, None, False),
        (jnp.bfloat16, 1, None, True),
        (jnp.bfloat16, 100, 64, False),
        (jnp.bfloat16, 1, 64, True),
        (jnp.float32, 100, None, False),
    ):
        sizes = [
            vmem(*serving(mode, width, dtype, tokens, page, int8))["attention_decode"]
            for mode in ("one tensor", "two tensors", "raw")
        ]
        assert sizes[0] < sizes[1]
