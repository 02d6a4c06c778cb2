"""A store with its catalog in PostgreSQL: locks are advisory locks; notes and snapshots are rows.

An advisory lock belongs to a connection and ends with it if the process is killed. Several stores can share a database
in separate schemas (`?options=-csearch_path%3DNAME`); the schema is part of every lock's key.
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
from lark_store.schema.backends import base as settings
from lark_store.schema.backends.base import VERSION_TABLE, Location
from lark_store.schema.backends.copy import copy_rows, make_file
from lark_store.schema.backends.local import CatalogFile
from lark_store.schema.catalog import SnapshotCopy, WorkNote

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL, Connection, Engine

_POLL_S = 0.05
_CONNECTION = {  # detect a lost server within a minute, even without a reset packet
    "application_name": "lark-store",
    "connect_timeout": "10",
    "keepalives_idle": "20",
    "keepalives_interval": "10",
    "keepalives_count": "4",
}


def in_postgres(place: str) -> Location:
    """Return the location of a store with its catalog at `postgresql://…`.

    Raises
    ------
    StoreError
        The URL is invalid or has a password as a parameter, or psycopg is not installed.
    """
    try:
        url = make_url(place)
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"`{place}` is not a database URL", "use `postgresql://user@host/database`") from error
    if "@" in (url.host or ""):  # otherwise part of the password would be printed as a host
        raise StoreError(f"`{place}` has more than one `@`", "set PGPASSWORD, or write `@` in the password as `%40`")
    if {"password", "passfile", "sslpassword"} & url.query.keys():
        raise StoreError("a password can't be a parameter of the URL", "set PGPASSWORD, or use `~/.pgpass`")
    if find_spec("psycopg") is None:
        raise StoreError("a catalog in PostgreSQL needs psycopg", "pip install 'lark-store[postgres]'")
    catalog = CatalogServer(url.set(drivername="postgresql+psycopg"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lark-store"
    name = "-".join(part for part in (url.host, url.database, *map(str, url.query.values())) if part)
    folder = cache / "".join(c if c.isalnum() else "-" for c in name)
    locks, snapshots = ServerLocks(catalog), SnapshotRows(catalog)
    return Location(catalog.label, catalog, locks, snapshots, folder, has_password=url.password is not None)


# --- the catalog ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CatalogServer:
    """A catalog in a PostgreSQL database, in the first schema of the search path."""

    url: URL

    @property
    def label(self) -> str:
        """The URL without its password."""
        return self.url._replace(drivername="postgresql", password=None).render_as_string()

    def engine(self) -> Engine:
        """Return an engine with a pool of connections."""
        return create_engine(self.url, connect_args=_CONNECTION, pool_pre_ping=True)

    def open(self) -> Connection:
        """Open a new connection in autocommit mode.

        Raises
        ------
        StoreError
            The database can't be reached.
        """
        engine = create_engine(self.url, connect_args=_CONNECTION, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        try:
            return engine.connect()
        except OperationalError as error:
            reason = " ".join(str(error.orig).split())
            raise StoreError(
                f"the catalog `{self.label}` can't be reached: {reason}",
                "check the URL, and that the server is running",
            ) from error

    @contextmanager
    def transaction(self, isolation: str = "READ COMMITTED") -> Iterator[Connection]:
        """Yield a new connection in a transaction: committed at the end, rolled back on an error."""
        engine = create_engine(self.url, connect_args=_CONNECTION, poolclass=NullPool, isolation_level=isolation)
        with engine.begin() as connection:
            yield connection

    def tables(self) -> set[str]:
        """Return the names of the tables in the schema.

        Raises
        ------
        StoreError
            The schema does not exist.
        """
        with self.open() as connection:
            name = connection.scalar(text("SELECT current_schema()"))
            if name is None:
                raise StoreError(f"the database of `{self.label}` has no such schema", "create it with `CREATE SCHEMA`")
            query = text("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")
            return set(connection.scalars(query))

    def schema(self) -> str:
        """Return the schema version.

        Raises
        ------
        NotAStoreError, StoreError
        """
        if not {VERSION_TABLE, "store_meta"} <= self.tables():
            raise NotAStoreError(
                f"there is no lark-store at `{self.label}`",
                f"create one with `lark-store init --store {self.label} --vectors s3://BUCKET/PATH`",
            )
        with self.open() as connection:
            version = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608
        if version is None:
            fact = f"`{self.label}` can't be read as a catalog: it has no schema version"
            raise NotAStoreError(fact, "restore it from a backup")
        return str(version)

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """Hold a transaction and an advisory lock; schema changes roll back too."""
        with self.transaction() as connection:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_KEY})"), {"name": "migrating"})
            yield connection

    def keep(self, schema: str) -> str:
        """Copy the tables to a backup schema of the same database."""
        tables = sorted(self.tables())
        with self.transaction() as connection:
            quote = connection.dialect.identifier_preparer.quote_identifier
            backup = f"{connection.scalar(text('SELECT current_schema()'))}_{schema}_backup"
            connection.exec_driver_sql(f"DROP SCHEMA IF EXISTS {quote(backup)} CASCADE")
            connection.exec_driver_sql(f"CREATE SCHEMA {quote(backup)}")
            for table in tables:
                connection.exec_driver_sql(f"CREATE TABLE {quote(backup)}.{quote(table)} AS TABLE {quote(table)}")
        return f"schema {backup}"

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Lock the run tables against writes; readers don't wait."""
        timeout = settings.BUSY_TIMEOUT_S
        with self.transaction() as connection:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{max(1, int(timeout * 1000))}ms'")
            try:
                connection.exec_driver_sql("LOCK TABLE ingest_run, score_run, probe_run, eif_run IN SHARE MODE")
            except DBAPIError as error:
                raise StoreBusyError(
                    f"the catalog has been locked by a writer for more than {timeout} s", "run the command again"
                ) from error
            yield

    def copy(self, target: Path) -> None:
        """Copy the rows to a SQLite file in one consistent read."""
        schema = self.schema()
        with self.transaction("REPEATABLE READ") as connection, make_file(target, schema) as copy:
            copy_rows(connection, copy)

    def vectors(self) -> str | None:
        """Return the location of the vectors."""
        with self.open() as connection:
            place: str | None = connection.scalar(text("SELECT vectors FROM store_meta"))
        return place

    def faults(self) -> list[tuple[int, str]]:
        """Return nothing: PostgreSQL enforces references and checks its own pages."""
        return []

    def sizes(self) -> list[int]:
        """Return the size of each table with its indices in bytes."""
        query = "SELECT pg_total_relation_size(format('%I.%I', schemaname, tablename)::regclass) FROM pg_tables"
        with self.open() as connection:
            return list(connection.scalars(text(f"{query} WHERE schemaname = current_schema()")))


# --- locks ---------------------------------------------------------------------------------------------------------

# The server detects a lost client machine within a minute instead of the system's two hours.
_KEEPALIVES = text(
    "SELECT set_config('tcp_keepalives_idle', '20', false), set_config('tcp_keepalives_interval', '10', false), "
    "set_config('tcp_keepalives_count', '4', false)"
)
_KEY = "hashtextextended(current_schema() || '/' || :name, 0)"


class ServerLock:
    """An advisory lock with its own connection; while held, it is in the set `active`."""

    def __init__(self, catalog: CatalogServer, name: str, active: set[ServerLock]) -> None:
        self._catalog, self._name, self._active = catalog, name, active
        self._connection: Connection | None = None

    @property
    def is_locked(self) -> bool:
        """Whether this object holds the lock."""
        return self._connection is not None

    def acquire(self, timeout: float) -> None:
        """Acquire the lock, or raise `Timeout` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with ExitStack() as stack:
            connection = stack.enter_context(self._catalog.open())
            connection.execute(_KEEPALIVES)
            while not connection.scalar(text(f"SELECT pg_try_advisory_lock({_KEY})"), {"name": self._name}):
                if time.monotonic() >= deadline:
                    raise Timeout(self._name)
                time.sleep(_POLL_S)
            stack.pop_all()  # keep the connection open
        self._connection = connection
        self._active.add(self)

    def release(self) -> None:
        """Release the lock explicitly; the server notices a closed connection only a moment later."""
        if self._connection is not None:
            with suppress(DBAPIError):  # the connection is lost, and the lock with it
                if not self._connection.invalidated:
                    self._connection.execute(text(f"SELECT pg_advisory_unlock({_KEY})"), {"name": self._name})
            self._connection.close()
            self._connection = None
            self._active.discard(self)

    def ensure(self) -> None:
        """Check that the lock is still held; raises StoreBusyError."""
        try:
            assert self._connection is not None
            self._connection.scalar(text("SELECT 1"))
        except DBAPIError as error:
            raise StoreBusyError(
                "the connection that held this work's lock is lost: was PostgreSQL restarted?",
                "committed work is saved; run the command again to resume",
            ) from error


@dataclass(frozen=True)
class ServerLocks:
    """Advisory locks of a catalog's database; notes are rows of `work`. `active` has this process's locks."""

    catalog: CatalogServer
    active: set[ServerLock] = field(default_factory=set)

    def lock(self, name: str) -> ServerLock:
        """Return an advisory lock, not acquired yet."""
        return ServerLock(self.catalog, name, self.active)

    def ensure(self) -> None:
        """Check that this process still holds all its locks.

        Raises
        ------
        StoreBusyError
        """
        for lock in list(self.active):
            lock.ensure()

    def write(self, key: str, note: dict[str, Any]) -> None:
        """Write a note."""
        with self.catalog.transaction() as connection:
            connection.execute(delete(WorkNote).where(WorkNote.key == key))
            connection.execute(insert(WorkNote).values(key=key, doing=note["doing"], touches=note["touches"]))

    def read(self, key: str) -> dict[str, Any] | None:
        """Return a note, or None if there is none."""
        with self.catalog.open() as connection:
            row = connection.execute(select(WorkNote.doing, WorkNote.touches).where(WorkNote.key == key)).one_or_none()
        return None if row is None else {"doing": row.doing, "touches": row.touches}

    def notes(self) -> list[str]:
        """Return the keys of all notes."""
        with self.catalog.open() as connection:
            return list(connection.scalars(select(WorkNote.key).order_by(WorkNote.key)))

    def remove(self, key: str) -> None:
        """Remove a note; advisory locks leave nothing."""
        with self.catalog.transaction() as connection:
            connection.execute(delete(WorkNote).where(WorkNote.key == key))

    def unnoted(self) -> list[str]:
        """Return nothing: advisory locks leave nothing."""
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
        """Return the names of all rows: a row is always complete."""
        return set(self.names())

    def record(self, name: str) -> dict[str, Any]:
        """Return a record."""
        record: dict[str, Any] = self._column(name, SnapshotCopy.record)
        return record

    def _column(self, name: str, column: Any) -> Any:
        with self.server.open() as connection:
            row = connection.execute(select(column).where(SnapshotCopy.name == name)).one_or_none()
        if row is None:
            raise KeyError(name)
        return row[0]

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """Yield a temporary local file."""
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
        """Do nothing: `forget` removed the row."""

    @contextmanager
    def catalog(self, name: str) -> Iterator[CatalogFile]:
        """Yield a temporary local file; changes are written back."""
        with self.making(name) as path:
            before = self._column(name, SnapshotCopy.catalog)
            path.write_bytes(before)
            yield CatalogFile(path, None, self.server.label)
            after = path.read_bytes()
        if after != before:
            with self.server.transaction() as connection:
                connection.execute(update(SnapshotCopy).where(SnapshotCopy.name == name).values(catalog=after))

    def engine(self, name: str) -> Engine:
        """Return a read-only engine whose connections load the copy into memory."""
        image = self._column(name, SnapshotCopy.catalog)

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(":memory:", check_same_thread=False)
            connection.deserialize(image)
            connection.execute("PRAGMA query_only = ON")
            return connection

        return create_engine("sqlite://", creator=connect, poolclass=QueuePool)

    def sizes(self) -> list[int]:
        """Return the size of each copy in bytes."""
        with self.server.open() as connection:
            return list(connection.scalars(text("SELECT length(catalog) FROM snapshot")))
