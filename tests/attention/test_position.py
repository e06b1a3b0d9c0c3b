"""Rotation against complex numbers, sine-cosine columns against their definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.attention.position import rotate, sincos


def heads(shape=(2, 5, 3, 8), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def rotated(x, positions, base, width):
    """The complex formula in float64: number i with i + width/2 as one complex number."""
    x, positions = np.asarray(x, np.float64), np.asarray(positions, np.float64)
    half = width // 2
    z = x[..., :half] + 1j * x[..., half:width]
    frequencies = base ** (-2 * np.arange(half) / width)
    z = z * np.exp(1j * positions[:, :, None, None] * frequencies)
    return np.concatenate([z.real, z.imag, x[..., width:]], axis=-1)


@pytest.mark.parametrize(("width", "base"), [(8, 10_000.0), (4, 100.0)])
def test_rotation_is_a_complex_product(width, base):
    x, positions = heads(), jnp.array([[0, 1, 2, 3, 4], [7, 0, 31, 2, 2]])
    got = rotate(x, positions, base=base, width=width)
    np.testing.assert_allclose(got, rotated(x, positions, base, width), atol=2e-6)
    back = rotate(got, positions, base=base, width=width, inverse=True)
    np.testing.assert_allclose(back, x, atol=2e-6)


def test_rotation_keeps_the_dtype_and_computes_wide():
    x = heads().astype(jnp.bfloat16)
    positions = jnp.full((2, 5), 1003)  # which bfloat16 cannot even hold
    got = rotate(x, positions, base=10_000.0, width=8)
    assert got.dtype == jnp.bfloat16
    expected = rotated(x.astype(jnp.float32), positions, 10_000.0, 8)
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.02)


def test_products_depend_on_distance_alone():
    q, k = heads(seed=1), heads(seed=2)
    turn = lambda x, p: rotate(x, jnp.full((2, 5), p), base=10_000.0, width=8)  # noqa: E731
    near = jnp.einsum("btnh,btnh->btn", turn(q, 3), turn(k, 1))
    far = jnp.einsum("btnh,btnh->btn", turn(q, 103), turn(k, 101))
    np.testing.assert_allclose(near, far, atol=1e-4)
    other = jnp.einsum("btnh,btnh->btn", turn(q, 4), turn(k, 1))
    assert jnp.max(abs(near - other)) > 0.1


@pytest.mark.parametrize("width", [6, 5])
def test_sincos_columns(width):
    got = sincos(jnp.array([[0, 3, 17]]), width)
    assert got.shape == (1, 3, width) and got.dtype == jnp.float32
    for row, position in zip(np.asarray(got[0]), (0, 3, 17)):
        for column, value in enumerate(row):
            angle = position * 10_000 ** (-2 * (column // 2) / width)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert abs(float(value) - expected) < 1e-5
