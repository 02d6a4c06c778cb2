"""Figures of one square matrix of measured influence between statements, by their roles. Pure functions.

M[i, j] is the influence of statement i on statement j. Shape letters: N statements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]

NOISE_QUANTILE = 0.95  # of the influence from and on unrelated statements


def asymmetry(matrix_NN: Floats, *, diagonal: bool = True) -> float:
    """Return ‖M − Mᵀ‖ / ‖M + Mᵀ‖ (Frobenius): 0 is symmetric; about 1 for independent entries of either sign.

    >>> asymmetry(np.array([[1.0, 2.0], [2.0, 5.0]])), asymmetry(np.array([[0.0, 1.0], [-1.0, 0.0]]))
    (0.0, inf)
    """
    matrix = matrix_NN if diagonal else np.where(np.eye(len(matrix_NN), dtype=bool), 0.0, matrix_NN)
    odd, even = np.linalg.norm(matrix - matrix.T), np.linalg.norm(matrix + matrix.T)
    return float(odd / even) if even else np.inf


def self_over_others(matrix_NN: Floats) -> float:
    """Return how much more a statement helps itself than the others, the mean over statements.

    >>> self_over_others(np.array([[3.0, 1.0], [0.0, 2.0]]))
    2.0
    """
    n = len(matrix_NN)
    own = np.trace(matrix_NN) / n
    return float(own - (matrix_NN.sum() - np.trace(matrix_NN)) / (n * (n - 1)))


def unrelated_pairs(matrix_NN: Floats, is_unrelated_N: Flags) -> Floats:
    """Return the influence between an unrelated statement and the related ones, in both directions, (U,)."""
    pairs: Floats = matrix_NN[is_unrelated_N[:, None] != is_unrelated_N[None, :]]
    return pairs


def related_pairs(matrix_NN: Floats, is_unrelated_N: Flags) -> Floats:
    """Return the influence between different related statements, (R,)."""
    related = matrix_NN[np.ix_(~is_unrelated_N, ~is_unrelated_N)]
    pairs: Floats = related[~np.eye(len(related), dtype=bool)]
    return pairs


def density(matrix_NN: Floats, is_unrelated_N: Flags) -> float:
    """Return the share of pairs of related statements whose influence, in size, is above the noise.

    The noise is the 95% quantile of the sizes of the influence between unrelated statements and the others.

    >>> density(np.array([[9.0, 1.0, 0.1], [3.0, 9.0, 2.0], [0.1, 2.0, 9.0]]), np.array([False, False, True]))
    0.5
    """
    noise = np.quantile(np.abs(unrelated_pairs(matrix_NN, is_unrelated_N)), NOISE_QUANTILE)
    return float((np.abs(related_pairs(matrix_NN, is_unrelated_N)) > noise).mean())
