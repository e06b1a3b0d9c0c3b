"""The Hopper kernels without a GPU: interpreted against the reference, and lowered for CUDA."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from qkvjax.errors import UserError
from qkvjax.kernels import choice, dispatch, reference
from qkvjax.kernels.hopper import attention as hopper

B, T, N, H = 2, 150, 2, 64
BLOCKS = hopper.Blocks(64, 64, 2)
SEGMENTS = jnp.array([[0] * 70 + [1] * 80, [0] * 150])
SWITCHES = ("causal", "banded", "packed", "one_tile", "grouped")
needs_interpreter = pytest.mark.skipif(
    not hasattr(mosaic_gpu, "InterpretGPUParams"), reason="jax interprets such kernels from 0.11 on"
)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def check(switches):
    """Output and gradients in bfloat16; the interpreter looks for races."""
    causal, banded, packed, one_tile, grouped = switches
    kv = 1 if grouped else N
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"q": N, "k": kv} | ({} if one_tile else {"v": kv})
    arrays = {
        name: jax.random.normal(key, (B, T, heads, H), jnp.bfloat16)
        for key, (name, heads) in zip(keys, shapes.items())
    }
    options = {"causal": causal, "window": 40 if banded else None}
    segments = SEGMENTS if packed else None
    positions = jnp.arange(T)[None]
    mask = reference.visible(
        positions, positions, q_segments=segments, k_segments=segments, **options
    )
    run = functools.partial(
        hopper.attention,
        **options,
        segment_ids=segments,
        forward=BLOCKS,
        backward=BLOCKS,
        interpret=mosaic_gpu.InterpretGPUParams(detect_races=True),
    )
    slope = jax.random.normal(keys[3], (B, T, N, H), jnp.bfloat16)

    def ours(arrays):  # no jit: the interpreter cannot run two kernels side by side
        out, back = jax.vjp(lambda arrays: run(**arrays), arrays)
        return {"out": out} | back(slope)[0]

    @jax.jit
    def truth(arrays):
        arrays = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
        out, back = jax.vjp(lambda arrays: reference.attention(**arrays, mask=mask), arrays)
        return {"out": out} | back(slope.astype(jnp.float32))[0]

    actual, expected = ours(arrays), truth(arrays)
    for name, value in actual.items():
        assert value.dtype == jnp.bfloat16
        where = f"{name}: {dict(zip(SWITCHES, switches))}"
        assert relative(value, expected[name]) < 0.01, where


@needs_interpreter
@pytest.mark.parametrize(
    "switches",
    [
        (True, False, False, True, True),
        (True, True, True, False, False),
        (False, False, True, True, False),
        (False, True, False, False, True),
    ],
)
def test_forward_and_gradient_are_the_references(switches):
    check(switches)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("switches", itertools.product((False, True), repeat=5))
def test_all_combinations(switches):
    check(switches)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("one_tile", [False, True])
def test_lowers_for_cuda(width, one_tile):
    """At its default tiles; the lowering refuses what needs more shared memory than there is."""
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    arrays = {"q": shape(2, 512, 4, width), "k": shape(2, 512, 2, width)}
    if not one_tile:
        arrays["v"] = shape(2, 512, 2, width)

    def loss(arrays, segments):
        out = hopper.attention(**arrays, segment_ids=segments)
        return jnp.sum(out.astype(jnp.float32))

    device = {"device_kind": "NVIDIA H200", "num_cores": None}
    if "platform" in AbstractDevice.__dataclass_fields__:
        device["platform"] = "gpu"
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice(**device)
    )
    names = ("mosaic_gpu", "mosaic_gpu_v2", "__gpu$xla.gpu.triton", "triton_kernel_call")
    unchecked = [export.DisabledSafetyCheck.custom_call(name) for name in names]
    with use_abstract_mesh(mesh):
        exported = export.export(
            jax.jit(jax.grad(loss)), platforms=["cuda"], disabled_checks=unchecked
        )
        module = exported(arrays, shape(2, 512, dtype=jnp.int32)).mlir_module()
    assert "attention_hopper_forward" in module
    assert ("attention_hopper_keys" in module) == (width < 256 or one_tile)
    assert ("attention_hopper_queries" in module) == (width < 256)


def test_what_it_does_not_take(monkeypatch):
    monkeypatch.setattr(choice, "missing", lambda impl: None)
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(UserError, match="'hopper' cannot compute this.*64, 128, 256, not 32"):
        dispatch.attention(q[..., :32], q[..., :32], impl="hopper")
    with pytest.raises(UserError, match="bfloat16, float16, not float32"):
        dispatch.attention(q.astype(jnp.float32), q.astype(jnp.float32), impl="hopper")
    with pytest.raises(UserError, match="does not support a second part"):
        hopper.attention(q, q, q_pe=q, k_pe=q)
