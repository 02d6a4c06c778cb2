"""Threads which run one step at a time, so any interleaving of two processes can be repeated.

A step ends before each transaction on the catalog, each opening of a table and each append.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lark_store.schema.database import Database
from lark_store.schema.vectors import VectorStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PATIENCE_S = 120.0
_workers: dict[int, Stepper] = {}


class Stepper:
    """A function in a thread of its own, stopped before its first step. `result` is its return value."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        _workers[threading.get_ident()] = self
        try:
            assert self._go.acquire(timeout=_PATIENCE_S)
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001  # raised again by `step`
            self.error = error
        finally:
            del _workers[threading.get_ident()]
            self.done = True
            self._stopped.release()

    def step(self) -> bool:
        """Go on to the next boundary or the end; returns whether there is more to do."""
        if not self.done:
            self._go.release()
            assert self._stopped.acquire(timeout=_PATIENCE_S), "the work waits for something"
        if self.error is not None:
            raise self.error
        return not self.done

    def finish(self) -> Any:
        """Go on to the end and return the result."""
        while self.step():
            pass
        return self.result

    def stop_here(self) -> None:
        """Wait at a boundary; called by the work's own thread."""
        self._stopped.release()
        assert self._go.acquire(timeout=_PATIENCE_S)


@contextmanager
def boundaries() -> Iterator[None]:
    """Make every `Stepper` stop at its boundaries."""
    kept = {(kind, name): getattr(kind, name) for kind, name in _STOPS}
    for (kind, name), method in kept.items():
        setattr(kind, name, _stopping(method))
    try:
        yield
    finally:
        for (kind, name), method in kept.items():
            setattr(kind, name, method)


_STOPS = ((Database, "session"), (VectorStore, "table"), (VectorStore, "append"))


def _stopping(method: Callable[..., Any]) -> Callable[..., Any]:
    def stops(*args: Any, **kwargs: Any) -> Any:
        worker = _workers.get(threading.get_ident())
        if worker is not None:
            worker.stop_here()
        return method(*args, **kwargs)

    return stops
