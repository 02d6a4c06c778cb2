"""Snapshots: the store at one moment, kept under a name while the store goes on.

A snapshot is a copy of the catalog and a record of each Lance table's version then (`schema.location.Snapshots`); a tag
`lark-snapshot-NAME` on each version keeps it from being cleaned up. Copy and versions are taken
while the catalog is locked against writing: no run is committed or superseded in between, so all rows of the copy's
`done` runs are in those versions, and rows of other runs are seen by nobody. Removal and cleanup wait (`maintenance`).

The record is written last when a snapshot is made and goes first when it is removed: with it a snapshot is whole, and
without it there is none. What a killed process leaves is overwritten, or removed, by the same command.
"""

from __future__ import annotations

import datetime as dt
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.errors import NameTakenError, NameUnknownError
from lark_store.schema.catalog import now
from lark_store.schema.locks import maintenance
from lark_store.schema.names import check_name
from lark_store.schema.records import SnapshotInfo

if TYPE_CHECKING:
    from lark_store.schema.database import Database
    from lark_store.schema.location import Location
    from lark_store.schema.vectors import VectorStore

TAG = "lark-snapshot-"
LIST: dict[str, Any] = {"name": pl.String, "created_at": pl.Datetime("us", "UTC"), "tables": pl.Int64, "rows": pl.Int64}


def create(db: Database, name: str) -> SnapshotInfo:
    """Keep the store as it is now; see `Store.snapshot_create`."""
    check_name(name)
    place = db.location
    with maintenance(place):
        if name in place.snapshots.names():
            raise NameTakenError(
                f"there is a snapshot `{name}` already",
                "choose another name, or remove it: `lark-store snapshot remove`",
            )
        with place.snapshots.making(name) as copy:
            with place.catalog.frozen():
                place.catalog.copy(copy)
                versions, n_rows = _tag(db.vectors, _label(name))
            info = SnapshotInfo(name, now(), versions, n_rows)
            facts = {"created_at": info.created_at.isoformat(), "tables": versions, "rows": n_rows}
            place.snapshots.keep(name, copy, facts)
    return info


def _label(name: str) -> str:
    return f"{TAG}{name}"


def _tag(vectors: VectorStore, label: str) -> tuple[dict[str, int], int]:
    """Tag the newest version of each table; returns the versions and how many rows they have in all."""
    versions, n_rows = {}, 0
    for name in sorted(vectors.table_names()):
        if not vectors.has(name):
            continue  # it is being made: no committed run has rows in it
        dataset = vectors.table(name).to_lance()
        if label in dataset.tags.list():
            dataset.tags.update(label, dataset.version)
        else:
            dataset.tags.create(label, dataset.version)
        versions[name] = int(dataset.version)
        n_rows += int(dataset.count_rows())
    return versions, n_rows


def snapshots(location: Location) -> pl.DataFrame:
    """Return a row for each snapshot, oldest first; see `Store.snapshot_list`."""
    infos = [read(location, name) for name in location.snapshots.names()]
    rows = [(i.name, i.created_at, len(i.tables), i.n_rows) for i in sorted(infos, key=lambda i: i.created_at)]
    return pl.DataFrame(rows, schema=LIST, orient="row")


def read(location: Location, name: str) -> SnapshotInfo:
    """Return a snapshot's record.

    Raises
    ------
    NameUnknownError
    """
    known = location.snapshots.names()
    if name not in known:
        raise NameUnknownError.of("snapshot", name, known, "make one with `lark-store snapshot create`")
    facts = location.snapshots.record(name)
    return SnapshotInfo(name, dt.datetime.fromisoformat(facts["created_at"]), facts["tables"], facts["rows"])


def remove(db: Database, name: str, *, held: bool = False) -> None:
    """Let go of a snapshot; see `Store.snapshot_remove`. `held`: the caller holds `maintenance`."""
    check_name(name)
    place = db.location
    with nullcontext() if held else maintenance(place):
        if not held and name not in place.snapshots.parts():
            read(place, name)  # says that there is none, with the near ones
        place.snapshots.forget(name)
        for table in db.vectors.table_names():
            if db.vectors.has(table):
                tags = db.vectors.table(table).to_lance().tags
                if _label(name) in tags.list():
                    tags.delete(_label(name))
        place.snapshots.clear(name)
