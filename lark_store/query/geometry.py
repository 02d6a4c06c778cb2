"""Scores in another geometry than the plain cosine's, made at query time: the stored sketches stay as they are.

*Whitened.* With the unit sketches Ẑ (n, K) of the rows that are searched and C = ẐᵀẐ / n,

    s(q, z) = q̂ᵀ (C / λ̄ + c I)⁻¹ ẑ,    λ̄ = trace(C) / min(n, K),    c = 1

A direction that holds λ of the rows' square counts 1 / (λ/λ̄ + c) of what it counts in a cosine: what all samples share
is taken down, what few share is left. λ̄ is the mean of the eigenvalues that can be above 0, and C / λ̄ makes scores of
stores of different sizes comparable; (C + c λ̄ I)⁻¹ gives the same scores divided by λ̄. By Woodbury's identity, with
r = min(n, K) / n,

    (r ẐᵀẐ + c I)⁻¹ = (I − Ẑᵀ (ẐẐᵀ + c/r I)⁻¹ Ẑ) / c

so that only an n × n system is solved. For rows that C is made of this is s = a / r, with (ẐẐᵀ + c/r I) a = Ẑ q̂; for
others q̂ is whitened first. Where n × n numbers don't fit into memory, C is made of a sample of the rows, m of n, and r
is min(n, K) / m.

*Centred.* With m_v, the mean unit sketch of the searched rows of format variant v, a row z of v and a query q of u,

    s(q, z) = cos(q̂ − m_u, ẑ − m_v)

where nothing is taken out of the query if u is not searched. A mean of n sketches that have nothing in common holds 1/n
of their square.

Shape letters: Q queries, N rows, K sketch bins, M rows that C is made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np
import torch

from lark_store.query.scoring import Queries, matrix, units

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lark_store.query.rows import Rows
    from lark_store.schema.database import Database

    Matrix = NDArray[np.float32]
    Numbers = NDArray[np.int64]

_DAMPING = 1.0  # c
_NOTHING = 1e-3  # a centred norm below it is rounding alone: the row is its variant's mean
_KEYS = ["source", "variant", "sample_id"]


@dataclass(frozen=True)
class Place:
    """The rows of one checkpoint, which of them are searched (not there as a null alone), and how to compute.

    `number` is the checkpoint's among those of the question; an open store remembers one geometry for each. `memory`
    bytes are for this checkpoint.
    """

    db: Database
    rows: Rows
    searched: Numbers
    number: int
    memory: int
    device: str

    @cached_property
    def in_order(self) -> Numbers:
        """The searched rows, sorted by source, variant and id, however the table is laid out."""
        keys = self.rows.frame[self.searched].select(_KEYS).with_row_index("_at")
        found: Numbers = self.searched[keys.sort(_KEYS)["_at"].to_numpy()]
        return found

    def state(self, numbers: Numbers) -> tuple[object, ...]:
        """Return what says which sketches some rows have: those of committed runs never change."""
        runs = tuple((group.fingerprint, group.runs) for group in self.rows.groups)
        return runs, self.rows.frame[numbers].select(_KEYS).hash_rows().to_numpy().tobytes()


# --- whitened ------------------------------------------------------------------------------------------------------


def n_fitted(n: int, memory: int) -> int:
    """Return how many of n rows C is made of: all whose M × M numbers take a quarter of the memory."""
    return max(1, min(n, isqrt(memory // 32)))


class Whitening:
    """The whitened scores at one checkpoint."""

    def __init__(self, place: Place) -> None:
        self.place = place
        n = len(place.searched)
        m = n_fitted(n, place.memory)
        drawn = np.sort(np.random.default_rng(0).choice(n, m, replace=False))
        self.fitted: Numbers = place.in_order[drawn]
        self.rows = place.rows.only(self.fitted)
        self.ratio = min(n, place.rows.groups[0].sketcher.k) / m

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know."""
        n, m = len(self.place.searched), len(self.fitted)
        if m == n:
            return (f"whitened by the {n} samples searched",)
        return (f"whitened by {m} of the {n} samples searched, drawn with seed 0: no more fit into memory",)

    def scores(self, queries: Queries, variant: str) -> Matrix:  # noqa: ARG002  whitened alike in each variant
        """Return the scores of all rows, (Q, N)."""
        from scipy.linalg import cho_solve

        place = self.place
        what, state = f"whitening {place.number}", (place.state(self.fitted), self.ratio)
        factor = place.db.remember(what, state, self._factor)
        shared_QM, _ = matrix(self.rows, queries, device=place.device)
        a_MQ = cho_solve((factor, True), shared_QM.T.astype(np.float64), check_finite=False)
        made = np.empty((len(queries.ids), len(place.rows)), np.float32)
        made[:, self.fitted] = a_MQ.T / self.ratio
        others = np.setdiff1d(np.arange(len(place.rows)), self.fitted)
        if len(others):
            whitened = self._whitened(queries, a_MQ)
            made[:, others] = matrix(place.rows.only(others), whitened, device=place.device)[0]
        return made

    def _factor(self) -> NDArray[np.float64]:
        """Return the Cholesky factor of ẐẐᵀ + c/r I, (M, M), below its diagonal; block by block of rows."""
        from scipy.linalg import cholesky

        m = len(self.fitted)
        gram_MM = np.zeros((m, m), order="F")
        block = max(1, self.place.memory // 4 // (4 * self.rows.groups[0].sketcher.k))
        for start in range(0, m, block):  # what is above the diagonal is not looked at
            here = np.arange(start, min(start + block, m))
            below = self.rows.only(np.arange(start, m))
            gram_MM[start:, here] = matrix(below, _loaded(self.rows.only(here)), device=self.place.device)[0].T
        gram_MM[np.diag_indices(m)] += _DAMPING / self.ratio
        found: NDArray[np.float64] = cholesky(gram_MM, lower=True, overwrite_a=True, check_finite=False)
        return found

    def _whitened(self, queries: Queries, a_MQ: NDArray[np.float64]) -> Queries:
        """Return (q̂ − Ẑᵀ a) / c in place of the queries."""
        made_QK = queries.unit_QK.clone()
        a = torch.from_numpy(a_MQ.astype(np.float32))
        for numbers, unit_BK in units(self.rows):
            made_QK -= a[torch.from_numpy(numbers)].T @ unit_BK
        return _asking(made_QK / _DAMPING)


def _asking(vectors_QK: torch.Tensor) -> Queries:
    """Return vectors of any norm in the place of queries."""
    return Queries([""] * len(vectors_QK), vectors_QK, torch.ones(len(vectors_QK)))


def _loaded(rows: Rows) -> Queries:
    """Read some rows' unit sketches into memory, in the rows' order, to multiply others with."""
    held = torch.empty(len(rows), rows.groups[0].sketcher.k)
    for numbers, unit_BK in units(rows):
        held[torch.from_numpy(numbers)] = unit_BK
    return _asking(held)


# --- centred -------------------------------------------------------------------------------------------------------


class Centring:
    """The centred scores at one checkpoint."""

    def __init__(self, place: Place) -> None:
        self.place = place
        found = place.db.remember(f"centring {place.number}", place.state(place.in_order), self._means)
        self.names, self.means_VK, self.counts = found

    def _means(self) -> tuple[list[str], torch.Tensor, list[int]]:
        """Return the searched variants, the mean unit sketch of each, and how many rows it is of."""
        rows = self.place.rows.only(self.place.in_order)
        names = sorted(set(rows.frame["variant"]))
        of_N = np.array([names.index(name) for name in rows.frame["variant"]])
        sums_VK = torch.zeros(len(names), rows.groups[0].sketcher.k, dtype=torch.float64)
        for numbers, unit_BK in units(rows):
            for variant in np.unique(of_N[numbers]):
                mine = torch.from_numpy(of_N[numbers] == variant)
                sums_VK[variant] += unit_BK[mine].sum(dim=0)
        counts = np.bincount(of_N, minlength=len(names))
        return names, (sums_VK / torch.from_numpy(counts)[:, None]).float(), counts.tolist()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was taken out: the share of the rows' square that each variant's mean holds."""
        shares = self.means_VK.double().square().sum(dim=1).tolist()
        held = ", ".join(
            f"{share:.1%} of `{name}` ({n} samples)"
            for name, share, n in zip(self.names, shares, self.counts, strict=True)
        )
        at = self.place.rows.groups[0].checkpoint.name
        return (f"taken out at `{at}`, the mean's share of the squared norm: {held}",)

    def scores(self, queries: Queries, variant: str) -> Matrix:
        """Return the scores of all rows, (Q, N), for queries of a format variant."""
        rows = self.place.rows
        asked = queries.unit_QK
        if variant in self.names:
            asked = asked - self.means_VK[self.names.index(variant)]
        asked = torch.nn.functional.normalize(asked, dim=1)
        made, _ = matrix(rows, _asking(torch.cat([asked, self.means_VK])), device=self.place.device)
        plain_QN, shared_VN = made[: len(asked)], made[len(asked) :]
        offset_QV = (asked @ self.means_VK.T).numpy()
        square_V = self.means_VK.square().sum(dim=1).numpy()
        of_N = np.array([self.names.index(name) if name in self.names else -1 for name in rows.frame["variant"]])
        for number in range(len(self.names)):
            mine = of_N == number
            square = 1 - 2 * shared_VN[number, mine] + square_V[number]
            norm = np.sqrt(np.maximum(square, 0))
            less = plain_QN[:, mine] - offset_QV[:, number, None]
            plain_QN[:, mine] = np.divide(less, norm, out=np.zeros_like(less), where=norm > _NOTHING)
        return plain_QN


GEOMETRIES: dict[str, type[Whitening | Centring]] = {"whitened": Whitening, "centred": Centring}
