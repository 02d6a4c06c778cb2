"""The catalog's schema over time: build a fresh one, tell its version, upgrade an older one.

Opening a store never changes its schema. SQLite needs care here: migrations get an engine of their own, with
`BEGIN IMMEDIATE` before the first statement (so that several upgraders queue), foreign keys off (a rebuilt table
must not cascade into its children) and a `foreign_key_check` before the commit.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, NullPool, create_engine, event, text

from lark_store.errors import NewerSchemaError, NotAStoreError, OlderSchemaError, StoreError
from lark_store.schema.database import APPLICATION_ID, BUSY_TIMEOUT_S, Location, is_file, to_read
from lark_store.schema.faults import fault_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VERSION_TABLE = "lark_store_version"


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", "lark_store:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def newest() -> str:
    """Return the schema version that this lark-store writes."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    if head is None:
        raise StoreError("the package holds no migrations", "install lark-store again")
    return head


@contextmanager
def _migrating(path: Path) -> Iterator[Connection]:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=NullPool,
        connect_args={"isolation_level": None, "timeout": BUSY_TIMEOUT_S},
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
            raise StoreError(f"the migration would break {len(broken)} references", "nothing was changed; report this")
    engine.dispose()


def create(location: Location) -> None:
    """Build the catalog of a fresh store by the migrations alone."""
    with _migrating(location.catalog) as connection:
        command.upgrade(_config(connection), "head")
        connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")


def version(location: Location) -> str:
    """Return the schema version of the store at `location`, reading only.

    Raises
    ------
    NotAStoreError
        There is no catalog, or the file is not one of ours.
    StoreError
        It may not be read.
    """
    missing = NotAStoreError(
        f"there is no lark-store at `{location.root}`",
        "make one with `lark-store init`, or name yours with `--store PATH` or `LARK_STORE`",
    )
    try:
        if not stat.S_ISREG(location.catalog.stat().st_mode):
            raise missing
    except PermissionError as error:
        raise _denied(location) from error
    except OSError as error:
        raise missing from error
    try:
        with closing(sqlite3.connect(to_read(location.catalog), uri=True)) as db:
            if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                raise missing
            size = db.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").fetchone()[0]
            found = db.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()  # noqa: S608
    except sqlite3.Error as error:
        if fault_of(error) and not _is_writable(location):
            raise _denied(location) from error
        raise _unreadable(location, str(error)) from error
    # With something in the write-ahead log beside it, the file may rightly be shorter than the database.
    log = location.catalog.with_name(f"{location.catalog.name}-wal")
    cut = location.catalog.stat().st_size < size and not (is_file(log) and log.stat().st_size)
    if cut or found is None or not location.vectors.is_dir():
        what = "it is cut short" if cut else "it has no schema version" if found is None else "`vectors` is missing"
        raise _unreadable(location, what)
    return str(found[0])


def _is_writable(location: Location) -> bool:
    return all(os.access(path, os.R_OK | os.W_OK) for path in (location.catalog, location.catalog.parent))


def _denied(location: Location) -> StoreError:
    return StoreError(
        f"the store `{location.root}` can't be opened: permission denied",
        "also who only reads must be able to write in its folder, where SQLite keeps a log: copy it, or ask its owner",
    )


def _unreadable(location: Location, why: str) -> NotAStoreError:
    return NotAStoreError(
        f"`{location.catalog}` can't be read as a catalog: {why}",
        "restore the store from a backup, or name another with `--store PATH`",
    )


def check(location: Location) -> None:
    """Make sure that the store can be opened as it is.

    Raises
    ------
    NotAStoreError, OlderSchemaError, NewerSchemaError
    """
    found, ours = version(location), newest()
    if found == ours:
        return
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if found in known:
        raise OlderSchemaError(
            f"the store `{location.root}` has schema {found}; this lark-store needs {ours}",
            "upgrade it with `lark-store db upgrade` (a backup is made first)",
        )
    raise NewerSchemaError(
        f"the store `{location.root}` has schema {found}, which this lark-store (schema {ours}) does not know",
        "install a newer version with `pip install --upgrade lark-store`",
    )


def upgrade(location: Location) -> Path | None:
    """Back the catalog up, then migrate it to the newest schema, and those of the snapshots in the same way.

    Returns the (first) backup, or None if there was nothing to do.
    """
    places = [location, *(replace(location, snapshot=name) for name in location.snapshot_names())]
    backups = [_upgrade(place) for place in places]
    return next((backup for backup in backups if backup), None)


def _upgrade(location: Location) -> Path | None:
    found = version(location)
    try:
        check(location)
    except OlderSchemaError:
        what = "catalog" if location.snapshot is None else f"snapshot-{location.snapshot}"
        backup = location.root / f"{what}-{found}.backup.sqlite"
        with _migrating(location.catalog) as connection:
            now = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608
            if now != found:  # another process upgraded it meanwhile, and has its backup
                return None
            with closing(sqlite3.connect(location.catalog)) as old, closing(sqlite3.connect(backup)) as copy:
                old.backup(copy)
            command.upgrade(_config(connection), "head")
        return backup
    return None
