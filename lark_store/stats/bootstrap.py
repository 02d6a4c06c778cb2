"""Figures over queries: value, bootstrap interval and paired permutation test. Pure functions.

Shape letters: Q queries, F figures, R resamples of one batch. Figures over the same number of queries are resampled
together: the same seed would draw the same resamples for each, so the resampled means are one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, islice, product
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 9_999
_NUMBERS = 1_000_000  # in a batch of resamples: bounds the memory
_TOGETHER = 256


@dataclass(frozen=True)
class Figure:
    """One figure: the mean over queries of `top` (Q), or that mean over the mean of `bottom` (Q), both above 0.

    `difference` (of any length) holds Φ_left − Φ_right per query for the test; None without a comparison. `is_share`:
    `top` is 0 or 1 for each query. `sketch_error` is the error from sketching, see `sketch_error`.
    """

    names: dict[str, Any]
    top: Floats
    bottom: Floats | None = None
    difference: Floats | None = None
    is_share: bool = False
    sketch_error: float = np.nan


def evaluate(figures: list[Figure]) -> list[dict[str, Any]]:
    """Return a row per figure: names, value, low, high, sketch_error, p_value, n_queries; NaN where undefined."""
    undefined = dict.fromkeys(("value", "low", "high", "sketch_error", "p_value"), np.nan)
    rows: list[dict[str, Any]] = [
        {**f.names, **undefined, "sketch_error": f.sketch_error, "n_queries": len(f.top)} for f in figures
    ]
    for batch in _alike(figures, lambda f: (len(f.top), f.bottom is not None)):
        top = np.stack([figures[i].top for i in batch], axis=1)
        bottoms = [figures[i].bottom for i in batch]
        bottom = None if bottoms[0] is None else np.stack([b for b in bottoms if b is not None], axis=1)
        if len(top):
            values = _ratio(top.mean(axis=0), None if bottom is None else bottom.mean(axis=0))
            for i, value, low, high in zip(batch, values, *intervals(top, bottom), strict=True):
                rows[i] |= {"value": value, "low": low, "high": high}
                if figures[i].is_share and value in {0, 1}:  # every resample is the same
                    rows[i] |= dict(zip(("low", "high"), exact(value, len(top)), strict=True))
    compared = {i: f.difference for i, f in enumerate(figures) if f.difference is not None and len(f.difference)}
    for i, p in zip(compared, _tests(list(compared.values())), strict=True):
        rows[i]["p_value"] = p
    return rows


def exact(share: float, n: int) -> tuple[float, float]:
    """Return the Clopper–Pearson interval of a share of n that is 0 or 1.

    >>> exact(1.0, 10)
    (0.6915028921812392, 1.0)
    """
    reach = ((1 - CONFIDENCE) / 2) ** (1 / n)
    return (reach, 1.0) if share else (0.0, 1 - reach)


def _alike(figures: list[Figure], key: Callable[[Figure], Any]) -> Iterator[list[int]]:
    """Yield the positions of figures with equal keys, at most `_TOGETHER` at a time."""
    order = sorted(range(len(figures)), key=lambda i: key(figures[i]))
    for _, members in groupby(order, key=lambda i: key(figures[i])):
        alike = list(members)
        yield from (alike[start : start + _TOGETHER] for start in range(0, len(alike), _TOGETHER))


def _tests(differences: list[Floats]) -> Floats:
    """Return a p-value per difference. Batches those over many queries: padding with zeros changes no signed sum."""
    p = np.full(len(differences), np.nan)
    longest = max((len(d) for d in differences), default=0)
    sizes = np.array([len(d) if 2 ** len(d) <= RESAMPLES else longest for d in differences], dtype=int)
    for size in np.unique(sizes):
        positions = np.flatnonzero(sizes == size)
        for batch in np.split(positions, range(_TOGETHER, len(positions), _TOGETHER)):
            p[batch] = permutation_p(
                np.stack([np.pad(differences[i], (0, size - len(differences[i]))) for i in batch], 1)
            )
    return p


def _ratio(top: Floats, bottom: Floats | None) -> Floats:
    """Return the ratios of means; NaN unless both are above 0, so that no sign is read as a size."""
    return top if bottom is None else np.where(top > 0, top, np.nan) / np.where(bottom > 0, bottom, np.nan)


def intervals(top: Floats, bottom: Floats | None = None, resamples: int = RESAMPLES) -> tuple[Floats, Floats]:
    """Return 95% percentile bootstrap intervals over queries of F means, or ratios of means: low (F) and high (F).

    `top` and `bottom` are (Q, F), resampled together, query by query. NaN with fewer than two queries, or if a
    resample's mean of `top` or `bottom` isn't above 0.
    """
    n, width = top.shape
    if n < 2:
        return np.full(width, np.nan), np.full(width, np.nan)
    rng = np.random.default_rng(0)
    resampled: list[Floats] = []
    for size in _batches(resamples, n):
        picks_RQ = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        weights_RQ = np.bincount(picks_RQ.ravel(), minlength=picks_RQ.size).reshape(picks_RQ.shape) / n
        resampled.append(_ratio(weights_RQ @ top, None if bottom is None else weights_RQ @ bottom))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(resampled), [tail, 1 - tail], axis=0)
    return low, high


def _batches(total: int, numbers: int) -> Iterator[int]:
    """Yield the sizes of the batches of `total` resamples of so many numbers each."""
    size = max(1, _NUMBERS // numbers)
    yield from (min(size, total - start) for start in range(0, total, size))


def permutation_p(differences: Floats, resamples: int = RESAMPLES) -> Floats:
    """Return two-sided p-values of F paired permutation tests that the mean of (Q, F) differences is 0: (F,).

    Under the null hypothesis left and right are exchangeable within each query (a difference's sign is a coin toss) and
    queries are independent. A query's sign is shared by all figures. Exact (all 2^Q assignments) if these are no more
    than the resamples; else (1 + as extreme) / (1 + resamples), doubled for two sides. Queries with a shared text are
    not independent: p is then too small.
    """
    n, width = differences.shape
    if n < 2:
        return np.ones(width)
    largest = np.abs(differences).max(axis=0)
    unit_QF = differences / np.where(largest > 0, largest, 1.0)

    def means(signs_RQ: Any) -> Floats:
        rounded: Floats = np.round(signs_RQ @ unit_QF / n, 12)  # makes equal sums in another order equal
        return rounded

    observed = means(np.ones(n))
    tolerance = np.abs(100 * np.finfo(np.float64).eps * observed)
    is_exact = 2**n <= resamples
    total = 2**n if is_exact else resamples
    assignments, rng = product((1.0, -1.0), repeat=n), np.random.default_rng(0)
    below, above = np.full((2, width), 0 if is_exact else 1)
    for size in _batches(total, max(n, width)):
        if is_exact:
            signs_RQ = np.array(list(islice(assignments, size)))
        else:
            signs_RQ = rng.permuted(np.tile([1.0, -1.0], (size, n, 1)), axis=2)[:, :, 0]
        resampled = means(signs_RQ)
        below += (resampled <= observed + tolerance).sum(axis=0)
        above += (resampled >= observed - tolerance).sum(axis=0)
    p_values: Floats = np.minimum(1.0, 2 * np.minimum(below, above) / (total if is_exact else total + 1))
    return p_values
