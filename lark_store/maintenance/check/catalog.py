"""Checks of the catalogs of the store and its snapshots: pages, references and values."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError

from lark_store import migrations
from lark_store.errors import OlderSchemaError, StoreError
from lark_store.maintenance.check.findings import Finding, Repair
from lark_store.schema.catalog_checksums import changed_rows, fill_checksums
from lark_store.schema.catalog_values import wrong_values
from lark_store.schema.faults import first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

    from lark_store.schema.backends.base import Location
    from lark_store.schema.database import Database

_BACKUP = "restore it from a backup"


def check_catalog(location: Location) -> Iterator[Finding]:
    """Yield the problems of the catalogs themselves."""
    faults = location.catalog.faults()
    for n, detail in faults:
        yield Finding("error", "catalog", "catalog", n, detail)
    if not faults:
        yield from _check_values(location.catalog.engine(), "catalog", "catalog")
    for name in location.snapshots.names():
        yield from _check_snapshot(location, name)


def _check_snapshot(location: Location, name: str) -> Iterator[Finding]:
    """Yield the problems of a snapshot's catalog; values of older schemas are not checked."""
    location_name = f"snapshot {name}"
    with location.snapshots.catalog(name) as catalog:
        faults = catalog.faults()
    for n, detail in faults:
        yield Finding("error", "snapshot", location_name, n, f"its catalog: {detail}")
    if faults:
        return
    try:
        migrations.check(location, name)
    except OlderSchemaError:
        repair = Repair("upgrade it", lambda db: _upgrade(db, name))
        yield Finding("note", "older schema", location_name, 1, "`db upgrade` stopped before upgrading it", repair)
    except StoreError as error:
        yield Finding("error", "snapshot", location_name, 1, f"its catalog: {error.fact}; {_BACKUP}")
    else:
        yield from _check_values(location.snapshots.engine(name), "snapshot", location_name)


def _upgrade(db: Database, snapshot: str) -> None:
    migrations.upgrade_snapshot(db.location, snapshot)


def _check_values(engine: Engine, kind: str, location_name: str) -> Iterator[Finding]:
    """Yield the invalid values."""
    try:
        with engine.connect() as connection:
            for wrong in wrong_values(connection):
                if wrong.is_of_clock:
                    yield Finding("note", "clock", location_name, 1, f"{wrong}: was the clock set back?")
                else:
                    yield Finding("error", kind, location_name, 1, f"{wrong}; {_BACKUP}")
            yield from _check_checksums(connection, kind, location_name)
    except (DBAPIError, sqlite3.Error, StoreError) as error:
        yield Finding("error", kind, location_name, 1, f"{first_line(error)}; {_BACKUP}")
    finally:
        engine.dispose()


def _check_checksums(connection: Connection, kind: str, location_name: str) -> Iterator[Finding]:
    """Yield rows that changed after they were written, and rows without a checksum."""
    n_missing = 0
    for table, key, is_missing in changed_rows(connection):
        if is_missing:
            n_missing += 1
        else:
            row = "/".join(str(value) for value in key.values())
            detail = f"row {row} of {table} changed after it was written; {_BACKUP}"
            yield Finding("error", kind, location_name, 1, detail)
    if n_missing:
        repair = Repair("set their checksums to match the current values", _fill) if kind == "catalog" else None
        yield Finding("note", "checksum", location_name, n_missing, "rows without a checksum", repair)


def _fill(db: Database) -> None:
    with db.engine.begin() as connection:
        fill_checksums(connection, missing_only=True)
