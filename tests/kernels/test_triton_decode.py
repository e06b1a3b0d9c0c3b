"""The decode kernel without a GPU: interpreted against the reference, in a model, lowered."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_triton import lowered, relative

from qkvjax.attention.layers import RMSNorm
from qkvjax.attention.position import rotate
from qkvjax.errors import UserError
from qkvjax.generation import decode as decoding
from qkvjax.kernels import choice, reference
from qkvjax.kernels.stored import KeyOfState, quantize, widen
from qkvjax.kernels.triton import decode as triton_decode

B, S, N, H = 3, 150, 4, 64
PLACES = jnp.array([[10, 11], [100, 101], [148, 149]])  # of the new tokens, rubbish behind them
# How keys and values come from the cache.
MODES = ("two tensors", "one tensor", "raw", "raw, normed", "raw, normed, in part")


def case(mode, heads, tokens, second, dtype=jnp.float32):
    """(q, the kernel's other arguments, what the reference takes as k, v, q_pe, k_pe)."""
    keys = jax.random.split(jax.random.key(0), 6)
    draw = lambda i, *shape: jax.random.normal(keys[i], shape).astype(dtype)  # noqa: E731
    q, k = draw(0, B, tokens, N, H), draw(1, B, S, heads, H)
    given, truth = {"k": k, "v": None}, {"k": k, "v": k}
    if mode == "two tensors":
        given["v"] = truth["v"] = draw(2, B, S, heads, H)
    elif mode != "one tensor":
        width, norm = 32 if "in part" in mode else H, RMSNorm(H)
        norm.gain[...] = 1 + 0.1 * jax.random.normal(keys[5], (H,))
        normed = norm(k) if "normed" in mode else k
        given["key"] = KeyOfState(1e4, width, norm.gain[...] if "normed" in mode else None)
        truth["k"] = rotate(normed, jnp.arange(S)[None], base=1e4, width=width)
    if second:
        pair = {"q_pe": draw(3, B, tokens, N, 1), "k_pe": draw(4, B, S, heads, 1)}
        given, truth = given | pair, truth | pair
    return q, given, truth


def check(mode, heads, tokens, window, second, splits, dtype=jnp.float32, tolerance=2e-6):
    q, given, truth = case(mode, heads, tokens, second, dtype)
    positions = PLACES[:, 2 - min(tokens, 2) :]
    if tokens > 2:
        positions = jnp.arange(tokens)[None] + jnp.array([[0], [7], [S - tokens]])
    mask = reference.visible(positions, jnp.arange(S)[None], causal=True, window=window)
    with jax.default_matmul_precision("highest"):
        expected = reference.attention(q, mask=mask, **truth)
        actual = triton_decode.decode(
            q, positions=positions, window=window, splits=splits, interpret=True, **given
        )
    assert actual.dtype == dtype
    assert relative(actual, expected) < tolerance, (mode, heads, tokens, window, second, splits)


def covering():
    """Each mode with every value of the other switches at least once, most pairs of them."""
    switches = itertools.cycle(
        [(4, 1, None, False, 1), (1, 2, 20, True, 4), (2, 1, 20, False, 3), (1, 40, None, True, 2)]
    )
    for mode in MODES:
        for _ in range(3):
            yield mode, *next(switches)


@pytest.mark.parametrize("mode", MODES)
def test_against_the_reference(mode):
    for given in covering():
        if given[0] == mode:
            check(*given)


@pytest.mark.slow
def test_all_combinations():
    switches = ((4, 2, 1), (1, 2, 40), (None, 20), (False, True), (None, 1, 4))
    for mode, *rest in itertools.product(MODES, *switches):
        check(mode, *rest)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16(mode):
    check(mode, 2, 2, None, False, 2, jnp.bfloat16, 0.02)


@pytest.mark.parametrize("slots", [1, 15, 16, 65, 300])
def test_caches_of_any_length(slots):
    """What lies behind the last position is never counted, and no slot counts twice."""
    q, k = jax.random.normal(jax.random.key(0), (2, 2, slots, 2, 16))
    positions = jnp.array([[slots - 1], [slots // 2]])
    mask = reference.visible(positions, jnp.arange(slots)[None], causal=True)
    expected = reference.attention(q[:, :1], k, mask=mask)
    for splits in (None, 1, 3):
        actual = triton_decode.decode(
            q[:, :1], k, positions=positions, splits=splits, interpret=True
        )
        np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.fixture
def interpreted(monkeypatch):
    """`impl="triton"` runs here; what its decode kernel was given is kept."""
    calls = []
    decode = triton_decode.decode

    def kept(q, **arguments):
        calls.append(arguments)
        return decode(q, interpret=True, **arguments)

    monkeypatch.setattr(choice, "missing", lambda impl: None)
    monkeypatch.setattr(triton_decode, "decode", kept)
    return calls


@pytest.mark.parametrize("values", ["raw", "rotated", "unrotated_output"])
def test_a_model_decodes_as_its_forward_pass(model, interpreted, values):
    """Prompt and tokens one by one; the shared state is the only tensor that the kernel reads."""
    model = model(
        num_layers=1,
        d_model=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        sharing="q-k=v",
        position="rope",
        rotary_values=values,
        qk_norm=True,
    )
    ids = jax.random.randint(jax.random.key(1), (2, 9), 0, 61)
    full = model.logits(model.hidden(ids)[0])
    cache = decoding.empty_caches(model, 2, 20, jnp.float32)
    assert list(cache[0]) == ["kv"]
    start, actual = 0, []
    for size in (6, 1, 1, 1):
        logits, cache = decoding.decode(
            model,
            model.stack.layers(),
            cache,
            ids[:, start : start + size],
            jnp.int32(start),
            dtype=jnp.float32,
            impl="triton",
        )
        actual.append(logits)
        start += size
    np.testing.assert_allclose(jnp.concatenate(actual, 1), full, atol=1e-5 * abs(full).max())
    assert all(call["v"] is None for call in interpreted) and len(interpreted) == 4
    assert all((call["key"] is not None) == (values == "raw") for call in interpreted)


def test_what_does_not_turn_may_be_several_powers_of_two(monkeypatch):
    """A quarter of 128 numbers: two halves of 16, and 64 + 32."""
    assert triton_decode.pieces_of(32, 128) == (16, 16, 64, 32)
    monkeypatch.setitem(globals(), "H", 128)
    check("raw, normed, in part", 2, 1, None, False, 2)
    assert triton_decode.cannot_make(KeyOfState(1e4, 32), 128) is None
    assert "a multiple of 16" in triton_decode.cannot_make(KeyOfState(1e4, 32), 72)
    assert "not rotated" in triton_decode.cannot_make(KeyOfState(1e4, 0), 64)


def test_codes_with_a_second_part_of_the_scores():
    q, given, truth = case("two tensors", 2, 1, second=True)
    codes = {name: quantize(given[name]) for name in "kv"}
    truth |= {name: widen(codes[name], jnp.float32) for name in "kv"}
    positions = PLACES[:, -1:]
    mask = reference.visible(positions, jnp.arange(S)[None], causal=True)
    with jax.default_matmul_precision("highest"):
        expected = reference.attention(q, mask=mask, **truth)
        actual = triton_decode.decode(q, positions=positions, interpret=True, **(given | codes))
    assert relative(actual, expected) < 2e-6


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("mode", ["two tensors", "one tensor", "raw", "raw, in part"])
def test_lowers_for_cuda(width, mode):
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    q, k = shape(2, 1, 8, width), shape(2, 1000, 2, width)
    v = k if mode == "two tensors" else None
    key = None
    if mode.startswith("raw"):
        key = KeyOfState(1e4, max(32, width // 4) if "in part" in mode else width)
    run = functools.partial(triton_decode.decode, key=key)
    gain = shape(width, dtype=jnp.float32)

    def call(q, k, v, positions, gain):
        made = None if key is None else KeyOfState(key.base, key.width, gain)
        return run(q, k, v, positions=positions, key=made)

    module = lowered(call, q, k, v, shape(2, 1, dtype=jnp.int32), gain)
    assert "attention_decode" in module


def test_what_it_does_not_take():
    q, k = jnp.zeros((1, 1, 2, 64)), jnp.zeros((1, 32, 2, 64))
    with pytest.raises(UserError, match="rotates 24 of 64 .*powers of two"):
        triton_decode.decode(q, k, positions=jnp.zeros((1, 1), int), key=KeyOfState(1e4, 24))
    with pytest.raises(UserError, match="head width.*not 48"):
        triton_decode.decode(q[..., :48], k[..., :48], positions=jnp.zeros((1, 1), int))


@pytest.mark.parametrize("values", ["raw", "unrotated_output"])
def test_the_cache_is_not_copied(model, interpreted, values):
    """Compiled, the arguments of the kernel need no second array as large as a layer's cache."""
    model = model(
        num_layers=1,
        d_model=32,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        sharing="q-k=v",
        position="rope",
        rotary_values=values,
        qk_norm=False,
    )
    cache = decoding.empty_caches(model, 2, 4096, jnp.float32)
    run = jax.jit(
        lambda cache, ids: decoding.decode(
            model, model.stack.layers(), cache, ids, jnp.int32(9), dtype=jnp.float32, impl="triton"
        ),
        donate_argnums=0,
    )
    compiled = run.lower(cache, jnp.ones((2, 1), int)).compile().as_text()
    assert "transpose" not in "".join(
        line for line in compiled.splitlines() if "4096" in line.split("(")[0]
    )
