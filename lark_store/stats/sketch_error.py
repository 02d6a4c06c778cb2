"""Sketch error of figures over queries: how far a figure would move with another seed of the sketcher.

One map (a permutation and signs) serves all samples and queries, so the errors of their cosines are correlated: one
seed shifts a whole group. More queries don't average the error out, and a bootstrap over queries can't see it. So each
figure is bounded as if all queries erred together: the standard deviations σ of the queries' Φ (`noise`) become their
*mean*, not σ / √Q. No joint law with these σ gives the mean a larger deviation. Measured deviations are about a half to
three quarters of the bound (`tests/stats/test_sketch_error.py`).

The two sides of a comparison are assumed to err independently. In fact they share the query and mostly a direction, so
their errors partly cancel: for two sources in the same form the difference errs by a quarter of the bound.

A jackknife over blocks of bins would be tighter, but it must read the sketches of the best samples, 128 KB each; the
bound needs only the rows stored by `attribute`.

Not included: the maximum over n noisy scores is too high by up to σ √(2 ln n) where many samples are nearly level.

Shape letters: Q queries. NaN noise is unknown and makes the error of a figure unknown.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def noise_of(phi_Q: Floats, weight_Q: Floats, k: int | Floats) -> Floats:
    """Return the standard deviation of Φ = Σ w ρ over checkpoints, at most W (1 − (Φ / W)²) / √k with W = Σ w, (Q,).

    ρ are cosines of sketches and w > 0 their factors: learning rates, gradient norms. One cosine at one checkpoint has
    W = 1 and (1 − ρ²)/√k. For several, Σ w (1 − ρ²) is largest where all ρ are equal, and the checkpoints share the
    map, so their errors are added.
    """
    weight_Q = np.where(weight_Q > 0, weight_Q, np.nan)
    noise: Floats = weight_Q * np.maximum(1 - np.square(phi_Q / weight_Q), 0) / np.sqrt(k)
    return noise


def of_mean(noise_Q: Floats) -> float:
    """Return the error of a mean over queries."""
    return float(noise_Q.mean()) if len(noise_Q) else np.nan


def of_difference(left_Q: Floats, right_Q: Floats) -> float:
    """Return the error of a mean difference, from the noises of its sides."""
    return of_mean(np.hypot(left_Q, right_Q))


def of_ratio_of_means(top_Q: Floats, bottom_Q: Floats, noise_top_Q: Floats, noise_bottom_Q: Floats) -> float:
    """Return the error of mean top / mean bottom, to first order; NaN unless both are above 0."""
    top, bottom = (side.mean() if len(side) else 0.0 for side in (top_Q, bottom_Q))
    if not (top > 0 and bottom > 0):
        return np.nan
    return float(np.hypot(of_mean(noise_top_Q), top / bottom * of_mean(noise_bottom_Q)) / bottom)


def of_share(difference_Q: Floats, left_Q: Floats, right_Q: Floats) -> float:
    """Return the error of the share of queries with a difference above 0.

    With p a query's probability of a difference above 0 under another seed, the variance is largest if the queries move
    together: the mean over pairs of min(p, p') − p p'.
    """
    n = len(difference_Q)
    if n == 0:
        return np.nan
    noise_Q = np.hypot(left_Q, right_Q)
    sure_Q = np.where(difference_Q > 0, np.inf, -np.inf)
    z_Q = np.divide(difference_Q, noise_Q, out=sure_Q, where=~(noise_Q == 0))
    p_Q = np.array([math.erfc(-z / math.sqrt(2)) / 2 for z in z_Q])  # without scipy, which takes long to import
    least = np.sort(p_Q) @ (2 * np.arange(n, 0, -1) - 1) / n**2
    return float(np.sqrt(np.maximum(least - p_Q.mean() ** 2, 0)))
