"""End a query: time and memory limits, Ctrl-C, and one flag checked by all code working on it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, TypeVar

import psutil

from lark_store.errors import LarkStoreError, QueryError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
_THREAD = "lark-store-query"
_TICK_S = 0.05
_GRACE_S = 2.0  # DuckDB reacts to an interruption within this time, unless one call blocks it


class Stop:
    """Limits of a query: `timeout` in seconds, and `growth` of the process in bytes.

    Code inside the query calls `check()` regularly; it raises the error that ended the query, which reaches the caller
    unchanged. `check` is the check of an enclosing query, if any. `is_fixed`: the caller can't change the limits.
    """

    def __init__(
        self,
        timeout: float | None = None,
        growth: int | None = None,
        check: Callable[[], None] | None = None,
        *,
        is_fixed: bool = False,
    ) -> None:
        self.timeout = timeout
        self.growth = growth
        self.is_fixed = is_fixed
        self._outer = check
        self._started = time.monotonic()
        self.error: BaseException | None = None

    @property
    def expired(self) -> bool:
        """Whether the query must end."""
        return self.error is not None

    def end(self, error: BaseException) -> None:
        """End the query with this error; the first one counts."""
        self.error = self.error or error

    def check(self) -> None:
        """Raise the error that ended the query, if any.

        Raises
        ------
        QueryError
        """
        if self.error is not None:
            raise self.error

    def check_time(self, seconds: float) -> None:
        """Raise an error if `seconds` more, unwatched, would exceed the time limit.

        Raises
        ------
        QueryError
        """
        self.check()
        if self.timeout is not None and time.monotonic() - self._started + seconds > self.timeout:
            raise self._too_long()

    def _too_long(self) -> QueryError:
        hint = "simplify the query" if self.is_fixed else "simplify the query, or raise the limit with `--timeout`"
        return QueryError(f"the query ran longer than {self.timeout:g} s", hint)

    def watch(self, work: Callable[[], T], interrupt: Callable[[], None]) -> T:
        """Run the work in a thread and wait for it; at a limit or on Ctrl-C, call `interrupt` until it ends.

        DuckDB handles no signals while it works, and a single function call can't be interrupted. Work that continues
        after two seconds of interruptions is abandoned; its thread ends with that call.
        """
        self._started = time.monotonic()
        results: list[T] = []
        finished = threading.Event()

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:  # noqa: BLE001  # raised again by the waiting thread
                self.end(error)
            finally:
                finished.set()

        thread = threading.Thread(target=run, name=_THREAD, daemon=True)
        try:  # Ctrl-C may come as soon as the thread runs, within `start` too
            thread.start()
            self._wait(finished)
        except KeyboardInterrupt as error:
            self.end(error)
        if not finished.is_set():
            until = time.monotonic() + _GRACE_S
            while not finished.is_set() and time.monotonic() < until:
                interrupt()
                finished.wait(_TICK_S)
        if finished.is_set():
            thread.join()  # already finishing; a living thread would count as held up
        self.check()
        return results[0]

    def _look_up(self) -> None:
        """End if the enclosing query must end."""
        try:
            if self._outer:
                self._outer()
        except LarkStoreError as error:
            self.end(error)

    def _wait(self, finished: threading.Event) -> None:
        """Wait until the work finishes or must end."""
        process = psutil.Process()
        before, start = process.memory_info().rss, self._started
        while not finished.wait(_TICK_S) and not self.expired:
            self._look_up()
            if self.timeout is not None and time.monotonic() - start > self.timeout:
                self.end(self._too_long())
            elif self.growth is not None and process.memory_info().rss - before > self.growth:
                self.end(too_large(is_fixed=self.is_fixed))


def too_large(fact: str = "the query exceeded its memory limit", *, is_fixed: bool = False) -> LarkStoreError:
    """Return the error for a query that exceeds its memory limit."""
    option = "" if is_fixed else ", or raise the limit with `--memory`"
    return QueryError(fact, f"select fewer rows or columns{option}")


def is_held_up() -> bool:
    """Tell whether an ended query still runs in this process, blocked by a single call."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
