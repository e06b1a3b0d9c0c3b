"""Layers that make keys from stored states: each rotates them by its own angles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.attention import cache as caches
from qkvjax.attention.layer import Attention
from qkvjax.attention.spec import AttentionSpec

B, T, D = 2, 6, 16
BASES = (10_000.0, 50.0)


@pytest.fixture
def layers(filled):
    """Two layers of raw K = V whose rotations differ."""
    specs = [
        AttentionSpec(
            d_model=D, num_heads=2, sharing="q-k=v", position="rope", rotary_base=base, qk_norm=True
        )
        for base in BASES
    ]
    return [filled(lambda spec=spec: Attention(spec, key=jax.random.key(0))) for spec in specs]


@pytest.mark.parametrize("computed_before", [False, True])
def test_each_layer_has_its_own_rotation(layers, computed_before):
    """Token by token through both layers is the pass over the whole sequence."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    positions = jnp.tile(jnp.arange(T), (B, 1))
    expected = x
    for layer in layers:
        expected = expected + layer(expected, positions)

    specs = [layer.spec for layer in layers]
    rotations = caches.rotations(specs, T + 2) if computed_before else None
    if computed_before:
        assert {base for base, _ in rotations} == set(BASES)
    state = [caches.empty(spec, B, T + 2) for spec in specs]
    outputs = []
    for i in range(T):
        token = x[:, i : i + 1]
        for n, layer in enumerate(layers):
            y, state[n] = caches.attend(layer, token, state[n], jnp.int32(i), rotations=rotations)
            token = token + y
        outputs.append(token)
    assert all(list(cache) == ["kv"] for cache in state)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, atol=2e-5)
