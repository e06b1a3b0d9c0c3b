"""The TPU kernels without a TPU: interpreted against the reference."""

import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_triton_decode
from jax.experimental.pallas import tpu as lowering
from test_triton import SWITCHES, covering, relative

from qkvjax.errors import UserError
from qkvjax.generation import decode as decoding
from qkvjax.kernels import choice, reference
from qkvjax.kernels.stored import KeyOfState, quantize, widen
from qkvjax.kernels.tpu import attention as tpu
from qkvjax.kernels.tpu import decode as tpu_decode

B, T, N, H, P = 2, 300, 4, 16, 8
BLOCKS = tpu.Blocks(128, 256)
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02)]
)
MODES = test_triton_decode.MODES
WINDOW = 60
# Most of the time here is XLA's.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def in_pairs():
    """Six combinations of the switches in which every two meet in every way.

    One of zeros, and columns of three ones in five: any two such differ both ways and share one.
    """
    columns = itertools.islice(itertools.combinations(range(5), 3), len(SWITCHES))
    return [(False,) * len(SWITCHES), *zip(*([i in ones for i in range(5)] for ones in columns))]


def case(switches, dtype=jnp.float32):
    """(arrays, options, mask) of one combination."""
    causal, banded, packed, one_tile, two_parts, grouped = switches
    kv = 2 if grouped else N
    shapes = {"q": (N, H), "k": (kv, H)}
    if not one_tile:
        shapes["v"] = kv, H
    if two_parts:
        shapes |= {"q_pe": (N, P), "k_pe": (kv, P)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = {
        name: jax.random.normal(key, (B, T, *shape)).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items())
    }
    options = {"causal": causal, "window": WINDOW if banded else None}
    segments = jnp.array([[0] * 140 + [1] * 160, [0] * T]) if packed else None
    places = jnp.arange(T)[None]
    mask = reference.visible(places, places, q_segments=segments, k_segments=segments, **options)
    return arrays, options | {"segment_ids": segments}, mask


def interpreted(arrays, interpret=True, **options):
    return tpu.attention(**arrays, **options, blocks=BLOCKS, interpret=interpret)


def check(arrays, options, mask, tolerance):
    """Result and gradients of the kernels and of the reference."""
    dtype = arrays["q"].dtype
    slope = jax.random.normal(jax.random.key(1), arrays["q"].shape).astype(dtype)

    @functools.partial(quickly, static_argnums=0)
    def both(function, arrays):
        out, back = jax.vjp(function, arrays)
        return {"out": out} | back(slope)[0]

    with jax.default_matmul_precision("highest"):
        actual = both(functools.partial(interpreted, **options), arrays)
        expected = both(lambda arrays: reference.attention(**arrays, mask=mask), arrays)
    for name, b in expected.items():
        a = actual[name]
        assert a.dtype == dtype and a.shape == b.shape
        assert relative(a, b) < tolerance, f"{name}: {list(arrays)}, {options}"


@DTYPES
def test_forward_and_gradient_are_the_references(dtype, tolerance):
    for switches in in_pairs() if dtype == jnp.float32 else in_pairs()[1:3]:
        check(*case(switches, dtype), tolerance)


@pytest.mark.slow
@DTYPES
def test_all_combinations(dtype, tolerance):
    for switches in covering(True):
        check(*case(switches, dtype), tolerance)


@pytest.mark.parametrize(("length", "width"), [(1, 8), (130, 128)])
def test_lengths_and_widths_at_the_default_blocks(length, width):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, length, 2, width))
    places = jnp.arange(length)[None]
    mask = reference.visible(places, places, causal=True)
    actual = quickly(functools.partial(tpu.attention, interpret=True))(q, k[:, :, :1])
    expected = reference.attention(q, k[:, :, :1], mask=mask)
    np.testing.assert_allclose(actual, expected, atol=3e-6)


def test_masked_tiles_are_skipped():
    """Rubbish in keys that no query can see, which a product would spread as nan."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 512, 1, 16))
    run = quickly(functools.partial(interpreted, causal=True), static_argnames="window")
    expected = run({"q": q, "k": k}, window=None)
    actual = run({"q": q, "k": k.at[:, 256:].set(jnp.nan)}, window=None)
    np.testing.assert_array_equal(actual[:, :256], expected[:, :256])
    expected = run({"q": q, "k": k}, window=100)
    actual = run({"q": q, "k": k.at[:, :256].set(jnp.nan)}, window=100)
    np.testing.assert_array_equal(actual[:, 384:], expected[:, 384:])
    packed = functools.partial(run, window=None, segment_ids=jnp.arange(512)[None] // 256)
    actual = packed({"q": q, "k": k.at[:, :256].set(jnp.nan)})
    np.testing.assert_array_equal(actual[:, 256:], packed({"q": q, "k": k})[:, 256:])


def test_a_window_bounds_the_steps_of_a_tile():
    options = tpu.Options(True, 100, 1.0, 8192, BLOCKS, BLOCKS, False)
    queries = jnp.zeros((1, 1, 8192, 8))
    for by_keys, steps in ((False, options.steps(128, 256)), (True, options.steps(256, 128))):
        begins, ends = options.ends(BLOCKS, [queries], None, by_keys)
        most = jnp.max(ends - begins)
        assert most <= steps <= most + 1


def test_no_races():
    """Simulated with its copies and semaphores; memory nobody wrote reads as nan."""
    simulated = lowering.InterpretParams(detect_races=True)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 512, 2, 16))
    places = jnp.arange(512)[None]
    mask = reference.visible(places, places, causal=True)
    check({"q": q, "k": k[:, :, :1]}, {"interpret": simulated}, mask, 2e-6)
    assert not races().races_found
    k, positions = k[:, :200], jnp.array([[190]])
    actual = decoded(q[:, :1], {"k": k}, positions, interpret=simulated)
    assert relative(actual, expected_of(q[:, :1], {"k": k}, positions)) < 2e-6
    assert not races().races_found


def races():
    """Returns what the detector found; it is not public, and moves between versions of jax."""
    package = "jax._src.pallas.mosaic.interpret"
    try:
        module = importlib.import_module(f"{package}.interpret_pallas_call")
        return module.races
    except (ImportError, AttributeError):
        pytest.skip("this jax keeps its races elsewhere")


def decoded(q, given, positions, interpret=True, **options):
    """128 slots to a tile of the 150: the last one reaches beyond the cache."""
    run = functools.partial(tpu_decode.decode, slots=128, interpret=interpret, **options)
    with jax.default_matmul_precision("highest"):
        return quickly(lambda q, given: run(q, positions=positions, **given))(q, given)


def expected_of(q, truth, positions, window=None):
    slots = jnp.arange(truth["k"].shape[1])[None]
    mask = reference.visible(positions, slots, causal=True, window=window)
    with jax.default_matmul_precision("highest"):
        return quickly(functools.partial(reference.attention, mask=mask))(q, **truth)


def check_decode(mode, heads, tokens, window, second, dtype=jnp.float32, tolerance=2e-6):
    q, given, truth = test_triton_decode.case(mode, heads, tokens, second, dtype)
    positions = test_triton_decode.PLACES[:, 2 - min(tokens, 2) :]
    if tokens > 2:
        positions = jnp.arange(tokens)[None] + jnp.array([[0], [7], [150 - tokens]])
    actual = decoded(q, given, positions, window=window)
    expected = expected_of(q, truth, positions, window)
    assert actual.dtype == dtype
    assert relative(actual, expected) < tolerance, (mode, heads, tokens, window, second)


@pytest.mark.parametrize(
    ("mode", "given"),
    [
        ("two tensors", (4, 1, None, False)),
        ("one tensor", (1, 2, 20, True)),
        ("raw, normed", (1, 100, None, True)),
        ("raw, normed, in part", (2, 2, 20, False)),
    ],
)
def test_decoding_against_the_reference(mode, given):
    check_decode(mode, *given)


def test_decoding_in_bfloat16():
    check_decode("raw, normed", 2, 2, None, False, jnp.bfloat16, 0.02)


@pytest.mark.slow
def test_decoding_in_all_combinations():
    for mode, *rest in itertools.product(MODES, (4, 2, 1), (1, 2, 100), (None, 20), (False, True)):
        check_decode(mode, *rest)


@pytest.mark.parametrize("slots", [1, 300])
def test_caches_of_any_length(slots):
    """What lies behind the last position is never counted, and no tile is read for it."""
    q, k = jax.random.normal(jax.random.key(0), (2, 2, slots, 2, 16))
    positions = jnp.array([[slots - 1], [slots // 4]])
    expected = expected_of(q[:, :1], {"k": k}, positions)
    rubbish = k.at[1, 128 * (slots // 4 // 128 + 1) :].set(jnp.nan)
    actual = decoded(q[:, :1], {"k": rubbish}, positions)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_a_cache_in_pages():
    size, count = 16, 5
    pages = jax.random.normal(jax.random.key(0), (11, size, 2, 32))  # [P, E, K, H]
    table = jnp.array([[3, 1, 4, 0, 5], [9, 2, 6, 8, 7]])
    q = jax.random.normal(jax.random.key(1), (2, 1, 4, 32))
    positions = jnp.array([[70], [18]])
    in_order = pages[table].reshape(2, size * count, 2, 32)
    key = KeyOfState(1e4, 32)
    given = {"k": pages, "table": table, "key": key}
    expected = decoded(q, {"k": in_order, "key": key}, positions)
    np.testing.assert_allclose(decoded(q, given, positions), expected, atol=2e-6)


@pytest.mark.parametrize("raw", [False, True])
def test_an_int8_cache(raw):
    """In one piece and in pages, where a head has a scale in each slot."""
    size, count, width = 16, 5, 32
    table = jnp.array([[3, 1, 4, 0, 5], [9, 2, 6, 8, 7]])
    q = jax.random.normal(jax.random.key(1), (2, 2, 4, width))
    positions = jnp.array([[69, 70], [18, 19]])
    key = KeyOfState(1e4, width) if raw else None
    pages = quantize(jax.random.normal(jax.random.key(0), (11, size, 2, width)))
    wide = widen(pages, jnp.float32)[table].reshape(2, size * count, 2, width)
    expected = decoded(q, {"k": wide, "key": key}, positions)
    in_order = jax.tree.map(lambda x: x[table].reshape(2, size * count, *x.shape[2:]), pages)
    for given in ({"k": pages, "table": table}, {"k": in_order}):
        actual = decoded(q, given | {"key": key}, positions)
        np.testing.assert_allclose(actual, expected, atol=2e-6)
    if not raw:
        again = decoded(q, {"k": in_order, "v": in_order}, positions)
        np.testing.assert_allclose(again, expected, atol=2e-6)


def test_what_they_do_not_take():
    q = jnp.zeros((1, 8, 2, 20))
    with pytest.raises(UserError, match="multiple of 8 up to 512, not 20.*impl='auto'"):
        tpu.attention(q, q)
    with pytest.raises(UserError, match="dtype must be one of float32, bfloat16, not float16"):
        tpu.attention(*(jnp.zeros((1, 8, 2, 16), jnp.float16),) * 2)
    with pytest.raises(UserError, match="block of 64 .*multiples of 128"):
        tpu.attention(q[..., :16], q[..., :16], blocks=tpu.Blocks(128, 64))
    with pytest.raises(UserError, match="tile of 100 slots.*multiples of 128"):
        tpu_decode.decode(q[..., :16], q[..., :16], positions=jnp.zeros((1, 8), int), slots=100)


def test_a_model_takes_them_where_it_is_told_to(model, monkeypatch):
    """`impl="tpu"` in the forward pass and in decoding, the state being all that is stored."""
    for module, name in ((tpu, "attention"), (tpu_decode, "decode")):
        run = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setattr(module, name, run)
    monkeypatch.setattr(choice, "missing", lambda impl: None)
    small = model(num_layers=1, d_model=64, num_heads=2, num_kv_heads=1, sharing="q-k=v")
    ids = jax.random.randint(jax.random.key(1), (1, 6), 0, 61)
    expected = small.logits(small.hidden(ids)[0])  # of padding too, as decoding gives them
    actual = small(ids, impl="tpu")
    np.testing.assert_allclose(actual, expected[..., : actual.shape[-1]], atol=2e-4)
    cache = decoding.empty_caches(small, 1, 12, jnp.float32)
    for i in range(6):
        logits, cache = decoding.decode(
            small,
            small.stack.layers(),
            cache,
            ids[:, i : i + 1],
            jnp.int32(i),
            dtype=jnp.float32,
            impl="tpu",
        )
        np.testing.assert_allclose(logits[:, 0], expected[:, i], atol=2e-4)
