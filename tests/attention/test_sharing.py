"""What the layer computes: ties, symmetric scores, and what a shared value may know of places.

B = 2 sequences of T = 7 tokens; D = 16, heads of 8.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.attention.layer import Attention
from qkvjax.attention.spec import AttentionSpec

T = 7


@pytest.fixture
def make(filled):
    """Makes a layer of random numbers; arguments are fields of its spec."""

    def layer(**fields):
        spec = AttentionSpec(**({"d_model": 16, "num_heads": 2, "head_dim": 8} | fields))
        return filled(lambda: Attention(spec, key=jax.random.key(0)))

    return layer


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(3).normal(size=(2, T, 16)), jnp.float32)


@pytest.fixture(scope="module")
def positions():
    return jnp.tile(jnp.arange(T), (2, 1))


# ---- scores ---------------------------------------------------------------------------------


def asymmetry(layer, x, positions):
    """|S - S^T| / |S + S^T|, as the scores enter the softmax."""
    q, entry = layer.project(x, positions, "kv")
    scores = jnp.einsum("btnh,bsnh->bnts", q, entry["k"])
    other = jnp.swapaxes(scores, -1, -2)
    return float(jnp.linalg.norm(scores - other) / jnp.linalg.norm(scores + other))


@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_scores_are_symmetric_exactly_where_q_equals_k(make, x, positions, position, qk_norm):
    for sharing in ("q=k-v", "q=k=v", "q-k-v", "q-k=v", "q=v-k"):
        layer = make(sharing=sharing, position=position, qk_norm=qk_norm, use_bias=True)
        found = asymmetry(layer, x, positions)
        assert found < 1e-6 if "q=k" in sharing else found > 0.1, sharing


# ---- ties -----------------------------------------------------------------------------------


def untied(layer, **fields):
    """The layer without ties, each role with a copy of its block's parameters."""
    spec = layer.spec
    fields = {"num_kv_heads": spec.num_kv_heads, "position": spec.position} | fields
    free = AttentionSpec(
        spec.d_model,
        spec.num_heads,
        head_dim=spec.head_dim,
        qk_norm=spec.qk_norm,
        use_bias=spec.use_bias,
        **fields,
    )
    copy = jax.eval_shape(lambda: Attention(free, key=jax.random.key(0)))
    block = lambda role: "".join(spec.block(role))  # noqa: E731
    for role in "qkv":
        copy.projections[role] = layer.projections[block(role)]
    for role in "qk" if spec.qk_norm else "":
        copy.norms[role] = layer.norms[block(role)]
    copy.output = layer.output
    return copy


@pytest.mark.parametrize(
    ("sharing", "num_kv_heads", "position", "qk_norm"),
    [
        ("q-k=v", 2, "rope", True),
        ("q-k=v", 1, "none", False),
        ("q=k-v", 2, "rope", True),
        ("q=v-k", 2, "none", True),
        ("q=k=v", 2, "rope", True),
    ],
)
def test_a_tie_is_equal_weights(make, x, positions, sharing, num_kv_heads, position, qk_norm):
    """Outputs are those of copied weights, and the tied gradient is the sum of the copies'."""
    tied = make(
        sharing=sharing,
        num_kv_heads=num_kv_heads,
        position=position,
        qk_norm=qk_norm,
        use_bias=True,
    )
    free = untied(tied)
    loss = lambda layer: jnp.sum(jnp.sin(3 * layer(x, positions)))  # noqa: E731
    np.testing.assert_allclose(tied(x, positions), free(x, positions), atol=1e-5)
    got, copies = jax.grad(loss)(tied), jax.grad(loss)(free)

    def compare(name, found, group):
        roles = [role for role in name if role in group]
        parts = [leaves(group[role]) for role in roles]
        for leaf, value in leaves(found).items():
            expected = sum(part[leaf] for part in parts)
            assert jnp.max(abs(expected)) > 1e-3 or leaf == "bias", (name, leaf)
            np.testing.assert_allclose(value, expected, atol=2e-4, err_msg=f"{name} {leaf}")

    for name, projection in got.projections.items():
        compare(name, projection, copies.projections)
    for name, gain in got.norms.items():
        compare(name, gain, copies.norms)


def leaves(module):
    return {
        name: getattr(module, name)[...]
        for name in ("weight", "bias", "gain")
        if hasattr(module, name)
    }


# ---- places ---------------------------------------------------------------------------------

SHARED_VALUES = ("q-k=v", "q=v-k", "q=k=v")


def turn(x, positions):
    """R_p x for heads x [..., H] and places p broadcast to x[..., 0], by complex numbers."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    angles = positions[..., None] * 10_000.0 ** (-np.arange(half) / half)
    z = z * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("values", ["raw", "rotated", "unrotated_output"])
@pytest.mark.parametrize("sharing", SHARED_VALUES)
def test_what_the_value_is(make, x, positions, sharing, values):
    """y_i is sum_j a_ij s_j, sum_j a_ij R_j s_j or sum_j a_ij R_{j-i} s_j of raw states s."""
    layer = make(sharing=sharing, position="rope", rotary_values=values)

    def state(role):
        weight = np.asarray(layer.projections["".join(layer.spec.block(role))].weight, np.float64)
        return (np.asarray(x, np.float64) @ weight).reshape(2, T, 2, 8)

    places = np.arange(T)
    q, k = (turn(state(role), places[:, None]) for role in "qk")
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
    scores = np.where(places[:, None] >= places, scores, -np.inf)
    a = np.exp(scores - scores.max(-1, keepdims=True))
    a /= a.sum(-1, keepdims=True)
    s = np.broadcast_to(state("v")[:, None], (2, T, T, 2, 8))  # [B, i, j, N, H]
    i, j = places[:, None, None], places[None, :, None]
    by = {"raw": 0 * j, "rotated": j + 0 * i, "unrotated_output": j - i}[values]
    expected = np.einsum("bnij,bijnh->binh", a, turn(s, by))
    expected = expected.reshape(2, T, 16) @ np.asarray(layer.output.weight, np.float64)
    np.testing.assert_allclose(layer(x, positions), expected, atol=2e-5)


@pytest.mark.parametrize("values", ["raw", "rotated", "unrotated_output"])
@pytest.mark.parametrize("sharing", SHARED_VALUES)
def test_only_rotated_values_know_absolute_places(make, x, positions, sharing, values):
    layer = make(sharing=sharing, position="rope", rotary_values=values, qk_norm=True)
    moved = jnp.max(abs(layer(x, positions + 50) - layer(x, positions)))
    assert moved > 0.1 if values == "rotated" else moved < 1e-4


# ---- who sees whom --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("causal", "window", "packed"),
    [
        (True, None, False),
        (False, None, False),
        (True, 3, False),
        (False, 3, False),
        (True, 1, False),
        (True, None, True),
        (False, 2, True),
    ],
)
@pytest.mark.parametrize("sharing", ["q-k-v", "q-k=v"])
def test_influence_is_the_mask(make, x, positions, sharing, causal, window, packed):
    """Output i moves with input j exactly where i sees j."""
    layer = make(sharing=sharing, causal=causal, window=window, position="rope")
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1]] * (T + 1)) if packed else None
    rows = np.array([x[0]] * (T + 1))  # row j has another token j, the last row none
    rows[range(T), range(T)] += 1
    y = np.asarray(layer(jnp.asarray(rows), jnp.tile(positions[:1], (T + 1, 1)), segments))
    influence = np.max(abs(y[:T] - y[T]), axis=-1).T  # [i, j]
    i, j = np.indices((T, T))
    sees = (i >= j) | (not causal)
    if window:
        sees &= abs(i - j) < window
    if packed:
        sees &= (i < 3) == (j < 3)
    np.testing.assert_array_equal(influence > 1e-5, sees)
