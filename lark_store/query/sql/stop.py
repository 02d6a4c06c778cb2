"""Ending a query: its time, its memory, Ctrl-C, and the one flag that all who work on it look at."""

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
_GRACE_S = 2.0  # within it DuckDB heeds an interruption, unless one single call holds it up


class Stop:
    """When a query must end: after `timeout` seconds, or when the process has grown by `growth` bytes.

    Code that computes inside the query calls `check()` now and then; what ends the query early raises there, and
    reaches the asker as it is. `check` is that of a query around this one, if there is one.
    """

    def __init__(
        self, timeout: float | None = None, growth: int | None = None, check: Callable[[], None] | None = None
    ) -> None:
        self.timeout = timeout
        self.growth = growth
        self._outer = check
        self.error: BaseException | None = None

    @property
    def expired(self) -> bool:
        """Whether the query must end."""
        return self.error is not None

    def end(self, error: BaseException) -> None:
        """End the query with this error; the first one stays."""
        self.error = self.error or error

    def check(self) -> None:
        """Raise what ended the query, if it must end.

        Raises
        ------
        QueryError
        """
        if self.error is not None:
            raise self.error

    def watch(self, work: Callable[[], T], interrupt: Callable[[], None]) -> T:
        """Do the work in a thread and wait for it; past a limit, or on Ctrl-C, call `interrupt` until it ends.

        DuckDB sees no signal while it works, and one single call of a function can't be interrupted at all: work that
        goes on after two seconds of interruptions is left alone, and its thread ends with that call.
        """
        made: list[T] = []
        done = threading.Event()

        def run() -> None:
            try:
                made.append(work())
            except BaseException as error:  # noqa: BLE001  # it is raised where the work is waited for
                self.end(error)
            finally:
                done.set()

        thread = threading.Thread(target=run, name=_THREAD, daemon=True)
        thread.start()
        try:
            self._wait(done)
        except KeyboardInterrupt as error:
            self.end(error)
        if not done.is_set():
            until = time.monotonic() + _GRACE_S
            while not done.is_set() and time.monotonic() < until:
                interrupt()
                done.wait(_TICK_S)
        if done.is_set():
            thread.join()  # it has nothing left to do; while it lived, the query would be taken for one that is held up
        self.check()
        return made[0]

    def _look_up(self) -> None:
        """End when the work that this is a part of must end."""
        try:
            if self._outer:
                self._outer()
        except LarkStoreError as error:
            self.end(error)

    def _wait(self, done: threading.Event) -> None:
        """Wait for the work or for what ends it."""
        process = psutil.Process()
        before, start = process.memory_info().rss, time.monotonic()
        while not done.wait(_TICK_S) and not self.expired:
            self._look_up()
            if self.timeout is not None and time.monotonic() - start > self.timeout:
                self.end(
                    QueryError(
                        f"the query ran longer than {self.timeout:g} s",
                        "ask for less, or give it more with `--timeout`",
                    )
                )
            elif self.growth is not None and process.memory_info().rss - before > self.growth:
                self.end(too_large())


def too_large(fact: str = "the query needs more memory than it may have") -> LarkStoreError:
    """Return the error of a query that is ended for its memory."""
    return QueryError(fact, "ask for fewer rows or columns, or give it more with `--memory`")


def is_held_up() -> bool:
    """Tell whether a query that was ended goes on in this process, held up by one single call."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
