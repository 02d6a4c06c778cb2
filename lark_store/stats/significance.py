"""Statistics of scores: p-values, q-values, sketching noise. Pure functions of numpy arrays.

Shape letters: N rows (one sample in one format variant), Q queries.

The test. `source_null_p` compares a row's score with the scores of other sources' rows. Its null hypothesis: within a
variant, this row and its null rows are *exchangeable* (all orders of their scores are equally likely, as for
independent draws from one law, even with a factor shared by all rows). A discovery means "closer to this query than
rows of the other sources". It doesn't mean "this row caused the answer": a source in another style is shifted as a
whole.

Guarantees for q-values of these p-values, at level α:

1. *Each p-value* is valid, P(p ≤ t) ≤ t, whatever the scores' law: p is a rank among 1 + n exchangeable scores. Ties
   only raise it; so do real proponents among the null rows, as they score higher (they cost power).
2. *Within one source and variant* all rows have the same null rows. Where the rows are null, such p-values are
   positively dependent (PRDS) and Benjamini–Hochberg holds FDR ≤ α (Bates, Candès, Lei, Romano & Sesia, Ann. Statist.
   51 (2023) 149–178; for exchangeable scores Marandon, Lei, Mary & Roquain, Ann. Statist. 52 (2024) 157–183). With
   `null_sources` and one variant all tested rows have the same null rows, so pooled BH holds too.
3. `benjamini_hochberg_within` at α is BH at α/G in each of G groups. With V_g false among R_g discoveries,
   FDR = E[Σ V_g / R] ≤ Σ E[V_g / R_g] ≤ G · α/G, however the groups depend on each other. Use this procedure.
4. *Pooled BH over rows that are each compared with the other sources* is not covered by 2: a high row lowers its own
   p-value and raises those of other sources. If all N rows of a variant are exchangeable, still
   P(any discovery) ≤ α / (1 − α). Proof: let BH reject the rows with p ≤ t, a_g of them in source g (of n_g rows),
   in all at least tN/α. Let h be the source of the lowest-scoring rejected row. Rejected rows of other sources score
   at least as high and are counted in its p-value, so they are at most t(1 + N − n_h) − 1, and
   a_h > tN/α − t(1 + N − n_h) ≥ t(1 − α)N/α. Hence BH within h at level α n_h / ((1 − α)N) rejects too; by 2 this
   has at most that probability, and the sum over sources is α / (1 − α). In simulations the rate is far below α. The
   same count shows a weakness: at least 1 − α of its discoveries in a variant are of one source, so where two sources
   hold proponents it finds neither. Nor does 3, whose null rows hold the other source's proponents: give
   `null_sources` then, chosen before the scores are seen.

Not covered: near copies. Rows in clusters inside a source (copies, one template, one document cut up) aren't
exchangeable with other sources' rows; one lucky cluster is then many discoveries. Score one row of each.

Minimum number of discoveries: p is at least 1/(1 + n), so BH of m rows finds none unless it finds m / (α (1 + n)) of
them at once (G times as many for 3, with m the group's rows). A small source with many null rows can have a single
discovery; a large one with few null rows has none, however high its scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]
    Codes = NDArray[np.integer[Any]]

_BENTKUS_DZINDZALIETA = 3.17866  # 1 / (4 P(Z ≥ √2)), rounded up


def source_null_p(
    scores: ArrayLike,
    source: Codes,
    variant: Codes,
    *,
    opponents: bool = False,
    null_sources: set[int] | None = None,
) -> Floats:
    """Return each row's conformal p-value against other sources' rows in the same variant, (N,).

    p = (1 + #{null scores ≥ the row's}) / (1 + n), with n the number of null rows: those of all other sources, or of
    `null_sources`, whose own rows aren't tested. `opponents` counts null scores ≤ the row's. One-sided. See the
    module's docstring for the guarantees. O(N log N).

    Parameters
    ----------
    scores
        (N,) influence of each row on one query; a NaN is neither tested nor a null row.
    source, variant
        (N,) integer codes of each row's source and format variant.

    Returns
    -------
        (N,) in (0, 1]; NaN where a row isn't tested or has no null rows.

    >>> source_null_p([3.0, 1.0, 2.0, 0.0], np.array([0, 0, 1, 1]), np.array([0, 0, 0, 0]))
    array([0.33333333, 0.66666667, 0.66666667, 1.        ])
    """
    s_N = np.asarray(scores, dtype=np.float64)
    if opponents:
        s_N = -s_N
    source = np.asarray(source)
    usable = ~np.isnan(s_N)
    null = usable if null_sources is None else usable & np.isin(source, sorted(null_sources))
    tested = usable if null_sources is None else usable & ~null
    p_N = np.full(len(s_N), np.nan)
    for rows in _groups(np.asarray(variant)):
        test = rows[tested[rows]]
        null_scores = s_N[rows[null[rows]]]
        above = _at_least(null_scores, s_N[test])
        n = np.full(len(test), len(null_scores))
        if null_sources is None:
            for source_rows in _groups(source[test]):
                above[source_rows] -= _at_least(s_N[test[source_rows]], s_N[test[source_rows]])
                n[source_rows] -= len(source_rows)
        p_N[test] = np.where(n > 0, (1 + above) / (1 + n), np.nan)
    return p_N


def _groups(codes: Codes) -> list[NDArray[np.intp]]:
    """Return the positions of each code, a list of arrays in order of code."""
    order = np.argsort(codes, kind="stable")
    starts = np.unique(codes[order], return_index=True)[1]
    return np.split(order, starts[1:])


def _at_least(population: Floats, scores: Floats) -> NDArray[np.intp]:
    """Return, for each score, the number of population values ≥ it."""
    return len(population) - np.searchsorted(np.sort(population), scores, side="left")


def sign_null_p(scores: ArrayLike, scale: ArrayLike) -> Floats:
    """Return an upper bound of the p-value under the null that the signs of a sketch's bins are random, (N,).

    A score is S = Σ q_j z_j over bins. With independent random signs, S = Σ ε_j |q_j z_j| has mean 0 and variance
    scale² = Σ q_j² z_j², and for x = S / scale > 0 the result is the smallest of three proven bounds, never below the
    true tail:

    - P(S ≥ x) ≤ 1/2 and ≤ 1 / (2x²): symmetry, and Chebyshev's inequality with it;
    - P(S ≥ x) ≤ c P(Z ≥ x), Z standard normal, c = 1 / (4 P(Z ≥ √2)) ≈ 3.178, the best constant
      (Bentkus & Dzindzalieta, Bernoulli 21 (2015) 1231–1237).

    Hoeffding's exp(−x²/2) is never the smallest. For x ≤ 0 the bound is 1. One-sided: give −scores for opponents.

    The null concerns only the direction of two gradients: a component shared by all texts' gradients is enough to
    reject it. If the signs are the query's, all rows share them and their p-values depend on each other arbitrarily: BH
    is then a convention without proof.

    Parameters
    ----------
    scores, scale
        (N,) each, in the same unit; scale ≥ 0. Where scale is 0, p is 1 (no bin is shared).
    """
    from scipy import special

    s_N, scale_N = np.asarray(scores, dtype=np.float64), np.asarray(scale, dtype=np.float64)
    x_N = np.divide(s_N, scale_N, out=np.where(np.isnan(s_N + scale_N), np.nan, 0.0), where=scale_N > 0)
    with np.errstate(divide="ignore"):
        chebyshev = 0.5 / np.square(x_N)
    gauss = np.maximum(
        _BENTKUS_DZINDZALIETA * special.ndtr(-x_N), np.finfo(np.float64).tiny
    )  # 0 would be below the true tail
    bound: Floats = np.where(x_N <= 0, 1.0, np.minimum(np.minimum(0.5, chebyshev), gauss))
    return bound


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Return Benjamini–Hochberg q-values, (N,): rows with q ≤ α have a false discovery rate ≤ α.

    Holds for independent or positively dependent p-values (Benjamini & Yekutieli, Ann. Statist. 29 (2001) 1165–1188).
    `p` must have all tested rows, not only the best. NaN (not tested) stays NaN and doesn't count.
    """
    p_N = np.asarray(p, dtype=np.float64)
    q_N = np.full(p_N.shape, np.nan)
    rows = np.flatnonzero(~np.isnan(p_N))
    rows = rows[np.argsort(p_N[rows])]
    n = len(rows)
    raised = p_N[rows] * (n / np.arange(1.0, n + 1))  # as scipy.stats has it, which takes long to import
    q_N[rows] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1.0)
    return q_N


def benjamini_hochberg_within(p: ArrayLike, group: Codes) -> Floats:
    """Return q-values of BH within each group, times the number of groups with a tested row, at most 1, (N,).

    With `source_null_p` and a group for each source and variant, FDR ≤ α over all rows with q ≤ α is proven (the
    module's docstring, 3). A small group isn't drowned by a large one.
    """
    p_N = np.asarray(p, dtype=np.float64)
    q_N = np.full(p_N.shape, np.nan)
    groups = [rows for rows in _groups(np.asarray(group)) if not np.isnan(p_N[rows]).all()]
    for rows in groups:
        q_N[rows] = np.minimum(1.0, benjamini_hochberg(p_N[rows]) * len(groups))
    return q_N


def sketch_noise(cosine: ArrayLike, k: int) -> Floats:
    """Return the standard deviation of a sketch's cosine about the gradients' cosine ρ: (1 − ρ²) / √k.

    The shape is `cosine`'s. An approximation: the leading term of the variance over random maps and signs. Simulated
    standard deviations were within 5% of it.
    """
    rho = np.asarray(cosine, dtype=np.float64)
    noise: Floats = np.maximum(1.0 - np.square(rho), 0.0) / np.sqrt(k)
    return noise


def z_scores(scores: ArrayLike) -> Floats:
    """Return the scores minus their row's mean, over its population standard deviation, (Q, N); 0 in a constant row."""
    s_QN = np.asarray(scores, dtype=np.float64)
    if s_QN.shape[1] == 0:
        return s_QN.copy()
    centred = s_QN - s_QN.mean(axis=1, keepdims=True)
    spread = centred.std(axis=1, keepdims=True)
    varies = np.ptp(s_QN, axis=1, keepdims=True) != 0
    z_QN: Floats = np.divide(centred, spread, out=np.zeros_like(centred), where=varies)
    return z_QN
