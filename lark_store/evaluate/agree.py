"""Agreement of two rows of numbers, row by row: rank correlation and AUC. Shape letters: Q rows, N numbers each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def spearman(score_QN: NDArray[Any], truth_QN: NDArray[Any]) -> Floats:
    """Return the rank correlation of each row of scores with its truth, (Q,); of equal numbers the mean rank.

    A score that is the same for all says nothing: 0. A truth that is the same for all can't be agreed with: NaN.

    >>> spearman(np.array([[1, 2, 3], [5, 5, 5], [1, 2, 3]]), np.array([[1, 4, 9], [1, 2, 3], [7, 7, 7]])).tolist()
    [1.0, 0.0, nan]
    """
    from scipy.stats import rankdata

    a, b = (rankdata(x, axis=1) - (x.shape[1] + 1) / 2 for x in (score_QN, truth_QN))
    spread_a, spread_b = (a**2).sum(axis=1), (b**2).sum(axis=1)
    both = np.sqrt(spread_a * spread_b)
    found: Floats = np.divide((a * b).sum(axis=1), both, out=np.zeros(len(a)), where=both > 0)
    return np.where(spread_b > 0, found, np.nan)


def auc(score_QN: NDArray[Any], is_positive_N: NDArray[np.bool_]) -> Floats:
    """Return how often a positive sample has a higher score than a negative one, ties half, (Q,): Mann and Whitney's U.

    >>> auc(np.array([[3.0, 1.0, 2.0, 2.0]]), np.array([True, False, True, False])).tolist()
    [0.875]
    """
    from scipy.stats import rankdata

    n = int(is_positive_N.sum())
    ranks = rankdata(score_QN, axis=1)[:, is_positive_N].sum(axis=1)
    found: Floats = (ranks - n * (n + 1) / 2) / (n * (len(is_positive_N) - n))
    return found
