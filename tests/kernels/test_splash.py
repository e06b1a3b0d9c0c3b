"""jax's splash attention as we call it: interpreted against the reference."""

import functools

import jax
import jax.numpy as jnp
import pytest
from test_triton import relative

from qkvjax.errors import UserError
from qkvjax.kernels import reference
from qkvjax.kernels.tpu import splash

B, T, N, H = 2, 150, 4, 16
SEGMENTS = jnp.array([[0] * 70 + [1] * 80, [0] * 150])
CASES = [  # causal, window, segments, key-value heads, K = V
    (True, None, None, 2, False),
    (True, None, SEGMENTS, 4, True),
    (True, 40, SEGMENTS, 1, False),
    (False, None, None, 2, False),
    (False, 40, SEGMENTS, 2, False),
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("causal", "window", "segments", "kv_heads", "tied"), CASES)
def test_forward_and_gradient_are_the_references(causal, window, segments, kv_heads, tied, dtype):
    """At a length that no tile divides."""
    if dtype == jnp.bfloat16 and (window or not causal):
        pytest.skip("the dtype does not meet the masks")
    shapes = [(B, T, N, H), (B, T, kv_heads, H)] + ([] if tied else [(B, T, kv_heads, H)])
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes)]
    options = {"causal": causal, "window": window}
    positions = jnp.arange(T)[None]
    mask = reference.visible(
        positions, positions, q_segments=segments, k_segments=segments, **options
    )
    run = functools.partial(
        splash.attention, **options, segment_ids=segments, scale=0.3, interpret=True
    )
    truth = functools.partial(reference.attention, mask=mask, scale=0.3)

    def both(function, arrays):
        out, back = jax.vjp(function, *arrays)
        return [out, *back(jnp.cos(out))]

    with jax.default_matmul_precision("highest"):
        actual = jax.jit(functools.partial(both, run))(arrays)
        wide = [array.astype(jnp.float32) for array in arrays]
        expected = jax.jit(functools.partial(both, truth))(wide)
    tolerance = 2e-6 if dtype == jnp.float32 else 0.02
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype and relative(a, b) < tolerance


def test_what_it_does_not_take():
    q = jnp.zeros((1, 8, 2, 16))
    assert splash.refusal(q) is None
    assert "second part" in splash.refusal(q, q_pe=q)
    with pytest.raises(UserError, match="multiple of 8 up to 256, not 12; use impl='auto'"):
        splash.attention(q[..., :12], q[..., :12])
