"""Schema versions of the catalog: build a new catalog, read its version, upgrade an older one.

Opening a store never changes its schema. A migration is one transaction on its own connection (`Catalog.migrating`):
concurrent upgrades queue, and a failed or killed one leaves the catalog unchanged.

Opening reads the names of the migrations' files, which begin with their versions. Only building a schema imports
Alembic.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lark_store.errors import NewerSchemaError, NotAStoreError, OlderSchemaError, StoreError
from lark_store.schema import missing_columns
from lark_store.schema.catalog_checksums import fill_checksums
from lark_store.schema.vectors import VectorStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from alembic.config import Config
    from sqlalchemy import Connection

    from lark_store.schema.backends.base import Catalog, Location

FOLDER = Path(__file__).parent


def _config(connection: Connection | None = None) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "lark_store:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _versions() -> list[str]:
    """Return all known schema versions, oldest first."""
    return sorted(path.name.partition("_")[0] for path in (FOLDER / "versions").glob("[0-9]*_*.py"))


def newest() -> str:
    """Return this lark-store's schema version."""
    known = _versions()
    if not known:
        raise StoreError("the package holds no migrations", "install lark-store again")
    return known[-1]


def build(connection: Connection) -> None:
    """Build a new catalog, or upgrade an older one, in a transaction of `Catalog.migrating`."""
    from alembic import command

    command.upgrade(_config(connection), "head")


def complete(vectors: VectorStore) -> dict[str, str]:
    """Add missing columns to the tables of an older store; see `lark_store.schema.missing_columns`."""
    return missing_columns.complete(vectors)


def version(location: Location) -> str:
    """Return the schema version of the store at `location` without writing.

    Raises
    ------
    NotAStoreError
        There is no lark-store catalog, or the folder of its vectors is missing.
    StoreError
        The catalog can't be read.
    """
    schema = location.catalog.schema()
    if location.root is not None and not Path(location.vectors).is_dir() and "://" not in location.vectors:
        raise NotAStoreError(
            f"the store `{location.label}` can't be read: `{location.vectors}` is missing",
            "restore the store from a backup, or choose another with `--store PATH`",
        )
    return schema


def check(location: Location, snapshot: str | None = None) -> None:
    """Check that the store, or one of its snapshots, has the current schema.

    Raises
    ------
    NotAStoreError, OlderSchemaError, NewerSchemaError
    """
    if snapshot is None:
        _check(version(location), location.label)
        return
    with location.snapshots.catalog(snapshot) as catalog:
        _check(catalog.schema(), location.label)


def _check(schema: str, label: str) -> None:
    newest_schema = newest()
    if schema == newest_schema:
        return
    if schema in _versions():
        raise OlderSchemaError(
            f"the store `{label}` has schema {schema}; this lark-store needs {newest_schema}",
            "upgrade it with `lark-store db upgrade` (a backup is made first)",
        )
    raise NewerSchemaError(
        f"the store `{label}` has schema {schema}, newer than this lark-store's schema {newest_schema}",
        "install a newer version with `pip install --upgrade lark-store`",
    )


def upgrade(location: Location) -> Path | str | None:
    """Back up the catalog, then upgrade it, the tables and the snapshots' catalogs to the newest schema.

    Returns the location of the (first) backup, or None if the schema is up to date.

    Raises
    ------
    StoreError
        The store is upgraded, but a table can't be read.
    """
    unreadable: dict[str, str] = {}
    schema, vectors = version(location), VectorStore(location.vectors)
    backups = [_upgrade(location.catalog, schema, lambda: unreadable.update(complete(vectors)))]
    backups += [upgrade_snapshot(location, name) for name in location.snapshots.names()]
    for name, reason in unreadable.items():
        raise StoreError(
            f"the store is upgraded, but its table `{name}` can't be read: {reason}",
            "`lark-store db check` tells whether it can be repaired or needs a backup",
        )
    return next((backup for backup in backups if backup), None)


def upgrade_snapshot(location: Location, name: str) -> Path | str | None:
    """Upgrade the catalog of a snapshot; returns the location of its backup, or None if it is up to date."""
    with location.snapshots.catalog(name) as catalog:
        return _upgrade(catalog, catalog.schema())


def _upgrade(catalog: Catalog, schema: str, complete_tables: Callable[[], None] | None = None) -> Path | str | None:
    """Upgrade one catalog. Tables are completed before its commit, so a killed upgrade is repeated."""
    try:
        _check(schema, catalog.label)
    except OlderSchemaError:
        with catalog.migrating() as connection:
            if catalog.schema() != schema:  # another process has upgraded it, and made the backup
                return None
            backup = catalog.keep(schema)
            build(connection)
            fill_checksums(connection)
            if complete_tables:
                complete_tables()
        return backup
    return None
