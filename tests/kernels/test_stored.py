"""What a cache stores: int8 within half a step, writes in place, pages in the table's order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkvjax.attention.cache import block_table
from qkvjax.errors import UserError
from qkvjax.kernels.stored import in_order, quantize, widen, write


@settings(max_examples=30)
@given(seed=st.integers(0, 999), size=st.floats(-12, 12))
def test_int8_is_off_by_half_a_step(seed, size):
    x = 10.0**size * np.random.default_rng(seed).standard_normal((3, 5, 16)).astype(np.float32)
    back = np.asarray(widen(quantize(jnp.asarray(x)), jnp.float32))
    # The scale is rounded to bfloat16, and the largest number is clipped to it.
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert np.all(np.abs(back - x) <= step * (0.5 + 127 * 2**-8))


@settings(max_examples=30)
@given(seed=st.integers(0, 999))
def test_codes_are_of_the_scale_that_is_stored(seed):
    """And not of the scale before it is rounded to bfloat16, with which reading would be off."""
    x = np.random.default_rng(seed).standard_normal((5, 16)).astype(np.float32)
    codes, scales = quantize(jnp.asarray(x))
    stored_scales = np.asarray(scales.astype(jnp.float32))[:, None]
    np.testing.assert_array_equal(codes, np.clip(np.round(x / stored_scales), -127, 127))
    assert np.all(
        abs(np.asarray(widen(quantize(jnp.asarray(x)), jnp.float32)) - x) <= 0.501 * stored_scales
    )


def test_zeros_stay_zeros():
    assert not np.any(widen(quantize(jnp.zeros((2, 8))), jnp.float32))


@pytest.mark.parametrize("start", [3, [3, 1]])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("codes", [False, True])
def test_what_is_written_is_read(start, paged, codes):
    """New tokens lie in their slots, all others as before."""
    B, T, K, H, size = 2, 4, 3, 8, 4
    new = jax.random.normal(jax.random.key(0), (B, T, K, H))
    table = jnp.array([[4, 0, 2], [1, 5, 3]]) if paged else None
    shape = (6, K, size, H) if paged else (B, K, 12, H)
    old = jax.random.normal(jax.random.key(1), shape)
    old = quantize(old) if codes else old
    read = lambda x: np.asarray(widen(in_order(x, table), jnp.float32)).swapaxes(1, 2)  # noqa: E731
    expected = read(old).copy()
    for b, first in enumerate(np.broadcast_to(start, B)):
        expected[b, first : first + T] = read_back(new[b], codes)
    np.testing.assert_array_equal(read(write(old, new, jnp.asarray(start), table)), expected)


def read_back(x, codes):
    return np.asarray(widen(quantize(x), jnp.float32) if codes else x)


def test_pages_are_handed_out_once():
    table = block_table([5, 9, 1], 4, 6)
    np.testing.assert_array_equal(table, [[0, 1, 6], [2, 3, 4], [5, 6, 6]])
    with pytest.raises(UserError, match=r"tokens need 6 pages of 4, and the pool has 5"):
        block_table([5, 9, 1], 4, 5)


@pytest.mark.parametrize("start", [np.int32(3), np.int64(3)])
def test_places_of_any_integer_are_taken_in_float64(start):
    with jax.enable_x64(True):
        actual = write(jnp.zeros((2, 2, 8, 4)), jnp.ones((2, 1, 2, 4)), jnp.asarray(start), None)
        actual = np.asarray(actual)
    assert actual.dtype == np.float64 and actual.sum() == actual[:, :, 3].sum() == 16
