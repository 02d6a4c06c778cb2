"""Whitened and centred scores, computed at query time: the stored sketches stay as they are.

*Whitened.* With the unit sketches Ẑ (n, K) of the searched rows and C = ẐᵀẐ / n,

    s(q, z) = q̂ᵀ (C / λ̄ + c I)⁻¹ ẑ,    λ̄ = trace(C) / min(n, K),    c = 1

A direction with a share λ of the rows' squared norm counts 1 / (λ/λ̄ + c) of its weight in a cosine: components common
to all samples are damped, rare ones are kept. λ̄ is the mean of the eigenvalues that can be above 0; C / λ̄ makes
scores comparable between stores of different sizes; (C + c λ̄ I)⁻¹ gives the same scores divided by λ̄. By Woodbury's
identity, with r = min(n, K) / n,

    (r ẐᵀẐ + c I)⁻¹ = (I − Ẑᵀ (ẐẐᵀ + c/r I)⁻¹ Ẑ) / c

so only an n × n system is solved. For the rows of C this is s = a / r, with (ẐẐᵀ + c/r I) a = Ẑ q̂; for other rows q̂
is whitened first. If n × n numbers don't fit into memory, C is built from a sample of m of the n rows, and r is min(n,
K) / m.

*Centred.* With m_v, the mean unit sketch of the searched rows of format variant v, a row z of v and a query q of u,

    s(q, z) = cos(q̂ − m_u, ẑ − m_v)

where nothing is subtracted from the query if u is not searched. A mean of n unrelated sketches has 1/n of their squared
norm.

Shape letters: Q queries, N rows, K sketch bins, M rows of C.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

from lark_store.query.scoring.products import Queries, matrix, normalized, units

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lark_store.query.select.rows import Rows
    from lark_store.schema.database import Database

    Matrix = NDArray[np.float32]
    Numbers = NDArray[np.int64]

_DAMPING = 1.0  # c
_NOTHING = 1e-3  # smaller centred norms are rounding errors: the row equals its variant's mean
_KEYS = ["source", "variant", "sample_id"]


@dataclass(frozen=True)
class Place:
    """The rows at one checkpoint, the searched ones among them (not those used only as a null), and how to compute.

    `number` is the checkpoint's position in the question; an open store caches one geometry for each. `memory` bytes
    are for this checkpoint.
    """

    db: Database
    rows: Rows
    searched: Numbers
    number: int
    memory: int
    device: str

    @cached_property
    def in_order(self) -> Numbers:
        """The searched rows, sorted by source, variant and id, whatever the table's layout."""
        keys = self.rows.frame[self.searched].select(_KEYS).with_row_index("_at")
        numbers: Numbers = self.searched[keys.sort(_KEYS)["_at"].to_numpy()]
        return numbers

    def state(self, numbers: Numbers) -> tuple[object, ...]:
        """Return a cache key for the sketches of some rows: those of committed runs never change."""
        runs = tuple((group.fingerprint, group.runs) for group in self.rows.groups)
        return runs, self.rows.frame[numbers].select(_KEYS).hash_rows().to_numpy().tobytes()


class Geometry:
    """Statistics of the searched sketches at one checkpoint, and the scores in them."""

    def __init__(self, place: Place) -> None:
        self.place = place

    @classmethod
    def recipe(cls, n: int, memory: int) -> dict[str, int]:  # noqa: ARG003
        """Return further inputs of the scores of n searched rows with `memory` bytes, for the recipe."""
        return {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the reader."""
        raise NotImplementedError

    def scores(self, queries: Queries, variant: str) -> Matrix:
        """Return the scores of all rows, (Q, N), for queries of a format variant."""
        raise NotImplementedError


# --- whitened ------------------------------------------------------------------------------------------------------


def n_fitted(n: int, memory: int) -> int:
    """Return the number of rows of C, out of n: as many as M × M numbers fit into a quarter of the memory."""
    return max(1, min(n, isqrt(memory // 32)))


class Whitening(Geometry):
    """The whitened scores at one checkpoint."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        n = len(place.searched)
        m = n_fitted(n, place.memory)
        drawn = np.sort(np.random.default_rng(0).choice(n, m, replace=False))
        self.fitted: Numbers = place.in_order[drawn]
        self.rows = place.rows.only(self.fitted)
        self.ratio = min(n, place.rows.groups[0].sketcher.k) / m

    @classmethod
    def recipe(cls, n: int, memory: int) -> dict[str, int]:
        """Return the number of rows of C."""
        return {"fitted": n_fitted(n, memory)}

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the reader."""
        n, m = len(self.place.searched), len(self.fitted)
        if m == n:
            return (f"whitened by the {n} searched samples",)
        return (f"whitened by {m} of the {n} searched samples, drawn with seed 0: no more fit into memory",)

    def scores(self, queries: Queries, variant: str) -> Matrix:  # noqa: ARG002  whitened alike in each variant
        """Return the scores of all rows, (Q, N)."""
        from scipy.linalg import cho_solve

        place = self.place
        cache_name, state = f"whitening {place.number}", (place.state(self.fitted), self.ratio)
        factor = place.db.remember(cache_name, state, self._factor)
        shared_QM, _ = matrix(self.rows, queries, device=place.device)
        a_MQ = cho_solve((factor, True), shared_QM.T.astype(np.float64), check_finite=False)
        scores = np.empty((len(queries.ids), len(place.rows)), np.float32)
        scores[:, self.fitted] = a_MQ.T / self.ratio
        rest = np.setdiff1d(np.arange(len(place.rows)), self.fitted)
        if len(rest):
            whitened = self._whitened(queries, a_MQ)
            scores[:, rest] = matrix(place.rows.only(rest), whitened, device=place.device)[0]
        return scores

    def _factor(self) -> NDArray[np.float64]:
        """Return the Cholesky factor of ẐẐᵀ + c/r I, (M, M), in the lower triangle, computed in blocks of rows."""
        from scipy.linalg import cholesky

        m = len(self.fitted)
        gram_MM = np.zeros((m, m), order="F")
        block = max(1, self.place.memory // 4 // (4 * self.rows.groups[0].sketcher.k))
        for start in range(0, m, block):  # only the lower triangle is read
            block_rows = np.arange(start, min(start + block, m))
            below = self.rows.only(np.arange(start, m))
            gram_MM[start:, block_rows] = matrix(
                below, _load_units(self.rows.only(block_rows)), device=self.place.device
            )[0].T
        gram_MM[np.diag_indices(m)] += _DAMPING / self.ratio
        factor: NDArray[np.float64] = cholesky(gram_MM, lower=True, overwrite_a=True, check_finite=False)
        return factor

    def _whitened(self, queries: Queries, a_MQ: NDArray[np.float64]) -> Queries:
        """Return the whitened queries (q̂ − Ẑᵀ a) / c."""
        whitened_QK = queries.unit_QK.copy()
        a = a_MQ.astype(np.float32)
        for numbers, unit_BK in units(self.rows):
            whitened_QK -= a[numbers].T @ unit_BK
        return _as_queries(whitened_QK / np.float32(_DAMPING))


def _as_queries(vectors_QK: Matrix) -> Queries:
    """Wrap vectors of any norm as queries."""
    return Queries([""] * len(vectors_QK), vectors_QK, np.ones(len(vectors_QK), np.float32))


def _load_units(rows: Rows) -> Queries:
    """Read rows' unit sketches into memory, in the rows' order, as queries."""
    unit_NK = np.empty((len(rows), rows.groups[0].sketcher.k), np.float32)
    for numbers, unit_BK in units(rows):
        unit_NK[numbers] = unit_BK
    return _as_queries(unit_NK)


# --- centred -------------------------------------------------------------------------------------------------------


class Centring(Geometry):
    """The centred scores at one checkpoint."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        means = place.db.remember(f"centring {place.number}", place.state(place.in_order), self._means)
        self.names, self.means_VK, self.counts = means

    def _means(self) -> tuple[list[str], Matrix, list[int]]:
        """Return the searched variants, their mean unit sketches, and their numbers of rows."""
        rows = self.place.rows.only(self.place.in_order)
        names = sorted(set(rows.frame["variant"]))
        variant_N = np.array([names.index(name) for name in rows.frame["variant"]])
        sums_VK = np.zeros((len(names), rows.groups[0].sketcher.k))
        for numbers, unit_BK in units(rows):
            for variant in np.unique(variant_N[numbers]):
                in_variant = variant_N[numbers] == variant
                sums_VK[variant] += unit_BK[in_variant].sum(axis=0)
        counts = np.bincount(variant_N, minlength=len(names))
        return names, (sums_VK / counts[:, None]).astype(np.float32), counts.tolist()

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the reader: each variant's mean as a share of the squared norm."""
        shares = np.square(self.means_VK.astype(np.float64)).sum(axis=1).tolist()
        listed = ", ".join(
            f"{share:.1%} of `{name}` ({n} samples)"
            for name, share, n in zip(self.names, shares, self.counts, strict=True)
        )
        checkpoint = self.place.rows.groups[0].checkpoint.name
        return (f"means subtracted at `{checkpoint}`, as shares of the squared norm: {listed}",)

    def scores(self, queries: Queries, variant: str) -> Matrix:
        """Return the scores of all rows, (Q, N), for queries of a format variant."""
        rows = self.place.rows
        centred_QK = queries.unit_QK
        if variant in self.names:
            centred_QK = centred_QK - self.means_VK[self.names.index(variant)]
        centred_QK = normalized(centred_QK)
        cosines, _ = matrix(rows, _as_queries(np.concatenate([centred_QK, self.means_VK])), device=self.place.device)
        plain_QN, shared_VN = cosines[: len(centred_QK)], cosines[len(centred_QK) :]
        offset_QV = centred_QK @ self.means_VK.T
        square_V = np.square(self.means_VK).sum(axis=1)
        variant_N = np.array([self.names.index(name) if name in self.names else -1 for name in rows.frame["variant"]])
        for number in range(len(self.names)):
            in_variant = variant_N == number
            square = 1 - 2 * shared_VN[number, in_variant] + square_V[number]
            norm = np.sqrt(np.maximum(square, 0))
            less = plain_QN[:, in_variant] - offset_QV[:, number, None]
            plain_QN[:, in_variant] = np.divide(less, norm, out=np.zeros_like(less), where=norm > _NOTHING)
        return plain_QN
