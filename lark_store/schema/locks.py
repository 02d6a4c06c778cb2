"""Who is at work on a store, by lock files, so that no two pieces of work cross each other.

- A `Work` is held by what adds to the store (an ingest of one unit, a source that is read, a scoring). Beside its lock
  lies a note of the sources and checkpoints that it touches.
- `removing` is held by what takes away. It refuses while a work touches the same names, and no work begins meanwhile.
- `maintenance` is held by removal, optimize, snapshots, check, repair and backup: one of them at a time.

A lock dies with its process; a note whose lock is free is one that a killed process left.
"""

from __future__ import annotations

import json
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
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
def _gate(location: Location, patience: float | None = None) -> Iterator[None]:
    """Hold the gate: by each work for the moment in which it begins, by removal and repair for as long as they last."""
    fact, hint = "another process is removing from this store", "wait for it, then run the command again"
    with _held(_lock(location, "gate"), _PATIENCE_S if patience is None else patience, fact, hint):
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
            try:
                self._note.write_text(json.dumps({"doing": self.doing, "touches": self.touches}), encoding="utf-8")
            except OSError:  # a full disk
                self._lock.release()
                raise

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
    work = _alive(note)
    if work is None:
        note.unlink(missing_ok=True)  # what wrote it has ended, or was killed
        return None
    touches: Names | None = work["touches"]
    return str(work["doing"]) if touches is None or name in touches.get(kind, []) else None


def _alive(note: Path) -> dict[str, Any] | None:
    """Return what a note says if its work is under way. Behind the gate: no work begins while its lock is tried."""
    with suppress(Timeout), FileLock(note.with_suffix(".lock")).acquire(timeout=0):
        return None
    try:
        work: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:  # it has just ended
        return None
    return work


@dataclass(frozen=True)
class Pause:
    """The store while no work begins: the notes of what is under way, and the files that killed work left."""

    works: list[dict[str, Any]]
    leftovers: list[Path]

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
        works, leftovers = [], []
        for note in sorted(location.locks.glob("*.json")):
            work = _alive(note)
            if work is None:
                leftovers.append(note)
            else:
                works.append(work)
        locks = sorted(location.locks.glob("score-*.lock"))  # each has a key of its own, and is gone at the end
        leftovers += [lock for lock in locks if not lock.with_suffix(".json").exists() and _free(lock)]
        yield Pause(works, [path for path in leftovers if path.exists()])


def _free(lock: Path) -> bool:
    with suppress(Timeout), FileLock(lock).acquire(timeout=0):
        return True
    return False
