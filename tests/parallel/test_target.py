"""The device that a program is compiled for."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from qkvjax.parallel.mesh import make_mesh
from qkvjax.parallel.target import capability_of, target


def mesh_of(kind, platform):
    """A mesh of one device of a kind that need not be here."""
    device = {"device_kind": kind, "num_cores": 1}
    if "platform" in AbstractDevice.__dataclass_fields__:
        device["platform"] = platform
    return AbstractMesh(
        (1,),
        ("replica",),
        axis_types=(AxisType.Explicit,),
        abstract_device=AbstractDevice(**device),
    )


@pytest.mark.parametrize(
    ("kind", "platform", "capability", "major"),
    [("NVIDIA H200", "gpu", "9.0", 9), ("TPU v5 lite", "tpu", None, 0)],
)
def test_the_mesh_decides(kind, platform, capability, major):
    with use_abstract_mesh(mesh_of(kind, platform)):
        result = target()
    assert (result.platform, result.kind, result.capability) == (platform, kind, capability)
    assert result.major == major and not result.here


def test_the_mesh_decides_inside_shard_map_too():
    """The cache is read inside `shard_map`, where each device computes on its part alone."""
    seen = []

    def local(x):
        seen.append(target())
        return x

    x = jax.ShapeDtypeStruct((2,), "float32")
    with use_abstract_mesh(mesh_of("NVIDIA H200", "gpu")):
        spec = jax.sharding.PartitionSpec()
        jax.eval_shape(jax.shard_map(local, in_specs=spec, out_specs=spec), x)
    assert [result.kind for result in seen] == ["NVIDIA H200"]


def test_without_a_mesh_it_is_the_machine():
    result = target()
    assert result.here and result.platform == jax.default_backend()
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        assert target() == result


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA A100-SXM4-80GB", "8.0"),
        ("NVIDIA A10", "8.6"),
        ("NVIDIA L4", "8.9"),
        ("NVIDIA RTX 6000 Ada Generation", "8.9"),
        ("NVIDIA RTX A6000", "8.6"),
        ("NVIDIA H100 80GB HBM3", "9.0"),
        ("NVIDIA GH200 480GB", "9.0"),
        ("NVIDIA B200", "10.0"),
        ("Tesla T4", "7.5"),
        ("AMD Instinct MI300X", None),
        ("TPU v6 lite", None),
    ],
)
def test_capabilities_of_gpus_that_this_machine_lacks(kind, capability):
    assert capability_of(kind) == capability
