"""A store whose catalog is a PostgreSQL database: locks are advisory locks, notes and snapshots rows.

An advisory lock belongs to a connection, and goes with it when its process is killed. Where several stores share a
database, each has a schema of its own (`?options=-csearch_path%3DNAME`), which is part of every lock's key.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout
from sqlalchemy import NullPool, QueuePool, create_engine, delete, insert, make_url, select, text, update
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from lark_store.errors import NotAStoreError, StoreBusyError, StoreError
from lark_store.schema import location as settings
from lark_store.schema.catalog import SnapshotCopy, WorkNote
from lark_store.schema.copies import copy_rows, make_file
from lark_store.schema.folder import CatalogFile
from lark_store.schema.location import VERSION_TABLE, Location

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL, Connection, Engine

_POLL_S = 0.05
_CONNECTION = {  # a server that is gone is found out by us in a minute, also where no packet says so
    "application_name": "lark-store",
    "connect_timeout": "10",
    "keepalives_idle": "20",
    "keepalives_interval": "10",
    "keepalives_count": "4",
}


def in_postgres(place: str) -> Location:
    """Return the location of a store whose catalog is at a URL `postgresql://…`.

    Raises
    ------
    StoreError
        The URL can't be read, holds a password as a parameter, or psycopg is not installed.
    """
    try:
        url = make_url(place)
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"`{place}` is no URL of a database", "`postgresql://user@host/database`") from error
    if "@" in (url.host or ""):  # else a part of the password would be looked up, and printed, as a host
        raise StoreError(f"`{place}` has more than one `@`", "in a password `@` is written `%40`; best set PGPASSWORD")
    if {"password", "passfile", "sslpassword"} & url.query.keys():
        raise StoreError("a password does not belong into a URL's parameters", "set PGPASSWORD, or use `~/.pgpass`")
    if find_spec("psycopg") is None:
        raise StoreError("a catalog in PostgreSQL needs psycopg", "pip install 'lark-store[postgres]'")
    catalog = CatalogServer(url.set(drivername="postgresql+psycopg"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lark-store"
    name = "-".join(part for part in (url.host, url.database, *map(str, url.query.values())) if part)
    folder = cache / "".join(c if c.isalnum() else "-" for c in name)
    return Location(catalog.label, catalog, ServerLocks(catalog), SnapshotRows(catalog), folder)


# --- the catalog ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CatalogServer:
    """A catalog in a PostgreSQL database: the tables of the first schema on the search path."""

    url: URL

    @property
    def label(self) -> str:
        """The URL without its password."""
        return self.url._replace(drivername="postgresql", password=None).render_as_string()

    def engine(self) -> Engine:
        """Return an engine with a pool of connections."""
        return create_engine(self.url, connect_args=_CONNECTION, pool_pre_ping=True)

    def open(self) -> Connection:
        """Open a connection of its own, each statement committed.

        Raises
        ------
        StoreError
            The database can't be reached.
        """
        engine = create_engine(self.url, connect_args=_CONNECTION, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        try:
            return engine.connect()
        except OperationalError as error:
            said = " ".join(str(error.orig).split())
            raise StoreError(
                f"the catalog `{self.label}` can't be reached: {said}", "is the server running, and the name right?"
            ) from error

    @contextmanager
    def transaction(self, isolation: str = "READ COMMITTED") -> Iterator[Connection]:
        """Yield a connection of its own in a transaction: committed at the end, taken back on an error."""
        engine = create_engine(self.url, connect_args=_CONNECTION, poolclass=NullPool, isolation_level=isolation)
        with engine.begin() as connection:
            yield connection

    def tables(self) -> set[str]:
        """Return the names of the tables in its schema.

        Raises
        ------
        StoreError
            There is no such schema.
        """
        with self.open() as connection:
            name = connection.scalar(text("SELECT current_schema()"))
            if name is None:
                raise StoreError(f"the database of `{self.label}` has no such schema", "make it with `CREATE SCHEMA`")
            found = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"))
            return set(found)

    def schema(self) -> str:
        """Return the schema version.

        Raises
        ------
        NotAStoreError, StoreError
        """
        if not {VERSION_TABLE, "store_meta"} <= self.tables():
            raise NotAStoreError(
                f"there is no lark-store at `{self.label}`",
                f"make one with `lark-store init --store {self.label} --vectors s3://BUCKET/PATH`",
            )
        with self.open() as connection:
            found = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608
        if found is None:
            raise NotAStoreError(f"`{self.label}` can't be read as a catalog: it has no schema version", "restore it")
        return str(found)

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """Hold a transaction and an advisory lock: PostgreSQL takes changes of tables back like any other."""
        with self.transaction() as connection:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_KEY})"), {"name": "migrating"})
            yield connection

    def keep(self, schema: str) -> str:
        """Copy the tables into a schema of the same database."""
        tables = sorted(self.tables())
        with self.transaction() as connection:
            quote = connection.dialect.identifier_preparer.quote_identifier
            kept = f"{connection.scalar(text('SELECT current_schema()'))}_{schema}_backup"
            connection.exec_driver_sql(f"DROP SCHEMA IF EXISTS {quote(kept)} CASCADE")
            connection.exec_driver_sql(f"CREATE SCHEMA {quote(kept)}")
            for table in tables:
                connection.exec_driver_sql(f"CREATE TABLE {quote(kept)}.{quote(table)} AS TABLE {quote(table)}")
        return f"schema {kept}"

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Lock the tables of runs against writing; who reads does not wait."""
        timeout = settings.BUSY_TIMEOUT_S
        with self.transaction() as connection:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{max(1, int(timeout * 1000))}ms'")
            try:
                connection.exec_driver_sql("LOCK TABLE ingest_run, score_run IN SHARE MODE")
            except DBAPIError as error:
                raise StoreBusyError(
                    f"the catalog is being written to for more than {timeout} s", "run the command again"
                ) from error
            yield

    def copy(self, target: Path) -> None:
        """Copy the rows to a SQLite file, as they are at one moment."""
        schema = self.schema()
        with self.transaction("REPEATABLE READ") as connection, make_file(target, schema) as copy:
            copy_rows(connection, copy)

    def vectors(self) -> str | None:
        """Return where the vectors are."""
        with self.open() as connection:
            found: str | None = connection.scalar(text("SELECT vectors FROM store_meta"))
        return found

    def faults(self) -> list[tuple[int, str]]:
        """Return nothing: PostgreSQL holds references itself, and checks its own pages."""
        return []

    def sizes(self) -> list[int]:
        """Return the bytes of each table with its indices."""
        wanted = "SELECT pg_total_relation_size(format('%I.%I', schemaname, tablename)::regclass) FROM pg_tables"
        with self.open() as connection:
            return list(connection.scalars(text(f"{wanted} WHERE schemaname = current_schema()")))


# --- locks ---------------------------------------------------------------------------------------------------------

# A process whose machine is gone is found out by the server in a minute, not in the system's two hours.
_KEEPALIVES = text(
    "SELECT set_config('tcp_keepalives_idle', '20', false), set_config('tcp_keepalives_interval', '10', false), "
    "set_config('tcp_keepalives_count', '4', false)"
)
_KEY = "hashtextextended(current_schema() || '/' || :name, 0)"


class ServerLock:
    """An advisory lock, held by a connection of its own."""

    def __init__(self, catalog: CatalogServer, name: str, held: set[ServerLock]) -> None:
        self._catalog, self._name, self._held = catalog, name, held
        self._connection: Connection | None = None

    @property
    def is_locked(self) -> bool:
        """Whether this object holds it."""
        return self._connection is not None

    def acquire(self, timeout: float) -> None:
        """Take it, or raise `Timeout` after so many seconds."""
        deadline = time.monotonic() + timeout
        with ExitStack() as stack:
            connection = stack.enter_context(self._catalog.open())
            connection.execute(_KEEPALIVES)
            while not connection.scalar(text(f"SELECT pg_try_advisory_lock({_KEY})"), {"name": self._name}):
                if time.monotonic() >= deadline:
                    raise Timeout(self._name)
                time.sleep(_POLL_S)
            stack.pop_all()  # it stays open
        self._connection = connection
        self._held.add(self)

    def release(self) -> None:
        """Let it go. It would end with its connection, but only when the server finds that closed, a moment later."""
        if self._connection is not None:
            with suppress(DBAPIError):  # it is gone already, and the lock with it
                if not self._connection.invalidated:
                    self._connection.execute(text(f"SELECT pg_advisory_unlock({_KEY})"), {"name": self._name})
            self._connection.close()
            self._connection = None
            self._held.discard(self)

    def ensure(self) -> None:
        """Make sure that it is still held; raises StoreBusyError."""
        try:
            assert self._connection is not None
            self._connection.scalar(text("SELECT 1"))
        except DBAPIError as error:
            raise StoreBusyError(
                "the connection that held this work's lock is gone: was PostgreSQL restarted?",
                "what was committed is kept; run the command again to go on",
            ) from error


@dataclass(frozen=True)
class ServerLocks:
    """Advisory locks of a catalog's database; the notes are rows of `work`."""

    catalog: CatalogServer
    held: set[ServerLock] = field(default_factory=set)

    def lock(self, name: str) -> ServerLock:
        """Return an advisory lock, not taken yet."""
        return ServerLock(self.catalog, name, self.held)

    def ensure(self) -> None:
        """Make sure that each lock that this process holds is still its own.

        Raises
        ------
        StoreBusyError
        """
        for lock in list(self.held):
            lock.ensure()

    def write(self, key: str, note: dict[str, Any]) -> None:
        """Write a note."""
        with self.catalog.transaction() as connection:
            connection.execute(delete(WorkNote).where(WorkNote.key == key))
            connection.execute(insert(WorkNote).values(key=key, doing=note["doing"], touches=note["touches"]))

    def read(self, key: str) -> dict[str, Any] | None:
        """Return a note, None if it is gone."""
        with self.catalog.open() as connection:
            row = connection.execute(select(WorkNote.doing, WorkNote.touches).where(WorkNote.key == key)).one_or_none()
        return None if row is None else {"doing": row.doing, "touches": row.touches}

    def notes(self) -> list[str]:
        """Return the keys of all notes."""
        with self.catalog.open() as connection:
            return list(connection.scalars(select(WorkNote.key).order_by(WorkNote.key)))

    def remove(self, key: str) -> None:
        """Remove a note; a lock leaves nothing."""
        with self.catalog.transaction() as connection:
            connection.execute(delete(WorkNote).where(WorkNote.key == key))

    def unnoted(self) -> list[str]:
        """Return nothing: an advisory lock leaves nothing."""
        return []


# --- snapshots -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SnapshotRows:
    """A snapshot is a row of `snapshot`: its record, and a copy of the catalog as a SQLite file."""

    server: CatalogServer

    def names(self) -> list[str]:
        """Return the names of all rows."""
        with self.server.open() as connection:
            return sorted(connection.scalars(text("SELECT name FROM snapshot")))

    def parts(self) -> set[str]:
        """Return the same: a row is whole."""
        return set(self.names())

    def record(self, name: str) -> dict[str, Any]:
        """Return a record."""
        found: dict[str, Any] = self._column(name, SnapshotCopy.record)
        return found

    def _column(self, name: str, column: Any) -> Any:
        with self.server.open() as connection:
            row = connection.execute(select(column).where(SnapshotCopy.name == name)).one_or_none()
        if row is None:
            raise KeyError(name)
        return row[0]

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """Yield a file on this machine, which goes again."""
        with tempfile.TemporaryDirectory(prefix="lark-") as folder:
            yield Path(folder) / f"{name}.sqlite"

    def keep(self, name: str, copy: Path, record: dict[str, Any]) -> None:
        """Write the row."""
        with self.server.transaction() as connection:
            connection.execute(insert(SnapshotCopy).values(name=name, record=record, catalog=copy.read_bytes()))

    def forget(self, name: str) -> None:
        """Remove the row."""
        with self.server.transaction() as connection:
            connection.execute(delete(SnapshotCopy).where(SnapshotCopy.name == name))

    def clear(self, name: str) -> None:
        """Do nothing: the row was all."""

    @contextmanager
    def catalog(self, name: str) -> Iterator[CatalogFile]:
        """Yield a file on this machine; what was changed in it is written back."""
        with self.making(name) as path:
            before = self._column(name, SnapshotCopy.catalog)
            path.write_bytes(before)
            yield CatalogFile(path, None, self.server.label)
            after = path.read_bytes()
        if after != before:
            with self.server.transaction() as connection:
                connection.execute(update(SnapshotCopy).where(SnapshotCopy.name == name).values(catalog=after))

    def engine(self, name: str) -> Engine:
        """Return an engine whose connections each read the copy from memory."""
        image = self._column(name, SnapshotCopy.catalog)

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(":memory:", check_same_thread=False)
            connection.deserialize(image)
            connection.execute("PRAGMA query_only = ON")
            return connection

        return create_engine("sqlite://", creator=connect, poolclass=QueuePool)

    def sizes(self) -> list[int]:
        """Return the bytes of each copy."""
        with self.server.open() as connection:
            return list(connection.scalars(text("SELECT length(catalog) FROM snapshot")))
