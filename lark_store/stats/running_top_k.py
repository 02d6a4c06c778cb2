"""Running statistics of a group's scores: the best per query, mean and deviation.

Shape letters: Q queries, B rows of a batch, N samples of a group, H hits kept per query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class GroupScores:
    """One group's scores against Q queries.

    `top_codes`, `top_scores` (Q, H) hold each query's highest scores, best first, ties by code (arbitrary among ties
    for the last place). `max_Q`, `mean_Q`, `std_Q` (population) and `argmax`, a code, cover all N samples.
    """

    top_codes: NDArray[np.int64]
    top_scores: NDArray[np.float32]
    max_Q: NDArray[np.float32]
    argmax: NDArray[np.int64]
    mean_Q: NDArray[np.float32]
    std_Q: NDArray[np.float32]
    n: int


class Tally:
    """The H best of each of Q queries over a stream of scores, with running mean and deviation.

    Samples are identified by codes, integers in the order of their ids.
    """

    def __init__(self, n_queries: int, hits: int) -> None:
        self.hits = hits
        self.n = 0
        self._scores = np.empty((n_queries, 0), np.float32)
        self._codes = np.empty((n_queries, 0), np.int64)
        self._mean = np.zeros(n_queries)
        self._spread = np.zeros(n_queries)  # sum of squared deviations from the mean

    def resume(
        self,
        codes_QH: NDArray[np.int64],
        scores_QH: NDArray[np.float32],
        mean_Q: NDArray[np.float32],
        std_Q: NDArray[np.float32],
        n: int,
    ) -> None:
        """Start from an earlier tally with as many hits, over n samples."""
        self._codes, self._scores, self.n = codes_QH, scores_QH, n
        self._mean, self._spread = mean_Q.astype(np.float64), np.square(std_Q.astype(np.float64)) * n

    def take(self, codes_B: NDArray[np.int64], scores_QB: NDArray[np.float32]) -> None:
        """Add the scores of a batch of samples."""
        self._add(scores_QB.astype(np.float64))
        scores = np.concatenate([self._scores, scores_QB], axis=1)
        codes = np.concatenate([self._codes, np.broadcast_to(codes_B, scores_QB.shape)], axis=1)
        if scores.shape[1] > self.hits:
            best = np.argpartition(-scores, self.hits - 1, axis=1)[:, : self.hits]
            scores, codes = np.take_along_axis(scores, best, 1), np.take_along_axis(codes, best, 1)
        self._scores, self._codes = scores, codes

    def _add(self, scores_QB: NDArray[np.float64]) -> None:
        """Merge means and deviations (Chan, Golub & LeVeque 1983); sums of squares would lose small deviations."""
        n, new = self.n, scores_QB.shape[1]
        if not new:
            return
        mean = scores_QB.mean(axis=1)
        apart = mean - self._mean
        self.n = n + new
        self._spread += np.square(scores_QB - mean[:, None]).sum(axis=1) + np.square(apart) * n * new / self.n
        self._mean += apart * new / self.n

    def result(self) -> GroupScores | None:
        """Return the results; None without samples."""
        if not self.n:
            return None
        order = np.lexsort((self._codes, -self._scores), axis=1)
        scores, codes = np.take_along_axis(self._scores, order, 1), np.take_along_axis(self._codes, order, 1)
        of_groups = self._mean.astype(np.float32), np.sqrt(self._spread / self.n).astype(np.float32)
        return GroupScores(codes, scores, scores[:, 0], codes[:, 0], *of_groups, self.n)
