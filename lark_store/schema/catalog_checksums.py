"""Checksums of the catalog's stored rows: fill them in, and find changed rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Table, text

from lark_store.schema.catalog import METADATA
from lark_store.schema.catalog_base import row_checksum
from lark_store.schema.checksums import CHECKSUM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection


def _tables() -> Iterator[Table]:
    return (table for table in METADATA.sorted_tables if CHECKSUM in table.columns)


def _rows(connection: Connection, table: Table) -> list[dict[str, Any]]:
    """Return all rows undecoded, so that damaged rows are readable too."""
    rows = connection.execute(text(f"SELECT * FROM {table.name}"))  # noqa: S608
    return [dict(row) for row in rows.mappings()]


def _key(table: Table, row: dict[str, Any]) -> dict[str, Any]:
    return {column.name: row[column.name] for column in table.primary_key}


def fill_checksums(connection: Connection, *, missing_only: bool = False) -> None:
    """Set the checksum of every row, or of rows without one, to match the current values."""
    for table in _tables():
        for row in _rows(connection, table):
            if missing_only and row[CHECKSUM] is not None:
                continue
            key = [table.c[name] == value for name, value in _key(table, row).items()]
            connection.execute(table.update().where(*key).values({CHECKSUM: row_checksum(table, row)}))


def changed_rows(connection: Connection) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield (table, primary key, is_missing) of each row whose checksum is missing or does not match."""
    for table in _tables():
        for row in _rows(connection, table):
            if row[CHECKSUM] != row_checksum(table, row):
                yield table.name, _key(table, row), row[CHECKSUM] is None
