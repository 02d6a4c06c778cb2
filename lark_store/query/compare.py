"""Figures over queries: their value, a bootstrap interval and a paired permutation test. Pure functions.

Shape letters: Q queries, F figures, R resamples of one batch. Figures over the same number of queries are resampled
together: the same seed would draw the same resamples for each, and a resampled mean is then one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 9_999
_NUMBERS = 1_000_000  # of a batch of resamples: bounds the memory
_TOGETHER = 256


@dataclass(frozen=True)
class Figure:
    """One figure: the mean over queries of `top` (Q), or that mean over the mean of `bottom` (Q).

    `difference` (of any length) holds Φ_left − Φ_right per query for the test; None where nothing is compared.
    `is_share` says that `top` holds 0 or 1 for each query.
    """

    names: dict[str, Any]
    top: Floats
    bottom: Floats | None = None
    difference: Floats | None = None
    is_share: bool = False


def evaluate(figures: list[Figure]) -> list[dict[str, Any]]:
    """Return a row for each figure: its names, value, low, high, p_value and n_queries; NaN is undefined."""
    rows: list[dict[str, Any]] = [
        {**f.names, "value": np.nan, "low": np.nan, "high": np.nan, "p_value": np.nan, "n_queries": len(f.top)}
        for f in figures
    ]
    for some in _alike(figures, lambda f: (len(f.top), f.bottom is not None)):
        top = np.stack([figures[i].top for i in some], axis=1)
        bottoms = [figures[i].bottom for i in some]
        bottom = None if bottoms[0] is None else np.stack([b for b in bottoms if b is not None], axis=1)
        if len(top):
            found = (_ratio(top.mean(axis=0), None if bottom is None else bottom.mean(axis=0)), *intervals(top, bottom))
            for i, value, low, high in zip(some, *found, strict=True):
                rows[i] |= {"value": value, "low": low, "high": high}
                if figures[i].is_share and value in {0, 1}:  # every resample is the same
                    rows[i] |= dict(zip(("low", "high"), exact(value, len(top)), strict=True))
    compared = {i: f.difference for i, f in enumerate(figures) if f.difference is not None and len(f.difference)}
    for i, p in zip(compared, _tests(list(compared.values())), strict=True):
        rows[i]["p_value"] = p
    return rows


def exact(share: float, n: int) -> tuple[float, float]:
    """Return Clopper and Pearson's interval of a share of n."""
    from scipy import stats

    found = stats.binomtest(round(share * n), n).proportion_ci(CONFIDENCE, method="exact")
    return float(found.low), float(found.high)


def _alike(figures: list[Figure], key: Callable[[Figure], Any]) -> Iterator[list[int]]:
    """Yield the positions of figures with the same key, at most `_TOGETHER` at a time."""
    order = sorted(range(len(figures)), key=lambda i: key(figures[i]))
    for _, same in groupby(order, key=lambda i: key(figures[i])):
        some = list(same)
        yield from (some[start : start + _TOGETHER] for start in range(0, len(some), _TOGETHER))


def _tests(differences: list[Floats]) -> Floats:
    """Return a p-value for each; those over many queries at once: a 0 more changes no signed sum."""
    p = np.full(len(differences), np.nan)
    longest = max((len(d) for d in differences), default=0)
    sizes = np.array([len(d) if 2 ** len(d) <= RESAMPLES else longest for d in differences], dtype=int)
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        for some in np.split(same, range(_TOGETHER, len(same), _TOGETHER)):
            p[some] = permutation_p(
                np.stack([np.pad(differences[i], (0, size - len(differences[i]))) for i in some], 1)
            )
    return p


def _ratio(top: Floats, bottom: Floats | None) -> Floats:
    return top if bottom is None else top / np.where(bottom > 0, bottom, np.nan)


def intervals(top: Floats, bottom: Floats | None = None, resamples: int = RESAMPLES) -> tuple[Floats, Floats]:
    """Return 95% percentile bootstrap intervals over queries of F means, or ratios of means: low (F) and high (F).

    `top` and `bottom` are (Q, F), resampled together, query by query. NaN where there are fewer than two queries or
    a resample's mean of `bottom` isn't above 0.
    """
    import warnings

    from scipy import stats

    n, width = top.shape
    if n < 2:
        return np.full(width, np.nan), np.full(width, np.nan)

    def means(chosen_RQ: Any, axis: int = -1) -> Floats:  # noqa: ARG001 (scipy names it; queries are always last)
        chosen = np.atleast_2d(chosen_RQ)
        flat = (chosen + n * np.arange(len(chosen))[:, None]).ravel()
        weights_RQ = np.bincount(flat, minlength=chosen.size).reshape(chosen.shape) / n
        return _ratio(weights_RQ @ top, None if bottom is None else weights_RQ @ bottom).T

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # undefined resamples: the interval is NaN
        found = stats.bootstrap(
            (np.arange(n),),
            means,
            n_resamples=resamples,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            batch=max(1, _NUMBERS // n),
            rng=np.random.default_rng(0),
        ).confidence_interval
    return np.asarray(found.low).reshape(width), np.asarray(found.high).reshape(width)


def permutation_p(differences: Floats, resamples: int = RESAMPLES) -> Floats:
    """Return two-sided p-values of F paired permutation tests that the mean of (Q, F) differences is 0: (F,).

    Under the null hypothesis left and right are exchangeable within each query (a difference's sign is a coin's toss)
    and queries are independent. The signs of a query are tossed together for all figures. Exact (all 2^Q assignments)
    where these are no more than the resamples; else (1 + as extreme) / (1 + resamples), doubled for two sides. Queries
    that share a text are not independent: p is then too small.
    """
    from scipy import stats

    if len(differences) < 2:
        return np.ones(differences.shape[1])
    n, width = differences.shape
    largest = np.abs(differences).max(axis=0)
    unit_QF = differences / np.where(largest > 0, largest, 1.0)

    def means(signs_RQ: Any, axis: int = -1) -> Floats:  # noqa: ARG001 (scipy names it; queries are always last)
        rounded: Floats = np.round(np.asarray(signs_RQ) @ unit_QF / n, 12)  # equal sums in another order stay equal
        return rounded

    found = stats.permutation_test(
        (np.ones(n),),
        means,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _NUMBERS // max(n, width)),
        rng=np.random.default_rng(0),
    )
    return np.asarray(found.pvalue).reshape(width)
