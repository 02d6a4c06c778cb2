"""Scores of groups of rows: the mean, the sum or the maximum over a group's rows, for each query.

Rows are read blockwise, so memory holds a number per query and group, and of one query also a score per row.

The noise of a group is the standard deviation of its value from sketching. One map serves all rows, so their errors
are correlated: that of a mean is bounded by the mean of the rows' noises, that of a sum by their sum. The noise of a
maximum is that of the row which has it.

Shape letters: Q queries, N rows, G groups, B rows of a batch, M groups of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lark_store.query.scoring.products import Scores
    from lark_store.query.scoring.search import Search

    Floats = NDArray[np.float64]

_BYTES = 32  # of a query and group: the value and its noise, and both of a block


@dataclass(frozen=True)
class GroupScores:
    """Values of groups for queries: `value_QG`, and `noise_QG` if the method has one; `score_N` of a single query."""

    ids: list[str]
    value_QG: Floats
    noise_QG: Floats | None
    n_G: NDArray[np.int64]
    score_N: Floats | None


def group_scores(search: Search, ids: Sequence[str], group_N: NDArray[np.int64], how: str) -> GroupScores:
    """Score the groups of a search's rows; `how` is one of `HOW`.

    Raises
    ------
    InputError
        A value per query and group does not fit into the search's memory.
    """
    n_G = np.bincount(group_N)
    n_bytes = _BYTES * len(ids) * len(n_G)
    if n_bytes > search.memory:
        raise InputError(
            f"{len(n_G):,} groups for {len(ids):,} queries need {-(-n_bytes >> 20):,} MiB",
            "use a key with fewer values, ask for fewer queries, or allow more with `--memory`",
        )
    order = {name: number for number, name in enumerate(ids)}
    value_QG, noise_QG = np.empty((len(ids), len(n_G))), np.empty((len(ids), len(n_G)))
    score_N = np.empty(len(group_N)) if len(ids) == 1 else None
    has_noise = True
    for block in search.blocks(ids):
        running = HOW[how](len(block.ids), n_G)
        for numbers, scores in search.stream_with_noise(block):
            has_noise = has_noise and scores.noise is not None
            running.add(group_N[numbers], scores)
            if score_N is not None:
                score_N[numbers] = scores.score[0]
        rows = [order[name] for name in block.ids]
        value_QG[rows], noise_QG[rows] = running.result
    return GroupScores(list(ids), value_QG, noise_QG if has_noise else None, n_G, score_N)


class _Sums:
    """Running sums over the rows of each group."""

    def __init__(self, n_queries: int, n_G: NDArray[np.int64]) -> None:
        self.n_G = n_G
        self.value_QG, self.noise_QG = np.zeros((2, n_queries, len(n_G)))

    def add(self, group_B: NDArray[np.int64], scores: Scores) -> None:
        """Add a batch of rows."""
        order, groups, starts = _runs(group_B)
        self.value_QG[:, groups] += np.add.reduceat(scores.score[:, order], starts, axis=1, dtype=np.float64)
        if scores.noise is not None:
            self.noise_QG[:, groups] += np.add.reduceat(scores.noise[:, order], starts, axis=1, dtype=np.float64)

    @property
    def result(self) -> tuple[Floats, Floats]:
        """Values and noises, (Q, G) both."""
        return self.value_QG, self.noise_QG


class _Means(_Sums):
    """Running means."""

    @property
    def result(self) -> tuple[Floats, Floats]:
        """Values and noises, (Q, G) both."""
        return self.value_QG / self.n_G, self.noise_QG / self.n_G


class _Maxima(_Sums):
    """Running maxima, with the noise of the row that has it."""

    def __init__(self, n_queries: int, n_G: NDArray[np.int64]) -> None:
        super().__init__(n_queries, n_G)
        self.value_QG -= np.inf

    def add(self, group_B: NDArray[np.int64], scores: Scores) -> None:
        """Add a batch of rows."""
        order, groups, starts = _runs(group_B)
        score_QB = scores.score[:, order].astype(np.float64)
        best_QM = np.maximum.reduceat(score_QB, starts, axis=1)
        is_higher = best_QM > self.value_QG[:, groups]
        if scores.noise is not None:
            is_best = score_QB == np.repeat(best_QM, np.diff([*starts, len(order)]), axis=1)
            noise_QM = np.maximum.reduceat(np.where(is_best, scores.noise[:, order], 0), starts, axis=1)
            self.noise_QG[:, groups] = np.where(is_higher, noise_QM, self.noise_QG[:, groups])
        self.value_QG[:, groups] = np.where(is_higher, best_QM, self.value_QG[:, groups])


HOW: dict[str, type[_Sums]] = {"mean": _Means, "sum": _Sums, "max": _Maxima}


def _runs(group_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return an order of rows by group, the groups in it, and where each starts."""
    order = np.argsort(group_B, kind="stable")
    groups, starts = np.unique(group_B[order], return_index=True)
    return order, groups, starts
