"""Costs of one layer, counted by hand and in the arrays that are really there."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from qkvjax.attention import cache as caches
from qkvjax.attention.layer import Attention
from qkvjax.attention.spec import SHARINGS, AttentionSpec

# Projections of width d^2: what the paper's table of costs counts (the output aside).
PROJECTIONS = {"q-k-v": 3, "q-k=v": 2, "q=k-v": 2, "q=v-k": 2, "q=k=v": 1}
# Every sharing with every number of key-value heads (of 4) that it allows.
LEGAL = [
    (sharing, heads)
    for sharing, heads in itertools.product(SHARINGS, (4, 2, 1))
    if heads == 4 or sharing in ("q-k-v", "q-k=v")
]


@pytest.mark.parametrize("sharing", SHARINGS)
def test_square_projections_and_pairs(sharing):
    spec = AttentionSpec(d_model=64, num_heads=4, sharing=sharing)
    assert spec.num_params == (PROJECTIONS[sharing] + 1) * 64**2
    projected = 100 * (PROJECTIONS[sharing] + 1) * 64**2
    assert spec.forward_macs(100) == projected + 2 * 100 * 100 * 64


def test_window_leaves_a_band_of_pairs():
    plain, causal, both = (
        AttentionSpec(d_model=64, num_heads=4, window=window, causal=causal)
        for window, causal in ((None, True), (8, True), (8, False))
    )
    projected = 100 * plain.num_params
    assert causal.forward_macs(100) == projected + 2 * 100 * 8 * 64
    assert both.forward_macs(100) == projected + 2 * 100 * 15 * 64
    assert causal.forward_macs(5) == plain.forward_macs(5)


@pytest.mark.parametrize(("sharing", "num_kv_heads"), LEGAL)
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_num_params_counts_the_leaves(sharing, num_kv_heads, use_bias, qk_norm):
    for head_dim in (None, 6):
        spec = AttentionSpec(
            d_model=32,
            num_heads=4,
            num_kv_heads=num_kv_heads,
            sharing=sharing,
            head_dim=head_dim,
            use_bias=use_bias,
            qk_norm=qk_norm,
            position="rope",
        )
        layer = jax.eval_shape(lambda s=spec: Attention(s, key=jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(layer)) == spec.num_params


@pytest.mark.parametrize(("sharing", "num_kv_heads"), LEGAL)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_allocated_cache_is_what_the_spec_says(sharing, num_kv_heads, dtype):
    spec = AttentionSpec(d_model=32, num_heads=4, num_kv_heads=num_kv_heads, sharing=sharing)
    for layout in ("kv", "shared") if spec.shares_kv else ("kv",):
        cache = caches.empty(spec, 3, 17, dtype, layout)
        assert len(cache) == (1 if layout == "shared" else 2)
        assert caches.num_bytes(cache) == 3 * 17 * spec.cache_bytes_per_token(dtype, layout)
    smallest = caches.num_bytes(caches.empty(spec, 3, 17, dtype))
    tensors = 1 if sharing in ("q-k=v", "q=k=v") else 2
    scale = 2 if dtype == jnp.int8 else 0
    head = 8 * jnp.dtype(dtype).itemsize + scale
    assert smallest == 3 * 17 * tensors * num_kv_heads * head


@pytest.mark.parametrize(
    ("sharing", "num_kv_heads", "saved"),
    [
        ("q-k-v", 16, 0),
        ("q=k-v", 16, 0),
        ("q-k=v", 16, 0.5),
        ("q=k=v", 16, 0.5),
        ("q-k-v", 4, 0.75),
        ("q-k=v", 4, 0.875),
        ("q-k-v", 1, 0.9375),
        ("q-k=v", 1, 0.96875),
    ],
)
def test_part_of_the_cache_saved(sharing, num_kv_heads, saved):
    """The paper's column, from allocated bytes: 1 - m g / (2 H) for m tensors of g of H heads."""
    full = AttentionSpec(d_model=64, num_heads=16)
    spec = AttentionSpec(d_model=64, num_heads=16, num_kv_heads=num_kv_heads, sharing=sharing)
    size = lambda s: caches.num_bytes(caches.empty(s, 2, 9, jnp.bfloat16))  # noqa: E731
    assert 1 - size(spec) / size(full) == saved


@pytest.mark.parametrize(
    ("sharing", "num_kv_heads", "intensity"),
    [("q-k-v", 8, 1), ("q-k=v", 8, 2), ("q-k-v", 2, 4), ("q-k=v", 2, 8), ("q-k=v", 1, 16)],
)
def test_arithmetic_intensity_of_decoding(sharing, num_kv_heads, intensity):
    """2 G / m FLOPs a byte at two bytes a number."""
    spec = AttentionSpec(d_model=64, num_heads=8, num_kv_heads=num_kv_heads, sharing=sharing)
    assert spec.decode_arithmetic_intensity("bfloat16") == intensity
    assert spec.decode_arithmetic_intensity("float32") == intensity / 2
