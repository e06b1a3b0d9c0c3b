"""Measures of matrices: spectra, effective ranks, angles between subspaces, cosine and CKA.

Everything is computed in float64 numpy.

Letters: D rows and H columns of a weight; T tokens, and H numbers of a token's activation.
"""

from __future__ import annotations

import numpy as np


def singular_values(matrix) -> np.ndarray:
    """Returns the singular values of a matrix [D, H], float64 [min(D, H)], largest first."""
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


def product_singular_values(a, b) -> np.ndarray:
    """Returns the singular values of A B^T for A and B [D, H], without the product [D, D].

    With A = Q_a R_a and B = Q_b R_b they are those of R_a R_b^T, which is at most H x H.

    Returns:
      float64 [min(D, H)], largest first.
    """
    r_a = np.linalg.qr(np.asarray(a, np.float64), mode="r")
    r_b = np.linalg.qr(np.asarray(b, np.float64), mode="r")
    return singular_values(r_a @ r_b.T)


def effective_rank(values) -> float:
    """Returns exp of the entropy of p_i = s_i / sum(s) (Roy & Vetterli 2007, definition 1).

    It is 1 for rank one, and n for n equal singular values.

    Args:
      values: singular values, not all zero.
    """
    p = np.asarray(values, np.float64)
    p = p[p > 0] / p.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def stable_rank(values) -> float:
    """Returns sum(s_i^2) / s_1^2 (Rudelson & Vershynin 2007).

    It says how many directions carry the energy.

    Args:
      values: singular values, not all zero.
    """
    squares = np.asarray(values, np.float64) ** 2
    return float(squares.sum() / squares.max())


def principal_angles(a, b) -> np.ndarray:
    """Returns the angles between the column spaces of A and B [D, H], in radians, smallest first.

    The cosines are the singular values of U_a^T U_b with orthonormal bases U (Bjorck & Golub
    1973, theorem 1).
    """
    basis_a, _ = np.linalg.qr(np.asarray(a, np.float64))
    basis_b, _ = np.linalg.qr(np.asarray(b, np.float64))
    cosines = singular_values(basis_a.T @ basis_b)
    return np.arccos(np.clip(cosines, 0, 1))  # rounding can give more than 1


def cosine(a, b) -> float:
    """Returns <A, B> / (|A| |B|) of two weights as vectors: whether their numbers are the same.

    It does not compare what the maps do. With a rotation R of the head's numbers, A and A R carry
    the same information, and their cosine is near 0. So the cosine of keys and values can be near
    0 although their activations agree by `linear_cka`.
    """
    a = np.asarray(a, np.float64).ravel()
    b = np.asarray(b, np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def linear_cka(x, y) -> float:
    """Returns |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F) of centred activations.

    Kornblith et al. 2019, equations 3 and 4. It is 1 where Y is X rotated and scaled, and 0 where
    no direction of one predicts any of the other.

    Args:
      x, y: [T, H] and [T, H'], the same tokens.
    """
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    x = x - x.mean(0)
    y = y - y.mean(0)
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / norms)


def asymmetry(scores) -> np.ndarray:
    """Returns |S - S^T|_F / (|S|_F + |S^T|_F) over the last two axes.

    It is 0 for a symmetric matrix, and 1 for an antisymmetric one.

    Args:
      scores: [..., T, T].
    """
    scores = np.asarray(scores, np.float64)
    difference = scores - np.swapaxes(scores, -1, -2)
    norm = np.linalg.norm(scores, axis=(-2, -1))  # also that of the transpose
    return np.linalg.norm(difference, axis=(-2, -1)) / (2 * norm)


def diagonal_mass(weights) -> np.ndarray:
    """Returns the mean over queries of the attention that a token gives to itself.

    Args:
      weights: [..., T, T], rows that sum to one.
    """
    return np.diagonal(np.asarray(weights, np.float64), axis1=-2, axis2=-1).mean(-1)


def entropy(weights) -> np.ndarray:
    """Returns the mean over queries of -sum_j a_ij ln a_ij, in nats.

    Args:
      weights: [..., T, T], rows that sum to one.
    """
    a = np.asarray(weights, np.float64)
    logs = np.log(np.where(a > 0, a, 1))  # 0 ln 0 is 0
    return -np.sum(a * logs, axis=-1).mean(-1)
