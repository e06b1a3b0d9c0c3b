"""Measures of matrices whose answers are known."""

import numpy as np
import pytest

from qkvjax.evaluation import spectra


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def orthogonal(rng, n):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def test_singular_values_of_a_constructed_matrix(rng):
    values = np.array([5.0, 3.0, 0.5])
    matrix = orthogonal(rng, 6)[:, :3] * values @ orthogonal(rng, 3)
    np.testing.assert_allclose(spectra.singular_values(matrix), values)


def test_the_product_is_not_formed_but_its_spectrum_is_right(rng):
    a, b = rng.normal(size=(2, 20, 4))
    np.testing.assert_allclose(
        spectra.product_singular_values(a, b), spectra.singular_values(a @ b.T)[:4]
    )


@pytest.mark.parametrize("n", [1, 2, 7])
def test_ranks_of_equal_values(n):
    assert spectra.effective_rank(np.full(n, 0.3)) == pytest.approx(n)
    assert spectra.stable_rank(np.full(n, 0.3)) == pytest.approx(n)


def test_ranks_of_unequal_values():
    # p = (1/2, 1/4, 1/4): entropy 1.5 ln 2, and energy (4 + 1 + 1) / 4
    assert spectra.effective_rank([2, 1, 1, 0]) == pytest.approx(2**1.5)
    assert spectra.stable_rank([2, 1, 1, 0]) == pytest.approx(1.5)


def test_principal_angles_of_known_planes():
    e = np.eye(4)
    tilted = np.stack([e[0], np.cos(0.3) * e[1] + np.sin(0.3) * e[2]], axis=1)
    np.testing.assert_allclose(spectra.principal_angles(e[:, :2], tilted), [0, 0.3], atol=1e-7)
    np.testing.assert_allclose(spectra.principal_angles(e[:, :2], e[:, 2:]), [np.pi / 2] * 2)


def test_cosine_and_cka_disagree_about_a_rotated_map(rng):
    """Keys whose numbers are rotated: the weights differ, their information is the same."""
    x, w = rng.normal(size=(500, 64)), rng.normal(size=(64, 64))
    rotated = w @ orthogonal(rng, 64)
    assert abs(spectra.cosine(w, rotated)) < 0.15
    assert spectra.linear_cka(x @ w, 3 * x @ rotated + 1) == pytest.approx(1)
    assert spectra.cosine(w, 2 * w) == pytest.approx(1)


def test_cka_of_unrelated_activations(rng):
    x, y = rng.normal(size=(2, 4000, 4))
    assert spectra.linear_cka(x, y) < 0.01
    half = np.concatenate([x[:, :2], y[:, :2]], axis=1)
    assert 0.3 < spectra.linear_cka(x, half) < 0.7


def test_asymmetry(rng):
    s = rng.normal(size=(2, 3, 5, 5))
    transposed = np.swapaxes(s, -1, -2)
    np.testing.assert_allclose(spectra.asymmetry(s + transposed), 0, atol=1e-12)
    np.testing.assert_allclose(spectra.asymmetry(s - transposed), 1)
    assert spectra.asymmetry(s).shape == (2, 3)


def test_attention_of_a_token_to_itself_and_entropy():
    same, even = np.eye(4), np.full((4, 4), 0.25)
    np.testing.assert_allclose(spectra.diagonal_mass(np.stack([same, even])), [1, 0.25])
    np.testing.assert_allclose(spectra.entropy(np.stack([same, even])), [0, np.log(4)])
