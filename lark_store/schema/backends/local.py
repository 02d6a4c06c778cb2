"""A store in a folder: a SQLite catalog with lock files and snapshot files next to it."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from sqlalchemy import URL, NullPool, create_engine, event, text

from lark_store.core.paths import check_database, check_place, is_file
from lark_store.errors import NotAStoreError, StoreBusyError, StoreError
from lark_store.schema.backends import base as settings
from lark_store.schema.backends.base import VERSION_TABLE, Location
from lark_store.schema.faults import fault_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy import Connection, Engine

    from lark_store.schema.backends.base import Lock

APPLICATION_ID = 0x4C41524B  # "LARK" in the header of the SQLite file


def in_folder(root: Path) -> Location:
    """Return the location of a store in a folder.

    Raises
    ------
    StoreError
        The path is not possible for a store.
    """
    label, root = str(root), check_place(root, "a store")  # absolute, as the working folder may change
    catalog = CatalogFile(root / "catalog.sqlite", root / "catalog", label)
    locks, snapshots = FileLocks(root / "locks"), SnapshotFiles(root / "snapshots")
    return Location(label, catalog, locks, snapshots, root, root)


# --- the catalog ---------------------------------------------------------------------------------------------------


def _configure(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in ("foreign_keys = ON", "journal_mode = WAL", f"busy_timeout = {settings.BUSY_TIMEOUT_S * 1000}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _configure_reader(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA query_only = ON")


def _engine(path: Path) -> Engine:
    return create_engine(URL.create("sqlite", database=str(check_database(path))))


@dataclass(frozen=True)
class CatalogFile:
    """A catalog in a SQLite file. Backup names start with `backup_prefix`; `label` is the store's name."""

    path: Path
    backup_prefix: Path | None
    label: str

    def engine(self) -> Engine:
        """Return an engine that configures each new connection."""
        engine = _engine(self.path)
        event.listen(engine, "connect", _configure)
        return engine

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """Hold `BEGIN IMMEDIATE` without foreign keys, so that rebuilding a table does not cascade."""
        engine = create_engine(
            URL.create("sqlite", database=str(self.path)),
            poolclass=NullPool,
            connect_args={"isolation_level": None, "timeout": settings.BUSY_TIMEOUT_S},
        )

        @event.listens_for(engine, "connect")
        def _off(connection: Any, _record: object) -> None:
            connection.execute("PRAGMA foreign_keys = OFF")

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        with engine.begin() as connection:
            yield connection
            broken = connection.execute(text("PRAGMA foreign_key_check")).fetchall()
            if broken:
                raise StoreError(
                    f"the migration would break {len(broken)} references", "nothing was changed; report this bug"
                )
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
        engine.dispose()

    def schema(self) -> str:
        """Return the schema version.

        Raises
        ------
        NotAStoreError
            There is no catalog, or the file is not a lark-store catalog.
        StoreError
            Permission denied.
        """
        missing = NotAStoreError(
            f"there is no lark-store at `{self.label}`",
            "create one with `lark-store init`, or set its path with `--store PATH` or `LARK_STORE`",
        )
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise missing
        except PermissionError as error:
            raise self._denied() from error
        except OSError as error:
            raise missing from error
        try:
            with closing(self._reader()) as db:
                if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                    raise missing
                pages = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
                size = db.execute(pages).fetchone()[0]
                row = db.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()  # noqa: S608
        except sqlite3.Error as error:
            if fault_of(error) and not self._is_writable():
                raise self._denied() from error
            raise self._unreadable(str(error)) from error
        # With a write-ahead log, the file may be shorter than the database.
        log = self.path.with_name(f"{self.path.name}-wal")
        if self.path.stat().st_size < size and not (is_file(log) and log.stat().st_size):
            raise self._unreadable("it is truncated")
        if row is None:
            raise self._unreadable("it has no schema version")
        return str(row[0])

    def _reader(self) -> sqlite3.Connection:
        """Open the file read-only, unless a killed upgrade left a journal to roll back."""
        mode = "rw" if is_file(self.path.with_name(f"{self.path.name}-journal")) else "ro"
        return sqlite3.connect(f"{self.path.resolve().as_uri()}?mode={mode}", uri=True)

    def _is_writable(self) -> bool:
        return all(os.access(path, os.R_OK | os.W_OK) for path in (self.path, self.path.parent))

    def _denied(self) -> StoreError:
        return StoreError(
            f"the store `{self.label}` can't be opened: permission denied",
            "readers need write access to the folder too, for SQLite's log: copy the store, or ask its owner",
        )

    def _unreadable(self, reason: str) -> NotAStoreError:
        return NotAStoreError(
            f"`{self.path}` can't be read as a catalog: {reason}",
            "restore the store from a backup, or choose another with `--store PATH`",
        )

    def keep(self, schema: str) -> Path | None:
        """Back up the file in the store's folder."""
        if self.backup_prefix is None:
            return None
        backup = self.backup_prefix.with_name(f"{self.backup_prefix.name}-{schema}.backup.sqlite")
        with closing(sqlite3.connect(self.path)) as old, closing(sqlite3.connect(backup)) as copy:
            old.backup(copy)
        return backup

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold SQLite's write lock."""
        timeout = settings.BUSY_TIMEOUT_S
        with closing(sqlite3.connect(self.path, timeout=timeout, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise StoreBusyError(
                    f"the catalog has been locked by a writer for more than {timeout} s", "run the command again"
                ) from error
            yield
            connection.execute("ROLLBACK")

    def copy(self, target: Path) -> None:
        """Copy the file to a single file without a log."""
        check_database(target).unlink(missing_ok=True)
        with closing(sqlite3.connect(self.path)) as live, closing(sqlite3.connect(target)) as copy:
            live.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")

    def vectors(self) -> str | None:
        """Return the location of the vectors; None: next to the file."""
        try:
            with closing(self._reader()) as db:
                row = db.execute("SELECT vectors FROM store_meta").fetchone()
        except sqlite3.OperationalError:  # an older schema; readers of the catalog report other causes
            return None
        return row[0] if row else None

    def faults(self) -> list[tuple[int, str]]:
        """Return the problems that SQLite finds."""
        if not is_file(self.path):
            return [(1, "the file is missing; restore it from a backup")]
        try:
            with closing(self._reader()) as db:
                problems = [row[0] for row in db.execute("PRAGMA integrity_check")]
                broken = len(db.execute("PRAGMA foreign_key_check").fetchall())
        except sqlite3.Error as error:
            problems, broken = [str(error)], 0
        faults = [] if problems == ["ok"] else [(len(problems), f"{problems[0]}; restore it from a backup")]
        return faults + ([(broken, "rows reference missing rows")] if broken else [])

    def sizes(self) -> list[int]:
        """Return the sizes of the file and its log in bytes."""
        return [size for path in self.path.parent.glob(f"{self.path.name}*") if (size := _size(path)) is not None]


def _size(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return None


# --- locks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileLocks:
    """Lock files in a folder, each with an optional note file."""

    folder: Path

    def lock(self, name: str) -> Lock:
        """Return the lock on a lock file."""
        self.folder.mkdir(exist_ok=True)
        return FileLock(self.folder / f"{name}.lock")

    def ensure(self) -> None:
        """Do nothing: file locks can't be lost."""

    def _note(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def write(self, key: str, note: dict[str, Any]) -> None:
        """Write a note."""
        self._note(key).write_text(json.dumps(note), encoding="utf-8")

    def read(self, key: str) -> dict[str, Any] | None:
        """Return a note, or None if there is none."""
        try:
            note = json.loads(self._note(key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:  # damaged, but its writer is at work
            note = None
        is_valid = isinstance(note, dict) and {"doing", "touches"} <= note.keys()
        return note if is_valid else {"doing": "at work", "touches": None}

    def notes(self) -> list[str]:
        """Return the keys of all notes."""
        return sorted(path.name.removesuffix(".json") for path in self.folder.glob("*.json"))

    def remove(self, key: str) -> None:
        """Remove a note and its lock file."""
        self._note(key).unlink(missing_ok=True)
        (self.folder / f"{key}.lock").unlink(missing_ok=True)

    def unnoted(self) -> list[str]:
        """Return the free locks of scorings that have no note."""
        keys = (path.name.removesuffix(".lock") for path in self.folder.glob("score-*.lock"))
        return sorted(key for key in keys if not self._note(key).exists() and self._is_free(key))

    def _is_free(self, key: str) -> bool:
        with suppress(Timeout), self.lock(key).acquire(timeout=0):
            return True
        return False


# --- snapshots -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SnapshotFiles:
    """A snapshot is `NAME.sqlite`, a copy of the catalog, and `NAME.json`, its record, written last."""

    folder: Path

    def names(self) -> list[str]:
        """Return the names that have a record."""
        return sorted(path.name.removesuffix(".json") for path in self.folder.glob("*.json"))

    def parts(self) -> set[str]:
        """Return the names that have any file."""
        return {path.name.removesuffix(".sqlite") for path in self.folder.glob("*.sqlite")} | set(self.names())

    def _catalog(self, name: str) -> CatalogFile:
        backup_prefix = self.folder.parent / f"snapshot-{name}"
        return CatalogFile(self.folder / f"{name}.sqlite", backup_prefix, str(self.folder.parent))

    def record(self, name: str) -> dict[str, Any]:
        """Return a record."""
        facts: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return facts

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """Yield the snapshot's file."""
        self.folder.mkdir(exist_ok=True)
        yield self._catalog(name).path

    def keep(self, name: str, copy: Path, record: dict[str, Any]) -> None:  # noqa: ARG002  # the copy is in place
        """Write the record atomically."""
        draft = self.folder / ".draft"
        draft.write_text(json.dumps(record, indent=2), encoding="utf-8")
        draft.replace(self.folder / f"{name}.json")

    def forget(self, name: str) -> None:
        """Remove the record."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)

    def clear(self, name: str) -> None:
        """Remove the catalog."""
        self._catalog(name).path.unlink(missing_ok=True)

    @contextmanager
    def catalog(self, name: str) -> Iterator[CatalogFile]:
        """Yield the file itself."""
        yield self._catalog(name)

    def engine(self, name: str) -> Engine:
        """Return a read-only engine."""
        engine = _engine(self._catalog(name).path)
        event.listen(engine, "connect", _configure_reader)
        return engine

    def sizes(self) -> list[int]:
        """Return the size of each catalog in bytes."""
        return [size for path in self.folder.glob("*.sqlite") if (size := _size(path)) is not None]
