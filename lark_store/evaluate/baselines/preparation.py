"""The time of a score, in two parts as in the multi-stage paper's Table 1, and the results that trials share.

    overhead     preparing, once for all queries: fitting a curvature, finding eigenvectors, loading the model
    pairwise     scoring all candidates for one query

Several queries scored together share the work on the candidates, such as their gradients. One query alone would need
all of it, so it counts in full; the rest is divided by the number of queries. Times are wall-clock seconds.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


@dataclass(frozen=True)
class Seconds:
    """The seconds of preparing and of scoring all candidates for one query."""

    overhead: float
    pairwise: float


class Preparation:
    """Results that one score makes once for all trials, and the clock of the trial that is running."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Any, float]] = {}
        self.begin()

    def begin(self) -> None:
        """Start the clock of a trial."""
        self._overhead = self._candidates = self._apart = 0.0  # `_apart`: the time of neither a query nor a pair
        self._stored: Seconds | None = None
        self._started = time.perf_counter()

    def once(self, part: str, make: Callable[[], T]) -> T:
        """Return a result made once; its seconds are overhead of every trial that uses it."""
        if part not in self._made:
            started = time.perf_counter()
            made = make()
            seconds = time.perf_counter() - started
            self._made[part] = made, seconds
            self._apart += seconds
        result, seconds = self._made[part]
        self._overhead += seconds
        return result  # type: ignore[no-any-return]

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Count a block as overhead of this trial alone."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._apart += seconds
        self._overhead += seconds

    @contextmanager
    def candidates(self, n_passes: int = 1) -> Iterator[None]:
        """Count a block as work on the candidates, repeated in each of `n_passes` over them."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._apart += seconds
        self._candidates += seconds / n_passes

    def add_overhead(self, seconds: float) -> None:
        """Add seconds that an earlier command spent."""
        self._overhead += seconds

    def restore(self, seconds: Seconds) -> None:
        """Use the times of stored scores in place of this trial's."""
        self._stored = seconds

    def seconds(self, n_queries: int) -> Seconds:
        """Return the seconds of this trial."""
        if self._stored is not None:
            return self._stored
        of_queries = max(0.0, time.perf_counter() - self._started - self._apart)
        return Seconds(self._overhead, self._candidates + of_queries / n_queries)
