"""Snapshots: named states of the store.

A snapshot is a copy of the catalog and a record of each Lance table's version (`schema.location.Snapshots`). A tag
`lark-snapshot-NAME` protects each version from cleanup. The copy is made and the versions are read while the catalog is
locked: no run can be committed or superseded in between, so the versions hold all rows of the copy's `done` runs. Rows
of other runs are never read. Removal and cleanup wait (`maintenance`).

The record is written last on creation and deleted first on removal; a snapshot exists only with its record. The same
command overwrites or removes the remains of a killed process.
"""

from __future__ import annotations

import datetime as dt
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.core.hashing import is_whole, sealed
from lark_store.core.names import check_name
from lark_store.errors import NameTakenError, NameUnknownError, StoreError
from lark_store.maintenance.table_versions import manifests
from lark_store.results import SnapshotInfo
from lark_store.schema.catalog_base import now
from lark_store.schema.faults import FAULTS, first_line
from lark_store.schema.locks import maintenance

if TYPE_CHECKING:
    from lark_store.schema.backends.base import Location
    from lark_store.schema.database import Database
    from lark_store.schema.vectors import VectorStore

TAG = "lark-snapshot-"
LIST: dict[str, Any] = {"name": pl.String, "created_at": pl.Datetime("us", "UTC"), "tables": pl.Int64, "rows": pl.Int64}


def create(db: Database, name: str) -> SnapshotInfo:
    """Save the store's current state; see `Store.snapshot_create`."""
    check_name(name)
    place = db.location
    with maintenance(place):
        if name in place.snapshots.names():
            raise NameTakenError(
                f"snapshot `{name}` already exists",
                "choose another name, or remove it with `lark-store snapshot remove`",
            )
        with place.snapshots.making(name) as copy:
            with place.catalog.frozen():
                place.catalog.copy(copy)
                versions, n_rows = _tag(db.vectors, _label(name))
            info = SnapshotInfo(name, now(), versions, n_rows)
            facts = {"created_at": info.created_at.isoformat(), "tables": versions, "rows": n_rows}
            place.snapshots.keep(name, copy, sealed(facts))
    return info


def _label(name: str) -> str:
    return f"{TAG}{name}"


def _tag(vectors: VectorStore, label: str) -> tuple[dict[str, int], int]:
    """Tag the newest version of each table; returns the versions and their total number of rows."""
    versions, n_rows = {}, 0
    for name in sorted(vectors.table_names()):
        if not vectors.has(name):
            continue  # being created, without committed rows
        dataset = vectors.table(name).to_lance()
        tags = vectors.tags(name)
        if label in tags.list():
            tags.update(label, dataset.version)
        else:
            tags.create(label, dataset.version)
        versions[name] = int(dataset.version)
        n_rows += int(dataset.count_rows())
    return versions, n_rows


def snapshots(location: Location) -> pl.DataFrame:
    """Return one row per snapshot, oldest first; see `Store.snapshot_list`."""
    infos = [read(location, name) for name in location.snapshots.names()]
    rows = [(i.name, i.created_at, len(i.tables), i.n_rows) for i in sorted(infos, key=lambda i: i.created_at)]
    return pl.DataFrame(rows, schema=LIST, orient="row")


def read(location: Location, name: str) -> SnapshotInfo:
    """Return a snapshot's record.

    Raises
    ------
    NameUnknownError
    StoreError
        The record is damaged.
    """
    names = location.snapshots.names()
    if name not in names:
        raise NameUnknownError.of("snapshot", name, names, "create one with `lark-store snapshot create`")
    try:
        facts = location.snapshots.record(name)
        tables = {str(table): int(version) for table, version in facts["tables"].items()}
        info = SnapshotInfo(name, dt.datetime.fromisoformat(facts["created_at"]), tables, int(facts["rows"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(name, f"its record can't be read: {first_line(error)}") from error
    if not is_whole(facts):
        raise _damaged(name, "its record changed after it was written")
    return info


def _damaged(name: str, reason: str) -> StoreError:
    return StoreError(
        f"snapshot `{name}` is damaged: {reason}", "restore a backup, or remove it with `lark-store snapshot remove`"
    )


def untagged(vectors: VectorStore, name: str, tables: dict[str, int]) -> dict[str, int]:
    """Return the existing versions by table that a snapshot needs but does not tag."""
    return {
        table: version
        for table, version in tables.items()
        if _tagged(vectors, table, name) != version and version in manifests(vectors, table)
    }


def _tagged(vectors: VectorStore, table: str, name: str) -> int | None:
    try:
        tag = vectors.newest(table).to_lance().tags.list().get(_label(name))
        return None if tag is None else int(tag["version"])
    except FAULTS:
        return None


def tag_again(db: Database, name: str, tables: dict[str, int]) -> None:
    """Tag the versions of a snapshot, replacing damaged tags."""
    for table, version in tables.items():
        path = f"{table}.lance/_refs/tags/{_label(name)}.json"
        if path in db.vectors.files.list(f"{table}.lance/_refs"):
            db.vectors.files.delete_file(path)
        db.vectors.tags(table).create(_label(name), version)


def remove(db: Database, name: str, *, is_locked: bool = False) -> None:
    """Remove a snapshot; see `Store.snapshot_remove`. `is_locked`: the caller holds `maintenance`."""
    check_name(name)
    place = db.location
    with nullcontext() if is_locked else maintenance(place):
        if not is_locked and name not in place.snapshots.parts():
            read(place, name)  # raises NameUnknownError with the nearest name
        place.snapshots.forget(name)
        for table in db.vectors.table_names():
            if db.vectors.has(table):
                tags = db.vectors.tags(table)
                if _label(name) in tags.list():
                    tags.delete(_label(name))
        place.snapshots.clear(name)
