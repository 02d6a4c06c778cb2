"""Locations of stores: a catalog with locks and snapshots, in a folder or in a PostgreSQL database.

`local` and `postgres` implement the protocols of a `Location`. The catalog records the location of the vectors; by
default they are in the same folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lark_store.errors import StoreError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from sqlalchemy import Connection, Engine

BUSY_TIMEOUT_S = 30
VERSION_TABLE = "lark_store_version"


class Catalog(Protocol):
    """The catalog's database: a SQLite file, or a PostgreSQL database."""

    @property
    def label(self) -> str:
        """The name shown to users, without secrets."""

    def schema(self) -> str:
        """Return the schema version without writing; raises NotAStoreError or StoreError."""

    def engine(self) -> Engine:
        """Return an engine for reading and writing."""

    def migrating(self) -> AbstractContextManager[Connection]:
        """Hold an exclusive transaction for schema changes."""

    def keep(self, schema: str) -> Path | str | None:
        """Back up the catalog at this schema version; returns the backup's location."""

    def frozen(self) -> AbstractContextManager[None]:
        """Block commits of runs by other processes; raises StoreBusyError."""

    def copy(self, target: Path) -> None:
        """Copy the catalog to a SQLite file that can be opened as a catalog."""

    def vectors(self) -> str | None:
        """Return the recorded location of the vectors."""

    def faults(self) -> list[tuple[int, str]]:
        """Return the problems that the database finds in itself: (count, description)."""

    def sizes(self) -> list[int]:
        """Return the sizes of its files in bytes."""


class Lock(Protocol):
    """A lock that is released when its process ends."""

    @property
    def is_locked(self) -> bool:
        """Whether this object holds the lock."""

    def acquire(self, timeout: float) -> Any:
        """Acquire the lock, or raise `filelock.Timeout`."""

    def release(self) -> None:
        """Release the lock."""


class Locks(Protocol):
    """The locks of a store and their notes."""

    def lock(self, name: str) -> Lock:
        """Return the lock of this name, not acquired yet."""

    def ensure(self) -> None:
        """Check that this process still holds its locks; raises StoreBusyError."""

    def write(self, key: str, note: dict[str, Any]) -> None:
        """Write the note of a lock."""

    def read(self, key: str) -> dict[str, Any] | None:
        """Return a lock's note, or None if there is none."""

    def notes(self) -> list[str]:
        """Return the names of the locks that have a note."""

    def remove(self, key: str) -> None:
        """Remove a note, if any, and the remains of its lock."""

    def unnoted(self) -> list[str]:
        """Return single-use locks without a note, whose process may have been killed."""


class Snapshots(Protocol):
    """The catalogs and records of snapshots."""

    def names(self) -> list[str]:
        """Return the names of complete snapshots."""

    def parts(self) -> set[str]:
        """Return all names with any data, including incomplete snapshots."""

    def record(self, name: str) -> dict[str, Any]:
        """Return the record of a snapshot; raises OSError, ValueError or KeyError."""

    def making(self, name: str) -> AbstractContextManager[Path]:
        """Yield the path for the copy of the catalog."""

    def keep(self, name: str, copy: Path, record: dict[str, Any]) -> None:
        """Write the record, which completes the snapshot."""

    def forget(self, name: str) -> None:
        """Remove the record; the snapshot no longer exists."""

    def clear(self, name: str) -> None:
        """Remove the remains of a snapshot."""

    def catalog(self, name: str) -> AbstractContextManager[Catalog]:
        """Yield a snapshot's catalog for reading, copying or migrating."""

    def engine(self, name: str) -> Engine:
        """Return a read-only engine for a snapshot's catalog."""

    def sizes(self) -> list[int]:
        """Return the size of each catalog in bytes."""


@dataclass(frozen=True)
class Location:
    """The location of a store. `root` is its folder, None for PostgreSQL; `cache` may be deleted.

    `has_password`: the user's URL contains a password; `label` never does.
    """

    label: str
    catalog: Catalog
    locks: Locks
    snapshots: Snapshots
    cache: Path
    root: Path | None = None
    has_password: bool = False

    @property
    def vectors(self) -> str:
        """The folder or URL of the Lance tables, from the catalog."""
        place = self.catalog.vectors()
        if place is None and self.root is None:
            raise StoreError(
                f"the catalog `{self.label}` does not record the location of the vectors", "restore it from a backup"
            )
        return place or str(self.root / "vectors")  # type: ignore[operator]
