"""Keys of stored states, through XLA: against keys that are made first, by the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.attention.layers import RMSNorm
from qkvjax.attention.position import rotate
from qkvjax.kernels import reference
from qkvjax.kernels.stored import KeyOfState, rotation_table
from qkvjax.kernels.xla import decode as xla_decode

SLOTS = 19


def states(batch, tokens, heads, kv_heads, width, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(batch, tokens, heads, width))
    x = 3 * rng.normal(size=(batch, SLOTS, kv_heads, width))
    gain = 1 + 0.5 * rng.normal(size=width)
    return (jnp.asarray(a, dtype) for a in (q, x, gain))


def made_first(x, key):
    """The keys, in float32."""
    keys, norm = x.astype(jnp.float32), RMSNorm(x.shape[-1])
    if key.gain is not None:
        norm.gain[...] = key.gain.astype(jnp.float32)
        keys = norm(keys)
    if not key.width:
        return keys
    return rotate(keys, jnp.arange(SLOTS)[None], base=key.base, width=key.width)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "kv_heads", "width", "rotated"),
    [
        (2, 1, 4, 4, 16, 16),
        (2, 1, 4, 2, 16, 8),
        (1, 1, 2, 1, 12, 6),
        (1, 1, 1, 1, 8, 8),
        (2, 3, 4, 2, 8, 8),
        (2, 5, 4, 2, 8, 4),
        (2, 1, 4, 4, 8, 0),
    ],
)
def test_keys_of_states(batch, tokens, heads, kv_heads, width, rotated, normed):
    q, x, gain = states(batch, tokens, heads, kv_heads, width)
    key = KeyOfState(1e4, rotated, gain if normed else None)
    positions = jnp.arange(SLOTS)[None, -tokens:]
    mask = reference.visible(positions, jnp.arange(SLOTS)[None], causal=True)
    actual = jax.jit(lambda q, x: xla_decode.decode(q, x, mask=mask, key=key))(q, x)
    expected = reference.attention(q, made_first(x, key), x, mask=mask)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def test_angles_that_were_computed_before_are_taken():
    q, x, _ = states(1, 1, 2, 2, 8)
    mask = jnp.ones((1, 1, SLOTS), bool)
    other = KeyOfState(1e4, 8, rotation=rotation_table(500.0, 8, SLOTS, jnp.float32))
    actual = xla_decode.decode(q, x, mask=mask, key=other)
    expected = xla_decode.decode(q, x, mask=mask, key=KeyOfState(500.0, 8))
    np.testing.assert_array_equal(actual, expected)


def test_states_in_bfloat16_are_summed_in_float32():
    q, x, gain = states(2, 1, 4, 4, 64, jnp.bfloat16)
    mask = jnp.ones((2, 1, SLOTS), bool)
    key = KeyOfState(1e4, 64, gain)
    actual = xla_decode.decode(q, x, mask=mask, key=key)
    exact = reference.attention(
        q.astype(jnp.float32), made_first(x, key), x.astype(jnp.float32), mask=mask
    )
    assert actual.dtype == jnp.bfloat16
    # Half a step of bfloat16 for the result, and one for the weights.
    assert jnp.max(jnp.abs(actual.astype(jnp.float32) - exact)) < 0.01 * jnp.max(jnp.abs(exact))


def test_no_keys_are_written():
    """Onto a long cache the program keeps less beside it than the keys would take."""
    heads, width, slots = 4, 64, 2048
    q, x = jnp.ones((1, 1, heads, width)), jnp.ones((1, heads, slots, width))  # as a cache lies
    mask = jnp.ones((1, 1, slots), bool)
    for gain in (None, jnp.ones(width)):
        key = KeyOfState(1e4, width, gain, rotation_table(1e4, width, slots, jnp.float32))

        @jax.jit
        def decode(q, x, key=key):
            return xla_decode.decode(q, x.swapaxes(1, 2), mask=mask, key=key)

        memory = decode.lower(q, x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < x.nbytes / 2
