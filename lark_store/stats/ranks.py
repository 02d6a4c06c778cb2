"""Rank correlation and AUC, row by row. Shape letters: Q rows, N numbers each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def spearman(score_QN: NDArray[Any], truth_QN: NDArray[Any]) -> Floats:
    """Return the rank correlation of each row of scores with its truth, (Q,). Ties get their mean rank.

    A constant score gives 0, a constant truth NaN.

    >>> spearman(np.array([[1, 2, 3], [5, 5, 5], [1, 2, 3]]), np.array([[1, 4, 9], [1, 2, 3], [7, 7, 7]])).tolist()
    [1.0, 0.0, nan]
    """
    from scipy.stats import rankdata

    a, b = (rankdata(x, axis=1) - (x.shape[1] + 1) / 2 for x in (score_QN, truth_QN))
    spread_a, spread_b = (a**2).sum(axis=1), (b**2).sum(axis=1)
    scale = np.sqrt(spread_a * spread_b)
    correlation_Q: Floats = np.divide((a * b).sum(axis=1), scale, out=np.zeros(len(a)), where=scale > 0)
    return np.where(spread_b > 0, correlation_Q, np.nan)


def auc(score_QN: NDArray[Any], is_positive_N: NDArray[np.bool_]) -> Floats:
    """Return how often a positive sample scores higher than a negative one, (Q,): Mann–Whitney U, ties count half.

    >>> auc(np.array([[3.0, 1.0, 2.0, 2.0]]), np.array([True, False, True, False])).tolist()
    [0.875]
    """
    from scipy.stats import rankdata

    n = int(is_positive_N.sum())
    ranks = rankdata(score_QN, axis=1)[:, is_positive_N].sum(axis=1)
    auc_Q: Floats = (ranks - n * (n + 1) / 2) / (n * (len(is_positive_N) - n))
    return auc_Q
