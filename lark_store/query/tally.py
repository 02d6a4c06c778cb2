"""What is kept of a group's scores while they stream by: the best of each query, and sums.

Shape letters: Q queries, B rows of a batch, N samples of a group, H hits kept per query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class GroupScores:
    """One group's scores against Q queries.

    `top_ids`, `top_scores` (Q, H) hold the highest scores of each query, best first, ties by sample id (which of
    those that tie for the last place is kept is not said);
    `max_Q`, `mean_Q`, `std_Q` (the population's) and `argmax` are over all N samples.
    """

    top_ids: NDArray[Any]
    top_scores: NDArray[np.float32]
    max_Q: NDArray[np.float32]
    argmax: NDArray[Any]
    mean_Q: NDArray[np.float32]
    std_Q: NDArray[np.float32]
    n: int


class Tally:
    """The H best of each of Q queries over a stream of scores, and what mean and deviation are made of."""

    def __init__(self, n_queries: int, hits: int) -> None:
        self.hits = hits
        self.n = 0
        self._scores = np.empty((n_queries, 0), np.float32)
        self._ids = np.empty((n_queries, 0), dtype=object)
        self._total = np.zeros(n_queries)
        self._square = np.zeros(n_queries)

    def resume(
        self,
        ids_QH: NDArray[Any],
        scores_QH: NDArray[np.float32],
        mean_Q: NDArray[np.float32],
        std_Q: NDArray[np.float32],
        n: int,
    ) -> None:
        """Take what an earlier tally of as many hits came to, over n samples."""
        mean, std = mean_Q.astype(np.float64), std_Q.astype(np.float64)
        self._ids, self._scores, self.n = ids_QH.astype(object), scores_QH, n
        self._total, self._square = mean * n, (np.square(std) + np.square(mean)) * n

    def take(self, ids: list[str], scores_QB: NDArray[np.float32]) -> None:
        """Take the scores of some samples."""
        self.n += len(ids)
        exact = scores_QB.astype(np.float64)
        self._total += exact.sum(axis=1)
        self._square += np.square(exact).sum(axis=1)
        names = np.broadcast_to(np.array(ids, dtype=object), scores_QB.shape)
        scores = np.concatenate([self._scores, scores_QB], axis=1)
        names = np.concatenate([self._ids, names], axis=1)
        if scores.shape[1] > self.hits:
            best = np.argpartition(-scores, self.hits - 1, axis=1)[:, : self.hits]
            scores, names = np.take_along_axis(scores, best, 1), np.take_along_axis(names, best, 1)
        self._scores, self._ids = scores, names

    def result(self) -> GroupScores | None:
        """Return what was found; None if there was no sample."""
        if self.n == 0:
            return None
        by_id = np.argsort(self._ids, axis=1, kind="stable")
        scores, ids = np.take_along_axis(self._scores, by_id, 1), np.take_along_axis(self._ids, by_id, 1)
        order = np.argsort(-scores, axis=1, kind="stable")
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        mean = self._total / self.n
        std = np.sqrt(np.maximum(self._square / self.n - np.square(mean), 0))
        of_groups = mean.astype(np.float32), std.astype(np.float32)
        return GroupScores(ids, scores, scores[:, 0], ids[:, 0], *of_groups, self.n)
