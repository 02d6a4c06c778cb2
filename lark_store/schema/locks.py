"""Locks that keep concurrent work on a store from interfering.

- `Work`: held by any addition (the ingest of one unit, an added source, a scoring). Its note lists the sources and
  checkpoints that it touches.
- `removing`: held by a removal. It fails while a work touches the same names, and blocks new work.
- `maintenance`: held by removal, optimize, snapshots, check, repair and backup, one at a time.

Locks end with their process; a note with a free lock was left by a killed process.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from filelock import Timeout

from lark_store.errors import StoreBusyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.schema.backends.base import Location, Lock

_GATE_TIMEOUT_S = 30.0
_SCORING = "score-"
Names = dict[str, list[str]]  # kind, such as `source`, to names


@contextmanager
def _hold(lock: Lock, seconds: float, fact: str, hint: str) -> Iterator[None]:
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise StoreBusyError(fact, hint) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _gate(location: Location, timeout: float | None = None) -> Iterator[None]:
    """Hold the gate: each work while it starts, removal and repair until they end."""
    fact, hint = "another process is removing data from this store", "wait for it, then run the command again"
    with _hold(location.locks.lock("gate"), _GATE_TIMEOUT_S if timeout is None else timeout, fact, hint):
        yield


class Work:
    """Running work, identified by `key` and described by `doing`; the names in `touches` can't be removed meanwhile.

    Without `touches`, nothing can be removed.
    """

    def __init__(self, location: Location, key: str, doing: str, touches: Names | None = None) -> None:
        self.location, self.key, self.doing, self.touches = location, key, doing, touches
        self._lock = location.locks.lock(key)

    def acquire(self) -> None:
        """Start the work.

        Raises
        ------
        StoreBusyError
            Another process does this work, or a removal is running.
        """
        with _gate(self.location):
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise StoreBusyError(f"another process is {self.doing}", "wait for it to finish") from error
            try:
                self.location.locks.write(self.key, {"doing": self.doing, "touches": self.touches})
            except Exception:  # a full disk, or a lost database
                self._lock.release()
                raise

    def release(self) -> None:
        """End the work, if it was started."""
        if self._lock.is_locked:
            self.location.locks.remove(self.key)  # otherwise lock files would accumulate
            self._lock.release()


@contextmanager
def working(location: Location, key: str, doing: str, touches: Names | None = None) -> Iterator[None]:
    """Hold a `Work`."""
    work = Work(location, key, doing, touches)
    work.acquire()
    try:
        yield
    finally:
        work.release()


@contextmanager
def scoring(location: Location) -> Iterator[None]:
    """Block removals while scoring; several scorings can run at a time."""
    with working(location, f"{_SCORING}{uuid4().hex}", "scoring"):
        yield


def n_scoring(location: Location) -> int:
    """Count the running scorings, including this process's; remove notes of killed ones."""
    n = 0
    for key in location.locks.notes():
        if key.startswith(_SCORING):  # keys are single-use; the note follows the lock
            if _live_note(location, key) is None:
                location.locks.remove(key)
            else:
                n += 1
    return n


@contextmanager
def maintenance(location: Location) -> Iterator[None]:
    """Hold the maintenance lock: one job at a time.

    Raises
    ------
    StoreBusyError
    """
    fact = "another process is removing data, optimizing or making a snapshot"
    with _hold(location.locks.lock("maintenance"), 0, fact, "wait for it, then run the command again"):
        yield


@contextmanager
def removing(location: Location, kind: str, name: str) -> Iterator[None]:
    """Block all work on the checkpoint or source of this name.

    Raises
    ------
    StoreBusyError
        Such work is running.
    """
    with maintenance(location), _gate(location):
        for key in location.locks.notes():
            work = _live_note(location, key)
            if work is None:
                location.locks.remove(key)  # its process ended or was killed
            elif work["touches"] is None or name in work["touches"].get(kind, []):
                raise StoreBusyError(
                    f"{kind} `{name}` is in use: another process is {work['doing']}",
                    "wait for it, then run the command again; nothing was removed",
                )
        yield


def _live_note(location: Location, key: str) -> dict[str, Any] | None:
    """Return the note of running work, else None. Call it behind the gate, so that no work starts meanwhile."""
    lock = location.locks.lock(key)
    with suppress(Timeout):
        lock.acquire(timeout=0)
        lock.release()
        return None
    return location.locks.read(key)  # None if it has just ended


@dataclass(frozen=True)
class Pause:
    """The store while no work can start: notes of running work, and leftover locks of killed work."""

    works: list[dict[str, Any]]
    leftovers: list[str]

    @property
    def doing(self) -> list[str]:
        """Descriptions of the running work."""
        return sorted(str(work["doing"]) for work in self.works)

    def touches(self, **names: str) -> bool:
        """Tell whether any running work touches all of these names, given as kind=name."""
        touched = [work["touches"] for work in self.works]
        return any(t is None or all(name in t.get(kind, []) for kind, name in names.items()) for t in touched)


@contextmanager
def paused(location: Location, timeout: float | None = None) -> Iterator[Pause]:
    """Block new work and report the running work.

    Raises
    ------
    StoreBusyError
        A removal or repair takes longer than `timeout` seconds.
    """
    with _gate(location, timeout):
        works, leftovers = [], location.locks.unnoted()
        for key in location.locks.notes():
            work = _live_note(location, key)
            if work is None:
                leftovers.append(key)
            else:
                works.append(work)
        yield Pause(works, leftovers)
