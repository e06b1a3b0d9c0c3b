"""Every implementation against the reference, and the reference against plain loops."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.errors import UserError
from qkvjax.kernels import choice, cudnn, dispatch
from qkvjax.kernels.stored import KeyOfState
from qkvjax.kernels.trial import Problem
from qkvjax.kernels.xla import attention as xla
from qkvjax.parallel.target import Target

B, T, N, H, P = 2, 13, 4, 6, 3
OTHERS = [name for name in dispatch.PLAIN if name != "reference"]
SEGMENTS = jnp.array([[0] * 5 + [1] * 8, [0] * 13])


def inputs(num_kv_heads, dtype=jnp.float32):
    """q, k, v, q_pe, k_pe."""
    shapes = [(N, H), (num_kv_heads, H), (num_kv_heads, H), (N, P), (num_kv_heads, P)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(
        (1.5 * jax.random.normal(key, (B, T, *shape))).astype(dtype)
        for key, shape in zip(keys, shapes)
    )


def looped(q, k, v, q_pe, k_pe, *, causal, window, segments, scale):
    """One score at a time, in float64."""
    q, k, v, q_pe, k_pe = (np.asarray(a, np.float64) for a in (q, k, v, q_pe, k_pe))
    out = np.zeros((B, T, N, H))
    for b, n, i in np.ndindex(B, N, T):
        g = n // (N // k.shape[2])
        weights = {}
        for j in range(T):
            hidden = causal and j > i or abs(i - j) >= window or segments[b][i] != segments[b][j]
            if not hidden:
                score = scale * (q[b, i, n] @ k[b, j, g] + q_pe[b, i, n] @ k_pe[b, j, g])
                weights[j] = math.exp(score)
        out[b, i, n] = sum(w * v[b, j, g] for j, w in weights.items()) / sum(weights.values())
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 4, 5])
@pytest.mark.parametrize("impl", OTHERS)
def test_tiles_of_queries_are_the_whole(monkeypatch, impl, window):
    """Tiles of 4 queries: windows inside, at and across their edges, the last tile cut short."""
    monkeypatch.setattr(xla, "SMALLEST_TILE", 4)
    *qkv, q_pe, k_pe = inputs(2)
    options = {"window": window, "segment_ids": SEGMENTS, "q_pe": q_pe, "k_pe": k_pe}

    def total(q, k, v, impl):
        out = dispatch.attention(q, k, v, impl=impl, **options)
        return jnp.sum(jnp.sin(out)), out

    actual, expected = (
        jax.jit(jax.grad(functools.partial(total, impl=name), argnums=(0, 1, 2), has_aux=True))(
            *qkv
        )
        for name in (impl, "reference")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), actual, expected)


@pytest.mark.parametrize("length", [65, 130, 257])
def test_long_sequences_are_tiled_as_they_are(length):
    q, k = (
        jax.random.normal(key, (1, length, 2, 4)) for key in jax.random.split(jax.random.key(1))
    )
    for window in (None, 64, 66):
        actual, expected = (
            dispatch.attention(q, k, window=window, impl=impl) for impl in ("xla", "reference")
        )
        np.testing.assert_allclose(actual, expected, atol=3e-6)


@pytest.mark.parametrize("impl", dispatch.PLAIN)
@pytest.mark.parametrize(("causal", "num_kv_heads"), [(True, 2), (False, 1)])
def test_against_loops(impl, causal, num_kv_heads):
    q, k, v, q_pe, k_pe = inputs(num_kv_heads)
    expected = looped(
        q,
        k,
        v,
        q_pe,
        k_pe,
        causal=causal,
        window=4,
        segments=SEGMENTS.tolist(),
        scale=0.3,
    )
    got = dispatch.attention(
        q,
        k,
        v,
        causal=causal,
        window=4,
        segment_ids=SEGMENTS,
        scale=0.3,
        q_pe=q_pe,
        k_pe=k_pe,
        impl=impl,
    )
    np.testing.assert_allclose(got, expected, atol=3e-6)


def call(impl, options, operands):
    return dispatch.attention(**operands, **options, impl=impl)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("num_kv_heads", "dtype"),
    [
        (2, jnp.float32),
        (1, jnp.bfloat16),
        pytest.param(1, jnp.float32, marks=pytest.mark.slow),
        pytest.param(4, jnp.float32, marks=pytest.mark.slow),
        pytest.param(2, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("impl", OTHERS)
def test_forward_and_gradient_are_the_references(impl, num_kv_heads, dtype):
    """Masks, K = V and a second part of the scores, at an odd length.

    Eight of the 32 combinations, in which every two switches meet in every way; fewer in
    bfloat16.
    """
    switches = itertools.product((False, True), repeat=3)
    step = 1 if dtype == jnp.float32 else 3
    q, k, v, q_pe, k_pe = inputs(num_kv_heads, dtype)
    for causal, banded, packed in itertools.islice(switches, 0, None, step):
        one_tile = banded ^ packed
        pe = causal ^ packed
        options = {
            "causal": causal,
            "window": 4 if banded else None,
            "segment_ids": SEGMENTS if packed else None,
        }
        operands = {"q": q, "k": k}
        operands |= {} if one_tile else {"v": v}
        operands |= {"q_pe": q_pe, "k_pe": k_pe} if pe else {}
        actual, back = jax.vjp(functools.partial(call, impl, options), operands)
        truth, truth_back = jax.vjp(functools.partial(call, "reference", options), operands)
        assert actual.dtype == dtype and actual.shape == (B, T, N, H)
        cotangent = jnp.cos(truth)
        results = {"out": (actual, truth)}
        for name, gradient in truth_back(cotangent)[0].items():
            results[name] = back(cotangent)[0][name], gradient
        for name, (a, b) in results.items():
            where = f"{name}: {causal=} {banded=} {packed=} {one_tile=} {pe=}"
            assert relative(a, b) < (1e-6 if dtype == jnp.float32 else 0.02), where


@pytest.mark.parametrize("impl", dispatch.PLAIN)
def test_what_is_hidden_stays_hidden_however_large_the_scores(impl):
    """The first query sees one key, of score about -1e4, and hidden ones of about 1e4."""
    _, _, v, *_ = inputs(4)
    q = jnp.full((B, T, N, H), 50.0)
    k = jnp.full((B, T, N, H), 100.0).at[:, 0].set(-100.0)
    got = dispatch.attention(q, k, v, impl=impl)
    np.testing.assert_allclose(got[:, 0], v[:, 0], rtol=1e-6)
    np.testing.assert_allclose(got[:, 1], v[:, 1], rtol=1e-6)


@pytest.mark.parametrize("impl", dispatch.PLAIN)
def test_no_values_means_the_keys(impl):
    q, k, *_ = inputs(2)
    got = dispatch.attention(q, k, impl=impl)
    np.testing.assert_array_equal(got, dispatch.attention(q, k, k, impl=impl))
    alone = jax.grad(lambda k: jnp.sum(jnp.sin(dispatch.attention(q, k, impl=impl))))(k)
    both = jax.grad(
        lambda k, v: jnp.sum(jnp.sin(dispatch.attention(q, k, v, impl=impl))), argnums=(0, 1)
    )(k, k)
    np.testing.assert_allclose(alone, sum(both), atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("impl", dispatch.PLAIN)
def test_decoding_reads_nothing_behind_the_query(impl, window):
    """The last tokens of a causal sequence, against a cache with rubbish behind them."""
    q, k, v, *_ = inputs(2)
    whole = dispatch.attention(q, k, v, window=window, impl=impl)
    k, v = (jnp.pad(a, [(0, 0), (0, 6), (0, 0), (0, 0)], constant_values=1e4) for a in (k, v))
    positions = jnp.tile(jnp.arange(9, T), (B, 1))
    got = dispatch.decode_attention(q[:, 9:], k, v, positions=positions, window=window, impl=impl)
    np.testing.assert_allclose(got, whole[:, 9:], atol=1e-6)


def test_unknown_implementation_lists_what_is_here():
    q, k, v, *_ = inputs(2)
    with pytest.raises(UserError, match="'flash'.*xla, reference"):
        dispatch.attention(q, k, v, impl="flash")
    with pytest.raises(UserError, match="did you mean 'reference'"):
        dispatch.candidates("refrence")
    assert all(dispatch.missing(name) is None for name in dispatch.candidates())


def pretended(monkeypatch, device):
    """This machine has such a device, on which every trial passes."""
    for module in (choice, cudnn):
        monkeypatch.setattr(module, "target", lambda: device)
    monkeypatch.setattr(choice.trial, "failure", lambda *given: None)


HOPPER = Target("gpu", "NVIDIA H200", "9.0", here=True)
AMPERE = Target("gpu", "NVIDIA A100-SXM4-80GB", "8.0", here=True)
BLACKWELL = Target("gpu", "NVIDIA B200", "10.0", here=True)
OLD = Target("gpu", "Tesla T4", "7.5", here=True)
TPU = Target("tpu", "TPU v5 lite", None, here=True)
NARROW = Problem("bfloat16", 64, 64, 1, 256)


@pytest.mark.parametrize(
    ("device", "changes", "name"),
    [
        (HOPPER, {}, "hopper"),
        (HOPPER, {"second": 64}, "triton"),
        (HOPPER, {"width": 24, "value_width": 24}, "cudnn"),
        (HOPPER, {"width": 24, "value_width": 24, "packed": True}, "triton"),
        (HOPPER, {"values_are_keys": False}, "cudnn"),
        (HOPPER, {"values_are_keys": False, "packed": True}, "hopper"),
        (HOPPER, {"dtype": "float32"}, "triton"),
        (HOPPER, {"whole": False}, "xla"),
        (HOPPER, {"decodes": True}, "triton"),
        (HOPPER, {"decodes": True, "values_are_keys": False}, "triton"),
        (AMPERE, {}, "cudnn"),
        (AMPERE, {"packed": True}, "triton"),
        (AMPERE, {"packed": True, "values_are_keys": False}, "triton"),
        (AMPERE, {"window": 30, "causal": False}, "triton"),
        (AMPERE, {"width": 256, "value_width": 256}, "triton"),
        (AMPERE, {"decodes": True}, "xla"),
        (BLACKWELL, {"width": 256, "value_width": 256}, "cudnn"),
        (TPU, {}, "tpu"),
        (TPU, {"values_are_keys": False}, "splash"),
        (TPU, {"values_are_keys": False, "packed": True, "dtype": "float32"}, "splash"),
        (TPU, {"values_are_keys": False, "second": 1}, "tpu"),
        (OLD, {}, "xla"),
    ],
)
def test_auto_takes_the_best_that_takes_the_arguments(monkeypatch, device, changes, name):
    pretended(monkeypatch, device)
    assert choice.choose("auto", dataclasses.replace(NARROW, **changes)) == name


def test_auto_says_why_not_something_better(monkeypatch, capsys):
    pretended(monkeypatch, HOPPER)
    for _ in range(2):  # said once
        choice.choose("auto", NARROW)
        choice.choose("auto", dataclasses.replace(NARROW, second=64))
        choice.choose("auto", dataclasses.replace(NARROW, whole=False))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "attention: hopper" and len(lines) == 3
    assert lines[1].startswith("attention: triton; not hopper: it does not support a second part")
    assert lines[2].startswith("attention: xla, whose memory grows with the square of the length;")
    assert lines[2].count("it needs whole sequences") == 3
    pretended(monkeypatch, OLD)
    choice.choose("auto", NARROW)
    assert capsys.readouterr().err == (
        "attention: xla, whose memory grows with the square of the length\n"
    )


def test_a_kernel_that_cannot_run_here_says_so():
    if dispatch.missing("triton") is None:
        pytest.skip("this machine has a GPU that runs it")
    q, k, v, *_ = inputs(2)
    with pytest.raises(UserError, match="needs an NVIDIA GPU .*this machine has xla, reference"):
        dispatch.attention(q, k, v, impl="triton")


@pytest.mark.parametrize("impl", ["xla", "reference"])
@pytest.mark.parametrize("shape", [(2, T - 1), (T,), (3, T), (2, T, 1), (1, T)])
def test_segment_ids_are_one_a_token(impl, shape):
    q, k, v, *_ = inputs(2)
    with pytest.raises(UserError, match=rf"segment_ids .*\({len(q)}, {T}\)"):
        dispatch.attention(q, k, v, segment_ids=jnp.zeros(shape, int), impl=impl)


def test_pages_that_the_kernel_does_not_take_go_to_xla(monkeypatch):
    """On a Hopper GPU, which is pretended; and keys that it does not make are made first."""
    pretended(monkeypatch, HOPPER)
    q = jnp.zeros((1, 1, 2, 64), jnp.bfloat16)
    cache = dataclasses.replace(NARROW, length=1, decodes=True)
    for page, name in ((None, "triton"), (16, "triton"), (7, "xla"), (8, "xla")):
        assert choice.choose("auto", dataclasses.replace(cache, page=page)) == name
    for width, made in ((64, True), (32, True), (16, False), (0, False)):
        assert dispatch.makes_keys("auto", q, 2, KeyOfState(1e4, width), 16) == made
    assert dispatch.makes_keys("auto", q, 2, KeyOfState(1e4, 16), page=7)  # xla, of few rows
    assert not dispatch.makes_keys("auto", jnp.tile(q, (1, 9, 1, 1)), 2, KeyOfState(1e4, 16), 7)


def test_the_reference_makes_no_keys():
    q = jnp.zeros((1, 1, 2, 8))
    with pytest.raises(UserError, match="make them first"):
        dispatch.decode_attention(
            q, q, positions=jnp.zeros((1, 1), int), key=KeyOfState(1e4, 8), impl="reference"
        )
