"""Copy a catalog's rows to another catalog: from PostgreSQL to a file and back."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, NullPool, create_engine, insert, select, text

from lark_store.schema.backends.base import VERSION_TABLE
from lark_store.schema.backends.local import APPLICATION_ID
from lark_store.schema.catalog import METADATA, SnapshotCopy, WorkNote

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LOCAL = {SnapshotCopy.__tablename__, WorkNote.__tablename__}  # tables about the catalog's location, not the store


@contextmanager
def make_file(path: Path, schema: str) -> Iterator[Connection]:
    """Create a SQLite catalog with the newest schema and yield a transaction on it.

    The tables come from the models, which equal the migrations, as `test_migrations.py` checks; no migration runs.
    """
    path.unlink(missing_ok=True)
    engine = create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool)
    with engine.begin() as connection:
        METADATA.create_all(connection)
        connection.exec_driver_sql(
            f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32) NOT NULL, "
            f"CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY (version_num))"
        )
        connection.execute(text(f"INSERT INTO {VERSION_TABLE} VALUES (:schema)"), {"schema": schema})  # noqa: S608
        connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
        yield connection


def read_file(path: Path) -> Connection:
    """Connect to a catalog file."""
    return create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool).connect()


def copy_rows(source: Connection, target: Connection) -> None:
    """Copy all rows about the store. Both catalogs need the newest schema; the target must be empty."""
    for table in METADATA.sorted_tables:
        if table.name in _LOCAL:
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
