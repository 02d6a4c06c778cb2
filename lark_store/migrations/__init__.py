"""The catalog's schema over time: build a fresh one, tell its version, upgrade an older one.

Opening a store never changes its schema. A migration is one transaction on a connection of its own
(`Catalog.migrating`): several upgraders queue, and one that fails or is killed leaves the catalog as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from lark_store.errors import NewerSchemaError, NotAStoreError, OlderSchemaError, StoreError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from lark_store.schema.location import Catalog, Location


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


def build(connection: Connection) -> None:
    """Build the catalog of a fresh store, or bring an older one up to date, in a transaction of `Catalog.migrating`."""
    command.upgrade(_config(connection), "head")


def version(location: Location) -> str:
    """Return the schema version of the store at `location`, reading only.

    Raises
    ------
    NotAStoreError
        There is no catalog, or what is there is not one of ours; or the folder of its vectors is gone.
    StoreError
        It may not or can't be read.
    """
    found = location.catalog.schema()
    if location.root is not None and not Path(location.vectors).is_dir() and "://" not in location.vectors:
        raise NotAStoreError(
            f"the store `{location.label}` can't be read: `{location.vectors}` is missing",
            "restore the store from a backup, or name another with `--store PATH`",
        )
    return found


def check(location: Location, snapshot: str | None = None) -> None:
    """Make sure that the store, or one of its snapshots, can be opened as it is.

    Raises
    ------
    NotAStoreError, OlderSchemaError, NewerSchemaError
    """
    if snapshot is None:
        _check(version(location), location.label)
        return
    with location.snapshots.catalog(snapshot) as catalog:
        _check(catalog.schema(), location.label)


def _check(found: str, label: str) -> None:
    ours = newest()
    if found == ours:
        return
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if found in known:
        raise OlderSchemaError(
            f"the store `{label}` has schema {found}; this lark-store needs {ours}",
            "upgrade it with `lark-store db upgrade` (a backup is made first)",
        )
    raise NewerSchemaError(
        f"the store `{label}` has schema {found}, which this lark-store (schema {ours}) does not know",
        "install a newer version with `pip install --upgrade lark-store`",
    )


def upgrade(location: Location) -> Path | str | None:
    """Back the catalog up, then migrate it to the newest schema, and those of the snapshots in the same way.

    Returns where the (first) backup is, or None if there was nothing to do.
    """
    backups = [_upgrade(location.catalog, version(location))]
    for name in location.snapshots.names():
        with location.snapshots.catalog(name) as catalog:
            backups.append(_upgrade(catalog, catalog.schema()))
    return next((backup for backup in backups if backup), None)


def _upgrade(catalog: Catalog, found: str) -> Path | str | None:
    try:
        _check(found, catalog.label)
    except OlderSchemaError:
        with catalog.migrating() as connection:
            if catalog.schema() != found:  # another process was first: the backup is its, of the old catalog
                return None
            backup = catalog.keep(found)
            build(connection)
        return backup
    return None
