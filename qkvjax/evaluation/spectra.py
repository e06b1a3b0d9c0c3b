"""Measures of matrices: spectra, effective ranks, angles between subspaces, cosine and CKA.

Everything is computed in float64 numpy. Letters: D rows, H columns of a weight; T tokens, H
numbers of an activation.
"""

from __future__ import annotations

import numpy as np


def singular_values(matrix) -> np.ndarray:
    """The singular values, float64 [min(D, H)], largest first."""
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


def product_singular_values(a, b) -> np.ndarray:
    """Singular values of A B^T for A [D, H] and B [D, H]: float64 [H].

    With A = Q_a R_a and B = Q_b R_b they are those of R_a R_b^T, H x H.
    """
    factors = [np.linalg.qr(np.asarray(m, np.float64), mode="r") for m in (a, b)]
    return singular_values(factors[0] @ factors[1].T)


def effective_rank(values) -> float:
    """exp of the entropy of p_i = s_i / sum(s) (Roy & Vetterli 2007, definition 1).

    1 for rank one, n for n equal singular values.

    Args:
      values: singular values, not all zero.
    """
    p = np.asarray(values, np.float64)
    p = p[p > 0] / p.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def stable_rank(values) -> float:
    """sum(s_i^2) / s_1^2 (Rudelson & Vershynin 2007): how many directions carry the energy."""
    squares = np.asarray(values, np.float64) ** 2
    return float(squares.sum() / squares.max())


def principal_angles(a, b) -> np.ndarray:
    """Angles between the column spaces of A and B [D, H] in radians, smallest first.

    The cosines are the singular values of U_a^T U_b with orthonormal bases U (Bjorck & Golub
    1973, theorem 1).
    """
    bases = [np.linalg.qr(np.asarray(m, np.float64))[0] for m in (a, b)]
    return np.arccos(np.clip(singular_values(bases[0].T @ bases[1]), 0, 1))


def cosine(a, b) -> float:
    """<A, B> / (|A| |B|) of two weights as vectors: whether they hold the same numbers.

    It knows nothing of what the maps do: A and A R with a rotation R of the head's numbers have
    cosine near 0 and carry the same information. That is why it is near 0 for keys and values
    whose activations agree by `linear_cka`.
    """
    a, b = (np.asarray(m, np.float64).ravel() for m in (a, b))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def linear_cka(x, y) -> float:
    """|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F) of centred activations (Kornblith et al. 2019, eq. 3-4).

    1 where Y is X rotated and scaled, 0 where no direction of one predicts any of the other.

    Args:
      x, y: [T, H] and [T, H'], the same tokens.
    """
    x, y = (np.asarray(m, np.float64) for m in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    size = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / size)


def asymmetry(scores) -> np.ndarray:
    """|S - S^T|_F / (|S|_F + |S^T|_F) over the last two axes: 0 symmetric, 1 antisymmetric.

    Args:
      scores: [..., T, T].
    """
    scores = np.asarray(scores, np.float64)
    norm = lambda m: np.linalg.norm(m, axis=(-2, -1))  # noqa: E731
    return norm(scores - np.swapaxes(scores, -1, -2)) / (2 * norm(scores))


def diagonal_mass(weights) -> np.ndarray:
    """Mean over queries of the attention a token gives to itself.

    Args:
      weights: [..., T, T], rows that sum to one.
    """
    return np.diagonal(np.asarray(weights, np.float64), axis1=-2, axis2=-1).mean(-1)


def entropy(weights) -> np.ndarray:
    """Mean over queries of -sum_j a_ij ln a_ij, in nats."""
    a = np.asarray(weights, np.float64)
    return -np.sum(np.where(a > 0, a * np.log(np.where(a > 0, a, 1)), 0), axis=-1).mean(-1)
