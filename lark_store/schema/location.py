"""Where a store is: its catalog with locks and snapshots, in a folder or in a PostgreSQL database.

What the two have in common is a `Location`; `schema/folder.py` and `schema/postgres.py` make them. Where the vectors
are, the catalog says: beside it in the folder if it says nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lark_store.errors import StoreError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection, Engine

BUSY_TIMEOUT_S = 30
VERSION_TABLE = "lark_store_version"
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.", re.IGNORECASE)
_SERVERS = ("postgresql", "postgres", "postgresql+psycopg")
_BUCKETS = ("s3", "gs", "az")


class Catalog(Protocol):
    """The catalog's database: a SQLite file, or a PostgreSQL database."""

    @property
    def label(self) -> str:
        """What it is called to people, without secrets."""

    def schema(self) -> str:
        """Return its schema version, reading only; raises NotAStoreError or StoreError."""

    def engine(self) -> Engine:
        """Return an engine that reads and writes it."""

    def migrating(self) -> AbstractContextManager[Connection]:
        """Hold a transaction in which its schema may be changed, by one process at a time."""

    def keep(self, schema: str) -> Path | str | None:
        """Keep a copy of it as it is at this schema; returns where."""

    def frozen(self) -> AbstractContextManager[None]:
        """Keep others from committing or superseding a run; raises StoreBusyError."""

    def copy(self, target: Path) -> None:
        """Copy it to a SQLite file that can be opened as a catalog."""

    def vectors(self) -> str | None:
        """Return where it says that the vectors are."""

    def faults(self) -> list[tuple[int, str]]:
        """Return what the database finds wrong with itself: how many, what."""

    def sizes(self) -> list[int]:
        """Return the bytes of its files."""


class Lock(Protocol):
    """A lock that dies with its process."""

    @property
    def is_locked(self) -> bool:
        """Whether this object holds it."""

    def acquire(self, timeout: float) -> Any:
        """Take it, or raise `filelock.Timeout`."""

    def release(self) -> None:
        """Let it go."""


class Locks(Protocol):
    """The locks of a store, and the notes that lie beside them."""

    def lock(self, name: str) -> Lock:
        """Return the lock of this name, not taken yet."""

    def ensure(self) -> None:
        """Make sure that what this process holds is still its own; raises StoreBusyError."""

    def write(self, key: str, note: dict[str, Any]) -> None:
        """Put a note beside a lock."""

    def read(self, key: str) -> dict[str, Any] | None:
        """Return a lock's note, None if there is none any more."""

    def notes(self) -> list[str]:
        """Return the names of the locks that have a note."""

    def remove(self, key: str) -> None:
        """Remove a note if it is there, and what the lock itself left."""

    def unnoted(self) -> list[str]:
        """Return locks made for one process alone that have no note; it may have been killed."""


class Snapshots(Protocol):
    """The snapshots' catalogs and records."""

    def names(self) -> list[str]:
        """Return the names of those that are whole."""

    def parts(self) -> set[str]:
        """Return the names of all of which there is something."""

    def record(self, name: str) -> dict[str, Any]:
        """Return a record; raises OSError, ValueError or KeyError."""

    def making(self, name: str) -> AbstractContextManager[Path]:
        """Yield where the copy of the catalog is to be put."""

    def keep(self, name: str, copy: Path, record: dict[str, Any]) -> None:
        """Write the record: from now on there is a snapshot."""

    def forget(self, name: str) -> None:
        """Remove the record: from now on there is none."""

    def clear(self, name: str) -> None:
        """Remove what is left."""

    def catalog(self, name: str) -> AbstractContextManager[Catalog]:
        """Yield a snapshot's catalog, to be read, copied or migrated."""

    def engine(self, name: str) -> Engine:
        """Return an engine that only reads a snapshot's catalog."""

    def sizes(self) -> list[int]:
        """Return the bytes of each."""


@dataclass(frozen=True)
class Location:
    """Where a store is. `root` is its folder, None where the catalog is in PostgreSQL; `cache` may be lost."""

    label: str
    catalog: Catalog
    locks: Locks
    snapshots: Snapshots
    cache: Path
    root: Path | None = None

    @property
    def vectors(self) -> str:
        """The folder or URL of the Lance tables, as the catalog says."""
        said = self.catalog.vectors()
        if said is None and self.root is None:
            raise StoreError(f"the catalog `{self.label}` does not say where the vectors are", "restore it")
        return said or str(self.root / "vectors")  # type: ignore[operator]

    @classmethod
    def of(cls, place: str | Path) -> Location:
        """Return where the store is that people call `place`: a folder, or `postgresql://…`.

        Raises
        ------
        StoreError
            It is neither.
        """
        url = _URL.match(place) if isinstance(place, str) else None
        if url is None:
            from lark_store.schema.folder import in_folder

            return in_folder(Path(place))
        assert isinstance(place, str)
        if url[1].lower() not in _SERVERS:
            hint = "a catalog is a folder or `postgresql://…`"
            if url[1].lower() in _BUCKETS:
                hint += "; the vectors alone can be there: `lark-store init --store PLACE --vectors URL`"
            raise StoreError(f"a store's catalog can't be at `{place}`", hint)
        from lark_store.schema.postgres import in_postgres

        return in_postgres(place)


def check_vectors(place: str) -> str:
    """Return a place for vectors as it is kept: the URL of a bucket, or an absolute folder.

    Raises
    ------
    StoreError
    """
    url = _URL.match(place)
    if url is None:
        if "?" in place:
            raise StoreError(f"vectors can't be at `{place}`: LanceDB reads `?` as part of a URL", "name another path")
        return str(Path(place).absolute())
    if url[1].lower() not in _BUCKETS:
        raise StoreError(f"vectors can't be at `{place}`", "a folder, or `s3://…`, `gs://…`, `az://…`")
    if re.search(r"[@?#]", place):
        raise StoreError(
            f"`{place}` says more than a bucket and a path", "keys and endpoints belong into the environment: AWS_…"
        )
    return place.rstrip("/")
