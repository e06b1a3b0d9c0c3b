"""The Triton kernels without a GPU: interpreted against the reference, and lowered for CUDA."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from qkvjax.errors import UserError
from qkvjax.kernels import choice, dispatch, reference
from qkvjax.kernels.triton import attention as triton
from qkvjax.kernels.triton import grid
from qkvjax.parallel.mesh import make_mesh

B, T, N, H, P = 2, 77, 4, 16, 3
BLOCKS = triton.Blocks(32, 16, 4, 2)
SEGMENTS = jnp.array([[0] * 30 + [1] * 47, [0] * 77])
SWITCHES = ("causal", "banded", "packed", "one_tile", "two_parts", "grouped")


def covering(full: bool):
    """All 64 combinations of six switches, or eight in which every two meet in every way."""
    for a, b, c in itertools.product((False, True), repeat=3):
        if full:
            yield from ((a, b, c, *rest) for rest in itertools.product((False, True), repeat=3))
        else:
            yield a, b, c, a ^ b, b ^ c, a ^ c


def case(switches, dtype=jnp.float32):
    """(arrays, options, mask) of one combination."""
    causal, banded, packed, one_tile, two_parts, grouped = switches
    kv = 2 if grouped else N
    shapes = {"q": (N, H), "k": (kv, H), "v": (kv, H), "q_pe": (N, P), "k_pe": (kv, P)}
    if one_tile:
        del shapes["v"]
    if not two_parts:
        del shapes["q_pe"], shapes["k_pe"]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = {
        name: jax.random.normal(key, (B, T, *shape)).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items())
    }
    options = {"causal": causal, "window": 20 if banded else None}
    segments = SEGMENTS if packed else None
    positions = jnp.arange(T)[None]
    mask = reference.visible(
        positions, positions, q_segments=segments, k_segments=segments, **options
    )
    return arrays, options | {"segment_ids": segments}, mask


def interpreted(arrays, **options):
    return triton.attention(**arrays, **options, forward=BLOCKS, backward=BLOCKS, interpret=True)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def check(switches, dtype, tolerance):
    arrays, options, mask = case(switches, dtype)
    truth = lambda arrays: reference.attention(**arrays, mask=mask)  # noqa: E731
    with jax.default_matmul_precision("highest"):
        out, back = jax.vjp(jax.jit(functools.partial(interpreted, **options)), arrays)
        expected, truth_back = jax.vjp(jax.jit(truth), arrays)
        slope = jnp.cos(expected)
        actual = {"out": (out, expected)}
        for name, gradient in truth_back(slope)[0].items():
            actual[name] = back(slope)[0][name], gradient
    for name, (a, b) in actual.items():
        assert a.dtype == dtype and a.shape == b.shape
        assert relative(a, b) < tolerance, f"{name}: {dict(zip(SWITCHES, switches))}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02)])
def test_forward_and_gradient_are_the_references(dtype, tolerance):
    for switches in list(covering(False))[:: 1 if dtype == jnp.float32 else 3]:
        check(switches, dtype, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02)])
def test_all_combinations(dtype, tolerance):
    for switches in covering(True):
        check(switches, dtype, tolerance)


@pytest.mark.parametrize(("length", "width"), [(1, 16), (17, 64), (130, 128)])
def test_lengths_and_widths_at_the_default_blocks(length, width):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, length, 2, width))
    positions = jnp.arange(length)[None]
    mask = reference.visible(positions, positions, causal=True)
    actual = triton.attention(q, k[:, :, :1], interpret=True)
    expected = reference.attention(q, k[:, :, :1], mask=mask)
    np.testing.assert_allclose(actual, expected, atol=3e-6)


def test_masked_tiles_are_skipped():
    """Rubbish in keys that no query can see, which a product would spread as nan."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 128, 1, 16))
    run = functools.partial(interpreted, segment_ids=None, causal=True)
    expected = run({"q": q, "k": k}, window=None)
    actual = run({"q": q, "k": k.at[:, 64:].set(jnp.nan)}, window=None)
    np.testing.assert_array_equal(actual[:, :64], expected[:, :64])
    expected = run({"q": q, "k": k}, window=16)
    actual = run({"q": q, "k": k.at[:, :32].set(jnp.nan)}, window=16)
    np.testing.assert_array_equal(actual[:, 64:], expected[:, 64:])


def lowered(function, *arguments):
    """The CUDA module, from a machine without one."""
    device = {"device_kind": "NVIDIA H200", "num_cores": None}
    if "platform" in AbstractDevice.__dataclass_fields__:
        device["platform"] = "gpu"
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice(**device)
    )
    names = {"__gpu$xla.gpu.triton", getattr(grid.lowering, "CUSTOM_CALL_TARGET_NAME", "")}
    unchecked = [export.DisabledSafetyCheck.custom_call(name) for name in names if name]
    with use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        exported = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=unchecked)
        return exported(*arguments).mlir_module()


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("one_tile", [False, True])
def test_lowers_for_cuda(width, one_tile):
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    arrays = {
        "q": shape(2, 512, 4, width),
        "k": shape(2, 512, 2, width),
        "q_pe": shape(2, 512, 4, 1),
        "k_pe": shape(2, 512, 2, 1),
    }
    if not one_tile:
        arrays["v"] = shape(2, 512, 2, width)

    def loss(arrays, segments):
        out = triton.attention(**arrays, segment_ids=segments, window=100)
        return jnp.sum(out.astype(jnp.float32))

    module = lowered(jax.grad(loss), arrays, shape(2, 512, dtype=jnp.int32))
    assert all(f"attention_{kernel}" in module for kernel in ("forward", "keys", "queries"))


def test_on_a_mesh_each_device_computes_its_own_sequences(monkeypatch):
    monkeypatch.setattr(choice, "missing", lambda impl: None)
    monkeypatch.setattr(
        triton, "attention", functools.partial(triton.attention, interpret=True, forward=BLOCKS)
    )
    q, k = jax.random.normal(jax.random.key(0), (2, 2, 40, 2, 16))
    segments = jnp.array([[0] * 20 + [1] * 20] * 2)
    run = jax.jit(lambda q, k, s: dispatch.attention(q, k, segment_ids=s, impl="triton"))
    expected = dispatch.attention(q, k, segment_ids=segments, impl="reference")
    np.testing.assert_allclose(run(q, k, segments), expected, atol=3e-6)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        np.testing.assert_allclose(run(q, k, segments), expected, atol=3e-6)


def test_what_it_does_not_take(monkeypatch):
    monkeypatch.setattr(choice, "missing", lambda impl: None)
    q = jnp.zeros((1, 8, 2, 44))
    with pytest.raises(UserError, match="'triton' cannot compute this.*multiple of 8 .* not 44"):
        dispatch.attention(q, q, impl="triton")
    with pytest.raises(UserError, match="dtype must be one of"):
        triton.attention(*(jnp.zeros((1, 8, 2, 16), jnp.float8_e4m3fn),) * 2)
    with pytest.raises(UserError, match="block of 48.*powers of two"):
        triton.attention(q[..., :16], q[..., :16], forward=triton.Blocks(48, 16, 4, 1))


@pytest.mark.parametrize("values", ["raw", "unrotated_output"])
def test_a_layer_of_one_projection_takes_the_kernel(monkeypatch, values, model):
    """Q = K = V, and Q = K with rotated keys beside raw values."""
    calls, run = [], triton.attention

    def kept(q, k, v=None, **options):
        calls.append((q is k, v is None))
        return run(q, k, v, interpret=True, forward=BLOCKS, backward=BLOCKS, **options)

    monkeypatch.setattr(choice, "missing", lambda impl: None)
    monkeypatch.setattr(triton, "attention", kept)
    small = model(num_layers=1, d_model=64, num_heads=2, sharing="q=k=v", rotary_values=values)
    ids = jax.random.randint(jax.random.key(1), (2, 20), 0, 61)
    np.testing.assert_allclose(small(ids, impl="triton"), small(ids), atol=2e-4)
    assert calls == [(True, values != "raw")]


@pytest.mark.parametrize("one_tile", [False, True])
@pytest.mark.parametrize("width", [24, 40])
def test_heads_of_other_widths_are_filled_up(width, one_tile):
    shapes = [(1, 40, 4, width), (1, 40, 2, width)] + ([] if one_tile else [(1, 40, 2, 16)])
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]
    positions = jnp.arange(40)[None]
    mask = reference.visible(positions, positions, causal=True)
    run = functools.partial(triton.attention, forward=BLOCKS, backward=BLOCKS, interpret=True)
    with jax.default_matmul_precision("highest"):
        out, back = jax.vjp(run, *arrays)
        expected, truth = jax.vjp(functools.partial(reference.attention, mask=mask), *arrays)
        assert relative(out, expected) < 2e-6
        for actual, gradient in zip(back(jnp.cos(out)), truth(jnp.cos(expected)), strict=True):
            assert relative(actual, gradient) < 2e-6
