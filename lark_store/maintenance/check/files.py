"""Checks of files: missing and orphaned table files, snapshots, locks and checkpoints."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lark_store.errors import StoreError
from lark_store.maintenance.check.findings import Finding, Repair, name_list
from lark_store.maintenance.check.versions import check_versions, damaged_versions
from lark_store.maintenance.orphan_files import NEEDED, Files, files_of, remove_orphans
from lark_store.maintenance.snapshots import TAG, read, remove, tag_again, untagged
from lark_store.schema.faults import FAULTS
from lark_store.schema.table_schemas import TABLES
from lark_store.schema.vectors import VectorStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.maintenance.check.frozen_store import FrozenStore
    from lark_store.schema.database import Database


@dataclass(frozen=True)
class _NeededVersions:
    """The versions of a table that must be readable, with their owners."""

    table: str
    versions: dict[int, list[str]]


def _needed_versions(store: FrozenStore) -> Iterator[_NeededVersions]:
    snapshots: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in store.location.snapshots.names():
        try:
            tables = read(store.location, name).tables
        except StoreError:
            continue  # reported by `check_snapshots`
        for table, version in tables.items():
            snapshots[table][version].append(f"snapshot {name}")
    current = store.vectors.versions or {}
    for table in sorted({*current, *snapshots}):
        versions = snapshots[table]
        if table in current:
            versions[current[table]].append(table)
        yield _NeededVersions(table, dict(versions))


def check_files(store: FrozenStore) -> Iterator[Finding]:
    """Yield missing files of needed versions, and files of no version."""
    if store.is_idle:
        yield from check_versions(store)
    for table in TABLES:
        if table not in store.vectors.table_names() and table not in store.broken:
            yield Finding("error", "missing table", table, 1, "the table is missing", _recreation(table))
    for needed in _needed_versions(store):
        if needed.table in store.broken:
            continue
        try:
            yield from _check_files(store, needed)
        except FAULTS:
            yield from damaged_versions(store, needed.table, needed.versions)


def _recreation(table: str) -> Repair | None:
    if table == "samples":
        return None  # only a backup can restore it

    def run(db: Database) -> None:
        db.vectors.connection.create_table(table, schema=TABLES[table], exist_ok=True)

    return Repair("create it empty; the command that filled it fills it again", run)


def _check_files(store: FrozenStore, needed: _NeededVersions) -> Iterator[Finding]:
    exists = needed.table in VectorStore(store.vectors.uri).table_names()
    files = files_of(store.vectors, needed.table, set(needed.versions)) if exists else Files(set(), {}, [])
    for version, owners in needed.versions.items():
        for owner in owners if version not in files.seen else ():
            yield Finding("error", "missing version", owner, 1, f"version {version} of `{needed.table}` is missing")
    for kind in NEEDED:
        lost: dict[str, int] = {}
        for version, owners in needed.versions.items():
            lost |= {owner: n for owner in owners if (n := files.lost.get((version, kind), 0))}
        for owner, n in lost.items():
            detail = f"a {kind} of `{needed.table}` is missing; restore it from a backup"
            yield Finding("error", "missing file", owner, n, detail)
    if files.orphans and store.is_idle:
        detail = f"files of no version, left by a killed process or a lost conflict: {name_list(files.orphans)}"
        repair = _removal(needed.table, files.orphans)
        yield Finding("warning", "unverified file", needed.table, len(files.orphans), detail, repair)


def _removal(table: str, files: list[str]) -> Repair:
    return Repair("remove them", lambda db: remove_orphans(db, table, set(files)))


# --- snapshots, locks, checkpoints ---------------------------------------------------------------------------------


def check_snapshots(store: FrozenStore) -> Iterator[Finding]:
    """Yield damaged and incomplete snapshots, and tags of no snapshot."""
    complete = set(store.location.snapshots.names())
    for name in sorted(complete):
        try:
            read(store.location, name)
        except StoreError as error:
            detail = f"{error.fact}; restore it from a backup, or remove the snapshot"
            yield Finding("error", "snapshot", f"snapshot {name}", 1, detail)
    parts = store.location.snapshots.parts()
    for table in store.vectors.table_names():
        try:
            tags = store.vectors.newest(table).to_lance().tags.list()
        except FAULTS:
            tags = {}  # reported by `_check_tags`
        parts |= {tag.removeprefix(TAG) for tag in tags if tag.startswith(TAG)}
    yield from _check_tags(store)
    for name in sorted(parts - complete):
        repair = Repair("remove its remains", lambda db, n=name: remove(db, n, is_locked=True))  # type: ignore[misc]
        yield Finding(
            "note",
            "snapshot",
            f"snapshot {name}",
            1,
            "its record is missing: its creation or removal was interrupted, or the file was lost",
            repair,
        )


def _check_tags(store: FrozenStore) -> Iterator[Finding]:
    """Yield snapshots whose versions lack the tags that prevent cleanup."""
    for name in sorted(store.location.snapshots.names()):
        try:
            missing = untagged(store.vectors, name, read(store.location, name).tables)
        except StoreError:
            continue  # reported by `check_snapshots`
        if missing:
            repair = Repair("tag them again", lambda db, n=name, t=missing: tag_again(db, n, t))  # type: ignore[misc]
            detail = f"its versions of {name_list(missing)} have no tag: `db optimize` would remove them"
            yield Finding("warning", "snapshot", f"snapshot {name}", len(missing), detail, repair)


def check_locks(store: FrozenStore) -> Iterator[Finding]:
    """Yield notes and locks left by killed processes."""

    def run(_db: Database) -> None:
        for key in keys:
            store.location.locks.remove(key)

    keys = store.pause.leftovers
    if keys:
        detail = f"notes and locks of killed processes: {name_list(keys)}"
        yield Finding("note", "lock", "locks", len(keys), detail, Repair("remove them", run))


def check_checkpoints(store: FrozenStore) -> Iterator[Finding]:
    """Yield checkpoints whose folder, or that of a part, is missing; hub names are not checked."""
    for checkpoint in store.checkpoints:
        parts = [part["path"] for part in (checkpoint.parts or {}).values()]
        path = next((path for path in map(Path, [checkpoint.path, *parts]) if _is_missing(path)), None)
        if path is not None:
            detail = f"`{path}` is missing; `ingest` and `verify` need it. If it moved, `checkpoint add` its new path"
            yield Finding("note", "checkpoint files", f"checkpoint {checkpoint.name}", 1, detail)


def _is_missing(path: Path) -> bool:
    return path.is_absolute() and not path.is_dir()
