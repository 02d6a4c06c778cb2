"""`db backup`: copy the store's current state to a folder, with a hash of each file.

A backup is a store in a folder, wherever the original is: the catalog as a SQLite file, plus the files of the current
and snapshot versions of each Lance table.
The catalog is copied and the versions are read under the catalog's lock, as for a snapshot, so an ingest can continue.
Files of a version never change, and `maintenance` prevents their cleanup during the copy.

The copy is written to a draft folder next to the target, flushed, opened, counted and renamed; `backup.json`, written
last, has each file's SHA-256. A draft or a folder without this record is not a backup.
"""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing, suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lark_store.core.hashing import sealed
from lark_store.core.paths import check_place, is_taken
from lark_store.errors import InputError, StoreError, StoreExistsError
from lark_store.maintenance.copy_files import (
    CATALOG,
    RECORD,
    VECTORS,
    backup_info,
    count_rows,
    draft_folder,
    flush,
    flush_folder,
    publish,
    set_vectors,
    size_and_hash,
)
from lark_store.maintenance.damaged import (
    Hashes,
    check_errors,
    copy_catalog,
    copy_snapshots,
    limited,
    refuse,
)
from lark_store.maintenance.snapshots import TAG
from lark_store.results import BackupInfo, Progress
from lark_store.schema.backends.open import location_at
from lark_store.schema.catalog_base import now
from lark_store.schema.factor_files import factor_files
from lark_store.schema.faults import CHECK_HINT, FAULTS, fault_of, first_line
from lark_store.schema.locks import maintenance
from lark_store.schema.vectors import VectorStore

if TYPE_CHECKING:
    from pathlib import Path

    from lark_store.results import OnProgress
    from lark_store.schema.backends.base import Location
    from lark_store.schema.database import Database


def backup(
    db: Database, target: Path, schema: str, on_progress: OnProgress | None, *, damaged: bool = False
) -> BackupInfo:
    """Copy the store's current state to `target`; see `Store.db_backup`."""
    root = db.location.root
    check_place(target, "a backup")
    if is_taken(target):
        raise StoreExistsError(f"`{target}` already exists", "choose a new path")
    if root is not None and target.resolve().is_relative_to(root.resolve()):
        raise InputError(f"`{target}` is inside the store", "choose a path outside, best on another disk")
    errors = check_errors(db, on_progress)
    if not damaged:
        refuse("the store", errors, f"{CHECK_HINT}; `--damaged` copies the store as it is")
    with maintenance(db.location), draft_folder(target) as draft:
        tables, files = _copy_damaged(db, draft) if errors else _copy_frozen(db, draft)
        hashes = _copy_vectors(db, draft, files, on_progress)
        place = location_at(draft)
        if not errors:
            _tag_again(place)
        n_rows = count_rows(VectorStore(place.vectors), tables)
        for path in sorted(draft.rglob("*")):
            if path.is_file() and str(path.relative_to(draft)) not in hashes:
                hashes[str(path.relative_to(draft))] = size_and_hash(path)
                flush_folder(path.parent)
        facts = {
            "store_uuid": _uuid(draft),
            "schema": schema,
            "created_at": now().isoformat(),
            "lark_store": version("lark-store"),
            "rows": n_rows,
            "tables": tables,
            "files": hashes,
            "damaged": limited(errors),
        }
        flush(draft / RECORD, json.dumps(sealed(facts), indent=1))
        publish(draft, target)
    return backup_info(target, facts)


def _copy_vectors(db: Database, draft: Path, files: dict[str, set[str]], on_progress: OnProgress | None) -> Hashes:
    """Copy the given files of each table, and all factor files."""
    hashes: Hashes = {}
    total = sum(len(names) for names in files.values())
    for table, names in files.items():
        for name in sorted(names):
            if on_progress:
                on_progress(Progress(f"copying {table}", len(hashes), total))
            path = f"{VECTORS}{table}.lance/{name}"
            hashes[path] = _fetch(db.vectors, f"{table}.lance/{name}", draft / path)
    for name in factor_files(db.vectors):
        hashes[f"{VECTORS}{name}"] = _fetch(db.vectors, name, draft / f"{VECTORS}{name}")
    return hashes


# --- the frozen state -----------------------------------------------------------------------------------------------


def _copy_frozen(db: Database, draft: Path) -> tuple[dict[str, Any], dict[str, set[str]]]:
    """Copy the catalogs; return each table's current version and rows, and the files to copy by table."""
    (draft / "vectors").mkdir()
    place = location_at(draft)
    tables: dict[str, Any] = {}
    with db.location.catalog.frozen():
        db.location.catalog.copy(draft / CATALOG)
        for name in sorted(db.vectors.table_names()):
            if db.vectors.has(name):  # otherwise it is being created, without committed rows
                table = db.vectors.table(name)
                tables[name] = {"version": int(table.version), "rows": int(table.count_rows())}
    needed = {name: {facts["version"]} for name, facts in tables.items()}
    for name in db.location.snapshots.names():
        record = db.location.snapshots.record(name)
        with db.location.snapshots.catalog(name) as catalog, place.snapshots.making(name) as copy:
            catalog.copy(copy)
            place.snapshots.keep(name, copy, record)
        for table, number in record["tables"].items():
            needed.setdefault(table, set()).add(number)
    set_vectors(draft, None)
    return tables, {table: _files(db, table, versions) for table, versions in needed.items()}


def _copy_damaged(db: Database, draft: Path) -> tuple[dict[str, Any], dict[str, set[str]]]:
    """Copy the catalogs of a damaged store as they are; return no tables, and all vector files by table."""
    (draft / "vectors").mkdir()
    copy_catalog(db, draft / CATALOG)
    copy_snapshots(db, draft)
    with suppress(sqlite3.DatabaseError):  # not writable: the copy keeps the old location of the vectors
        set_vectors(draft, None)
    files: dict[str, set[str]] = {}
    for path in db.vectors.files.list():
        table, separator, name = path.partition(".lance/")
        if separator:
            files.setdefault(table, set()).add(name)
    return {}, files


def _files(db: Database, table: str, versions: set[int]) -> set[str]:
    """Return the files needed by versions of a table, as paths below its folder."""
    names: set[str] = set()
    seen: set[int] = set()
    try:
        for batch in db.vectors.newest(table).to_lance().tracked_files(min_version=min(versions)):
            for number, path in zip(batch.column("version").to_pylist(), batch.column("path").to_pylist(), strict=True):
                if number in versions:
                    seen.add(number)
                    names.add(path)
    except FAULTS as error:
        raise StoreError(f"`{table}` can't be read: {first_line(error)}", "run `lark-store db check`") from error
    if seen != versions:
        raise StoreError(
            f"version {min(versions - seen)} of `{table}`, which a snapshot needs, is missing",
            "run `lark-store db check`",
        )
    return names


def _tag_again(place: Location) -> None:
    """Tag the snapshots' versions in the copy, to protect them from cleanup."""
    vectors = VectorStore(place.vectors)
    for name in place.snapshots.names():
        for table, number in place.snapshots.record(name)["tables"].items():
            vectors.tags(table).create(f"{TAG}{name}", number)


def _uuid(folder: Path) -> str:
    with closing(sqlite3.connect(f"{(folder / CATALOG).resolve().as_uri()}?mode=ro", uri=True)) as db:
        row = db.execute("SELECT store_uuid FROM store_meta").fetchone()
    return str(row[0]) if row else "none"  # a damaged store without the row


def _fetch(vectors: VectorStore, name: str, target: Path) -> list[Any]:
    """Download a file of the vectors and flush it to disk; returns its size and hash."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        vectors.files.download_file(name, str(target))
    except FAULTS as error:
        raise fault_of(error) or StoreError(
            f"`{vectors.uri}/{name}` can't be copied: {first_line(error)}", "run `lark-store db check`"
        ) from error
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return size_and_hash(target)
