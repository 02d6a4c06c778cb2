"""Who is at work on a store, by lock files, so that no two pieces of work cross each other.

- A `Work` is held by what adds to the store (an ingest of one unit, a source that is read, a scoring). Beside its lock
  lies a note of the sources and checkpoints that it touches.
- `removing` is held by what takes away. It refuses while a work touches the same names, and no work begins meanwhile.
- `maintenance` is held by removal, optimize and snapshots: one of them at a time.

A lock dies with its process; a note whose lock is free is one that a killed process left.
"""

from __future__ import annotations

import json
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

from filelock import FileLock, Timeout

from lark_store.errors import StoreBusyError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lark_store.schema.database import Location

_PATIENCE_S = 30.0
Names = dict[str, list[str]]  # kind, such as `source`, to names


def _lock(location: Location, name: str) -> FileLock:
    location.locks.mkdir(exist_ok=True)
    return FileLock(location.locks / f"{name}.lock")


@contextmanager
def _held(lock: FileLock, seconds: float, fact: str, hint: str) -> Iterator[None]:
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise StoreBusyError(fact, hint) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _gate(location: Location) -> Iterator[None]:
    """Hold the gate: by each work for the moment in which it begins, by a removal for as long as it lasts."""
    fact, hint = "another process is removing from this store", "wait for it, then run the command again"
    with _held(_lock(location, "gate"), _PATIENCE_S, fact, hint):
        yield


class Work:
    """A piece of work: `key` tells it from others, `doing` says what it is, `touches` what must not go meanwhile.

    Without `touches` nothing at all may go.
    """

    def __init__(self, location: Location, key: str, doing: str, touches: Names | None = None) -> None:
        self.location, self.doing, self.touches = location, doing, touches
        self._lock = _lock(location, key)
        self._note = location.locks / f"{key}.json"

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
            self._note.write_text(json.dumps({"doing": self.doing, "touches": self.touches}), encoding="utf-8")

    def release(self) -> None:
        """End; harmless where it was not begun."""
        if self._lock.is_locked:
            self._note.unlink(missing_ok=True)
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
    (location.locks / f"{key}.lock").unlink(missing_ok=True)  # no other process has this key


@contextmanager
def maintenance(location: Location) -> Iterator[None]:
    """Hold the store's maintenance: one job at a time.

    Raises
    ------
    StoreBusyError
    """
    fact = "another process is removing from this store, optimizing it or making a snapshot"
    with _held(_lock(location, "maintenance"), 0, fact, "wait for it, then run the command again"):
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
        for note in sorted(location.locks.glob("*.json")):
            doing = _at_work(note, kind, name)
            if doing:
                raise StoreBusyError(
                    f"{kind} `{name}` is in use: another process is {doing}",
                    "wait for it, then run the command again; nothing was removed",
                )
        yield


def _at_work(note: Path, kind: str, name: str) -> str | None:
    """Return what the work with this note does, if it is alive and touches the name."""
    with suppress(Timeout), FileLock(note.with_suffix(".lock")).acquire(timeout=0):
        note.unlink(missing_ok=True)  # what wrote it was killed
        return None
    try:
        work = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:  # it has just ended
        return None
    touches: Names | None = work["touches"]
    return str(work["doing"]) if touches is None or name in touches.get(kind, []) else None
