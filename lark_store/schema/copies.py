"""The rows of one catalog in another: how a catalog gets from PostgreSQL into a file, and back."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, NullPool, create_engine, insert, select, text

from lark_store.schema.catalog import Base, SnapshotCopy, WorkNote
from lark_store.schema.folder import APPLICATION_ID
from lark_store.schema.location import VERSION_TABLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_OWN = {SnapshotCopy.__tablename__, WorkNote.__tablename__}  # what a catalog says of its place, not of the store


@contextmanager
def make_file(path: Path, schema: str) -> Iterator[Connection]:
    """Make a catalog of this lark-store's schema in a SQLite file and yield a transaction on it.

    The tables are the models', which are those of the migrations (tests/test_migrations.py); no migration is run.
    """
    path.unlink(missing_ok=True)
    engine = create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool)
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        connection.exec_driver_sql(
            f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32) NOT NULL, "
            f"CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY (version_num))"
        )
        connection.execute(text(f"INSERT INTO {VERSION_TABLE} VALUES (:schema)"), {"schema": schema})  # noqa: S608
        connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
        yield connection


def read_file(path: Path) -> Connection:
    """Open a catalog file to read its rows."""
    return create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool).connect()


def copy_rows(source: Connection, target: Connection) -> None:
    """Copy all rows that say something of the store; both catalogs have the newest schema, the target no rows."""
    for table in Base.metadata.sorted_tables:
        if table.name in _OWN:
            continue
        rows = [dict(row) for row in source.execute(select(table)).mappings()]
        if rows:
            target.execute(insert(table), rows)
        if target.dialect.name == "postgresql" and "id" in table.columns:
            last = f"(SELECT max(id) FROM {table.name})"  # noqa: S608
            target.execute(
                text(f"SELECT setval(pg_get_serial_sequence(:name, 'id'), coalesce({last}, 1), {last} IS NOT NULL)"),
                {"name": table.name},
            )
