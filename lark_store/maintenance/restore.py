"""`db restore`: create a store from a backup, in any location, after checking each file's hash."""

from __future__ import annotations

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import insert

from lark_store.core.hashing import is_whole
from lark_store.core.paths import is_file, is_taken
from lark_store.errors import StoreError, StoreExistsError
from lark_store.maintenance.copy_files import (
    DAMAGED,
    RECORD,
    VECTORS,
    backup_info,
    copy_all,
    count_rows,
    draft_folder,
    publish,
    set_vectors,
)
from lark_store.maintenance.damaged import Hashes, check_folder, compare_files, refuse
from lark_store.results import BackupInfo, Progress
from lark_store.schema.backends.open import location_at
from lark_store.schema.catalog import SnapshotCopy
from lark_store.schema.vectors import VectorStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

    from lark_store.results import OnProgress
    from lark_store.schema.backends.base import Location

_HINT = "`--damaged` restores it as it is"


class Schema(Protocol):
    """The functions of `lark_store.migrations` that restore a catalog."""

    def build(self, connection: Connection) -> None:
        """Create the tables of a new catalog."""

    def newest(self) -> str:
        """Return the newest schema version."""

    def upgrade(self, location: Location) -> object:
        """Upgrade an older store."""

    def complete(self, vectors: VectorStore) -> object:
        """Add missing columns to the tables of an older store."""


def restore(
    source: Path, target: Path, schema: str, on_progress: OnProgress | None, *, damaged: bool = False
) -> BackupInfo:
    """Restore a backup to a folder; see `Store.db_restore`. `schema` is the newest schema version."""
    facts = read_record(source)
    if is_taken(target):
        raise StoreExistsError(f"`{target}` already exists", "move it away, or choose another path")
    files = _checked_files(source, facts, on_progress, damaged=damaged)
    with draft_folder(target) as draft:
        copy_all(source, draft, files, on_progress)
        if not damaged:
            count_rows(VectorStore(location_at(draft).vectors), facts["tables"])
            if DAMAGED not in facts and facts["schema"] == schema:
                refuse("the original store", check_folder(draft, on_progress), _HINT)
        publish(draft, target)
    return backup_info(target, facts)


def restore_apart(
    source: Path,
    target: Location,
    vectors: str,
    schema: Schema,
    on_progress: OnProgress | None,
    *,
    damaged: bool = False,
) -> BackupInfo:
    """Restore a backup to a store with separate vectors; see `Store.db_restore`.

    The vectors are uploaded first; then one rename or transaction creates the catalog, and with it the store.
    """
    facts = read_record(source)
    files = _checked_files(source, facts, on_progress, damaged=damaged)
    if DAMAGED not in facts and not damaged:
        refuse("the original store", _errors_of_copy(source, facts, schema, on_progress), _HINT)
    tables = VectorStore(vectors)
    with uploading(tables):
        names = [name for name in files if name.startswith(VECTORS)]
        for number, name in enumerate(names):
            if on_progress:
                on_progress(Progress("copying", number, len(names)))
            tables.files.upload_file(str(source / name), name.removeprefix(VECTORS))
        if not damaged:
            count_rows(tables, facts["tables"])
        schema.complete(tables)
        catalog_files = {name: facts for name, facts in files.items() if not name.startswith(VECTORS)}
        with draft_folder(target.root or Path(tempfile.gettempdir()) / "lark-restore") as draft:
            copy_all(source, draft, catalog_files, None)
            (draft / "vectors").mkdir()
            schema.upgrade(location_at(draft))
            (draft / "vectors").rmdir()
            set_vectors(draft, vectors)
            if target.root is not None:
                publish(draft, target.root)
            else:
                _fill(target, location_at(draft), schema)
    return backup_info(target.label, facts)


def _errors_of_copy(source: Path, facts: dict[str, Any], schema: Schema, on_progress: OnProgress | None) -> list[str]:
    """Return the errors of a backup made without a check; backups of older schemas can't be checked."""
    if facts["schema"] != schema.newest():
        return []
    with draft_folder(Path(tempfile.gettempdir()) / "lark-check") as draft:
        copy_all(source, draft, facts["files"], None)
        return check_folder(draft, on_progress)


def _fill(target: Location, source: Location, schema: Schema) -> None:
    """Copy a catalog with its snapshots from a folder to PostgreSQL."""
    from lark_store.schema.backends.copy import copy_rows, read_file

    with target.catalog.migrating() as connection, tempfile.TemporaryDirectory(prefix="lark-") as folder:
        schema.build(connection)
        file = Path(folder) / "catalog.sqlite"
        source.catalog.copy(file)
        with read_file(file) as rows:
            copy_rows(rows, connection)
        for name in source.snapshots.names():
            with source.snapshots.catalog(name) as catalog:
                catalog.copy(file)
            row = {"name": name, "record": source.snapshots.record(name), "catalog": file.read_bytes()}
            connection.execute(insert(SnapshotCopy).values(**row))


@contextmanager
def uploading(vectors: VectorStore) -> Iterator[None]:
    """Require an empty location for vectors, and clear it again if the work fails.

    Raises
    ------
    StoreExistsError
    """
    if vectors.files.list():
        raise StoreExistsError(f"`{vectors.uri}` is not empty", "choose another location with `--vectors`")
    try:
        yield
    except BaseException:
        for path in vectors.files.list():
            vectors.files.delete_file(path)
        raise


def read_record(source: Path) -> dict[str, Any]:
    """Return the record of a backup.

    Raises
    ------
    StoreError
        There is no backup, or its record is invalid.
    """
    if not is_file(source / RECORD):
        raise StoreError(
            f"there is no backup at `{source}`: it has no `{RECORD}`", "create one with `lark-store db backup`"
        )
    try:
        facts: dict[str, Any] = json.loads((source / RECORD).read_text(encoding="utf-8"))
        names = list(facts["files"])
        is_valid = {"store_uuid", "schema", "created_at", "rows", "tables"} <= facts.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"`{source / RECORD}` can't be read: {error}", "take another backup") from error
    root = source.resolve()
    if not is_valid or not all((root / name).resolve().is_relative_to(root) for name in names):
        raise StoreError(f"`{source / RECORD}` is not a backup record", "take another backup")
    return facts


def _checked_files(source: Path, facts: dict[str, Any], on_progress: OnProgress | None, *, damaged: bool) -> Hashes:
    """Compare each file with its hash before any write; returns the files to copy.

    Raises
    ------
    StoreError
        The backup or its original store is damaged, and `damaged` is not set.
    """
    if on_progress:
        on_progress(Progress("checking the backup", 0, len(facts["files"])))
    present, problems = compare_files(source, facts["files"])
    if not is_whole(facts):
        problems.insert(0, f"`{source / RECORD}` changed after it was written")
    if not damaged:
        refuse("the backup", problems, f"take another backup; {_HINT}")
        refuse("the original store", facts.get(DAMAGED, []), _HINT)
    return present
