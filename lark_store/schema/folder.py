"""A store in a folder: the catalog a SQLite file, locks and snapshots files beside it."""

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

from lark_store.errors import NotAStoreError, StoreBusyError, StoreError
from lark_store.schema import location as settings
from lark_store.schema.faults import fault_of
from lark_store.schema.location import VERSION_TABLE, Location
from lark_store.schema.paths import is_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy import Connection, Engine

    from lark_store.schema.location import Lock

APPLICATION_ID = 0x4C41524B  # "LARK" in the header of the SQLite file


def in_folder(root: Path) -> Location:
    """Return the location of a store in a folder.

    Raises
    ------
    StoreError
        No store can be at such a path.
    """
    if "?" in str(root.absolute()):
        raise StoreError(f"a store can't be at `{root}`: LanceDB reads `?` as part of a URL", "name another path")
    catalog = CatalogFile(root / "catalog.sqlite", root / "catalog", str(root))
    locks, snapshots = FileLocks(root / "locks"), SnapshotFiles(root / "snapshots")
    return Location(str(root), catalog, locks, snapshots, root, root)


# --- the catalog ---------------------------------------------------------------------------------------------------


def _configure(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in ("foreign_keys = ON", "journal_mode = WAL", f"busy_timeout = {settings.BUSY_TIMEOUT_S * 1000}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _configure_reader(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA query_only = ON")


def _engine(path: Path) -> Engine:
    return create_engine(URL.create("sqlite", database=str(path)))


@dataclass(frozen=True)
class CatalogFile:
    """A catalog in a SQLite file; `kept` is the beginning of the names of its backups, `label` its store's name."""

    path: Path
    kept: Path | None
    label: str

    def engine(self) -> Engine:
        """Return an engine with the settings that SQLite forgets with each connection."""
        engine = _engine(self.path)
        event.listen(engine, "connect", _configure)
        return engine

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """Hold `BEGIN IMMEDIATE` without foreign keys: a rebuilt table must not cascade into its children."""
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
                    f"the migration would break {len(broken)} references", "nothing was changed; report it"
                )
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
        engine.dispose()

    def schema(self) -> str:
        """Return the schema version.

        Raises
        ------
        NotAStoreError
            There is no catalog, or the file is not one of ours.
        StoreError
            It may not be read.
        """
        missing = NotAStoreError(
            f"there is no lark-store at `{self.label}`",
            "make one with `lark-store init`, or name yours with `--store PATH` or `LARK_STORE`",
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
                found = db.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()  # noqa: S608
        except sqlite3.Error as error:
            if fault_of(error) and not self._is_writable():
                raise self._denied() from error
            raise self._unreadable(str(error)) from error
        # With something in the write-ahead log beside it, the file may rightly be shorter than the database.
        log = self.path.with_name(f"{self.path.name}-wal")
        if self.path.stat().st_size < size and not (is_file(log) and log.stat().st_size):
            raise self._unreadable("it is cut short")
        if found is None:
            raise self._unreadable("it has no schema version")
        return str(found[0])

    def _reader(self) -> sqlite3.Connection:
        """Open it read-only, unless a killed upgrade left a journal: what that holds is to be undone."""
        mode = "rw" if is_file(self.path.with_name(f"{self.path.name}-journal")) else "ro"
        return sqlite3.connect(f"{self.path.resolve().as_uri()}?mode={mode}", uri=True)

    def _is_writable(self) -> bool:
        return all(os.access(path, os.R_OK | os.W_OK) for path in (self.path, self.path.parent))

    def _denied(self) -> StoreError:
        return StoreError(
            f"the store `{self.label}` can't be opened: permission denied",
            "also who only reads must be able to write in its folder, where SQLite keeps a log: copy it, or ask its "
            "owner",
        )

    def _unreadable(self, why: str) -> NotAStoreError:
        return NotAStoreError(
            f"`{self.path}` can't be read as a catalog: {why}",
            "restore the store from a backup, or name another with `--store PATH`",
        )

    def keep(self, schema: str) -> Path | None:
        """Copy the file beside the store's other parts."""
        if self.kept is None:
            return None
        backup = self.kept.with_name(f"{self.kept.name}-{schema}.backup.sqlite")
        with closing(sqlite3.connect(self.path)) as old, closing(sqlite3.connect(backup)) as copy:
            old.backup(copy)
        return backup

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold SQLite's one write lock."""
        timeout = settings.BUSY_TIMEOUT_S
        with closing(sqlite3.connect(self.path, timeout=timeout, isolation_level=None)) as held:
            try:
                held.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise StoreBusyError(
                    f"the catalog is being written to for more than {timeout} s", "run the command again"
                ) from error
            yield
            held.execute("ROLLBACK")

    def copy(self, target: Path) -> None:
        """Copy the file; the copy is one plain file, with no log beside it."""
        target.unlink(missing_ok=True)
        with closing(sqlite3.connect(self.path)) as live, closing(sqlite3.connect(target)) as copy:
            live.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")

    def vectors(self) -> str | None:
        """Return where the vectors are, None: beside the file."""
        try:
            with closing(self._reader()) as db:
                found = db.execute("SELECT vectors FROM store_meta").fetchone()
        except sqlite3.OperationalError:  # an older schema; what else it may be, whoever reads the catalog will say
            return None
        return found[0] if found else None

    def faults(self) -> list[tuple[int, str]]:
        """Return what SQLite finds wrong."""
        if not is_file(self.path):
            return [(1, "the file is missing; restore it from a backup")]
        try:
            with closing(self._reader()) as db:
                said = [row[0] for row in db.execute("PRAGMA quick_check")]
                broken = len(db.execute("PRAGMA foreign_key_check").fetchall())
        except sqlite3.Error as error:
            said, broken = [str(error)], 0
        found = [] if said == ["ok"] else [(len(said), f"{said[0]}; restore it from a backup")]
        return found + ([(broken, "rows refer to rows that are not there")] if broken else [])

    def sizes(self) -> list[int]:
        """Return the bytes of the file and of its log."""
        return [size for path in self.path.parent.glob(f"{self.path.name}*") if (size := _size(path)) is not None]


def _size(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return None


# --- locks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileLocks:
    """Lock files in a folder, each maybe with a note beside it."""

    folder: Path

    def lock(self, name: str) -> Lock:
        """Return a lock file's lock."""
        self.folder.mkdir(exist_ok=True)
        return FileLock(self.folder / f"{name}.lock")

    def ensure(self) -> None:
        """Do nothing: the system takes no lock of a file away."""

    def _note(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def write(self, key: str, note: dict[str, Any]) -> None:
        """Write a note."""
        self._note(key).write_text(json.dumps(note), encoding="utf-8")

    def read(self, key: str) -> dict[str, Any] | None:
        """Return a note, None if it is gone."""
        try:
            note: dict[str, Any] = json.loads(self._note(key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return note

    def notes(self) -> list[str]:
        """Return the keys of all notes."""
        return sorted(path.name.removesuffix(".json") for path in self.folder.glob("*.json"))

    def remove(self, key: str) -> None:
        """Remove a note and the lock's file."""
        self._note(key).unlink(missing_ok=True)
        (self.folder / f"{key}.lock").unlink(missing_ok=True)

    def unnoted(self) -> list[str]:
        """Return the locks of scorings, each of a key of its own, that have no note."""
        keys = (path.name.removesuffix(".lock") for path in self.folder.glob("score-*.lock"))
        return sorted(key for key in keys if not self._note(key).exists() and self._is_free(key))

    def _is_free(self, key: str) -> bool:
        with suppress(Timeout), self.lock(key).acquire(timeout=0):
            return True
        return False


# --- snapshots -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SnapshotFiles:
    """A snapshot NAME is `NAME.sqlite`, a copy of the catalog, and `NAME.json`, its record, which makes it whole."""

    folder: Path

    def names(self) -> list[str]:
        """Return the names that have a record."""
        return sorted(path.name.removesuffix(".json") for path in self.folder.glob("*.json"))

    def parts(self) -> set[str]:
        """Return the names that have a file."""
        return {path.name.removesuffix(".sqlite") for path in self.folder.glob("*.sqlite")} | set(self.names())

    def _catalog(self, name: str) -> CatalogFile:
        kept = self.folder.parent / f"snapshot-{name}"
        return CatalogFile(self.folder / f"{name}.sqlite", kept, str(self.folder.parent))

    def record(self, name: str) -> dict[str, Any]:
        """Return a record."""
        facts: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return facts

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """Yield the snapshot's own file."""
        self.folder.mkdir(exist_ok=True)
        yield self._catalog(name).path

    def keep(self, name: str, copy: Path, record: dict[str, Any]) -> None:  # noqa: ARG002  # it is in its place already
        """Write the record, whole or not at all."""
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
        """Return an engine that refuses to write."""
        engine = _engine(self._catalog(name).path)
        event.listen(engine, "connect", _configure_reader)
        return engine

    def sizes(self) -> list[int]:
        """Return the bytes of each catalog."""
        return [size for path in self.folder.glob("*.sqlite") if (size := _size(path)) is not None]
