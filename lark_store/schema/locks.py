"""Who is at work on a store, by its locks, so that no two pieces of work cross each other.

- A `Work` is held by what adds to the store (an ingest of one unit, a source that is read, a scoring). Beside its lock
  lies a note of the sources and checkpoints that it touches.
- `removing` is held by what takes away. It refuses while a work touches the same names, and no work begins meanwhile.
- `maintenance` is held by removal, optimize, snapshots, check, repair and backup: one of them at a time.

A lock dies with its process; a note whose lock is free is one that a killed process left.
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

    from lark_store.schema.location import Location, Lock

_PATIENCE_S = 30.0
Names = dict[str, list[str]]  # kind, such as `source`, to names


@contextmanager
def _held(lock: Lock, seconds: float, fact: str, hint: str) -> Iterator[None]:
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise StoreBusyError(fact, hint) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _gate(location: Location, patience: float | None = None) -> Iterator[None]:
    """Hold the gate: by each work for the moment in which it begins, by removal and repair for as long as they last."""
    fact, hint = "another process is removing from this store", "wait for it, then run the command again"
    with _held(location.locks.lock("gate"), _PATIENCE_S if patience is None else patience, fact, hint):
        yield


class Work:
    """A piece of work: `key` tells it from others, `doing` says what it is, `touches` what must not go meanwhile.

    Without `touches` nothing at all may go.
    """

    def __init__(self, location: Location, key: str, doing: str, touches: Names | None = None) -> None:
        self.location, self.key, self.doing, self.touches = location, key, doing, touches
        self._lock = location.locks.lock(key)

    def acquire(self) -> None:
        """Begin.

        Raises
        ------
        StoreBusyError
            Another process does this work, or something is being removed.
        """
        with _gate(self.location):
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise StoreBusyError(
                    f"another process is {self.doing}", "wait for it, or do something else meanwhile"
                ) from error
            try:
                self.location.locks.write(self.key, {"doing": self.doing, "touches": self.touches})
            except Exception:  # a full disk, or a database that is gone
                self._lock.release()
                raise

    def release(self) -> None:
        """End; harmless where it was not begun."""
        if self._lock.is_locked:
            self.location.locks.remove(self.key)  # else each name ever used would leave a file
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
    """Hold off every removal while scores are made; several may score at a time."""
    key = f"score-{uuid4().hex}"
    with working(location, key, "scoring"):
        yield


@contextmanager
def maintenance(location: Location) -> Iterator[None]:
    """Hold the store's maintenance: one job at a time.

    Raises
    ------
    StoreBusyError
    """
    fact = "another process is removing from this store, optimizing it or making a snapshot"
    with _held(location.locks.lock("maintenance"), 0, fact, "wait for it, then run the command again"):
        yield


@contextmanager
def removing(location: Location, kind: str, name: str) -> Iterator[None]:
    """Hold off all work on the checkpoint or source of this name.

    Raises
    ------
    StoreBusyError
        Such work is under way.
    """
    with maintenance(location), _gate(location):
        for key in location.locks.notes():
            work = _alive(location, key)
            if work is None:
                location.locks.remove(key)  # what wrote it has ended, or was killed
            elif work["touches"] is None or name in work["touches"].get(kind, []):
                raise StoreBusyError(
                    f"{kind} `{name}` is in use: another process is {work['doing']}",
                    "wait for it, then run the command again; nothing was removed",
                )
        yield


def _alive(location: Location, key: str) -> dict[str, Any] | None:
    """Return what a note says if its work is under way. Behind the gate: no work begins while its lock is tried."""
    lock = location.locks.lock(key)
    with suppress(Timeout):
        lock.acquire(timeout=0)
        lock.release()
        return None
    return location.locks.read(key)  # None: it has just ended


@dataclass(frozen=True)
class Pause:
    """The store while no work begins: the notes of what is under way, and the locks that killed work left."""

    works: list[dict[str, Any]]
    leftovers: list[str]

    @property
    def doing(self) -> list[str]:
        """What is under way, in words."""
        return sorted(str(work["doing"]) for work in self.works)

    def touches(self, **names: str) -> bool:
        """Tell whether a work is under way that touches all of these names, given as kind=name."""
        said = [work["touches"] for work in self.works]
        return any(t is None or all(name in t.get(kind, []) for kind, name in names.items()) for t in said)


@contextmanager
def paused(location: Location, patience: float | None = None) -> Iterator[Pause]:
    """Hold off work that would begin, and tell what is under way.

    Raises
    ------
    StoreBusyError
        Something is being removed or repaired for longer than `patience` seconds.
    """
    with _gate(location, patience):
        works, leftovers = [], location.locks.unnoted()
        for key in location.locks.notes():
            work = _alive(location, key)
            if work is None:
                leftovers.append(key)
            else:
                works.append(work)
        yield Pause(works, leftovers)
