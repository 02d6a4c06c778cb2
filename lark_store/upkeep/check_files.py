"""Checks of files: those that a version needs, those that none needs, indices, snapshots, locks and checkpoints."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lark_store.schema.retry import retried
from lark_store.schema.vectors import INDICES, TABLES, VectorStore, kind_of, where
from lark_store.upkeep.findings import Finding, Mend, shown
from lark_store.upkeep.moment import FAULTS, Moment, first_line
from lark_store.upkeep.orphans import NEEDED, Files, files_of, remove_orphans
from lark_store.upkeep.snapshots import TAG, remove

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.schema.database import Database
    from lark_store.schema.location import Location


def check_catalog(location: Location) -> Iterator[Finding]:
    """Yield what is wrong with the catalogs themselves, the store's and the snapshots'."""
    for n, detail in location.catalog.faults():
        yield Finding("error", "catalog", "catalog", n, detail)
    for name in location.snapshots.names():
        with location.snapshots.catalog(name) as catalog:
            for n, detail in catalog.faults():
                yield Finding("error", "snapshot", f"snapshot {name}", n, f"its catalog: {detail}")


@dataclass(frozen=True)
class _Wanted:
    """The versions of a table that must be readable, and whose they are."""

    table: str
    versions: dict[int, list[str]]


def _wanted(at: Moment) -> Iterator[_Wanted]:
    snapshots: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in at.location.snapshots.names():
        try:
            record = at.location.snapshots.record(name)["tables"]
        except (OSError, ValueError, KeyError):
            continue  # said by `check_snapshots`
        for table, version in record.items():
            snapshots[table][version].append(f"snapshot {name}")
    there = at.vectors.versions or {}
    for table in sorted({*there, *snapshots}):
        versions = snapshots[table]
        if table in there:
            versions[there[table]].append(table)
        yield _Wanted(table, dict(versions))


def check_files(at: Moment) -> Iterator[Finding]:
    """Yield files that a version needs and that are gone, and those that no version has."""
    for table, why in at.broken.items():
        if at.nobody:
            yield Finding("error", "unreadable", table, 1, f"{why}; restore it from a backup")
    for table in TABLES:
        if table not in at.vectors.table_names() and table not in at.broken:
            yield Finding("error", "missing table", table, 1, "the table is gone", _made_again(table))
    for wanted in _wanted(at):
        if wanted.table in at.broken:
            continue
        try:
            yield from _check_files(at, wanted)
        except FAULTS as error:
            yield Finding("error", "unreadable", wanted.table, 1, f"{first_line(error)}; restore it from a backup")


def _made_again(table: str) -> Mend | None:
    if table == "samples":
        return None  # restore it from a backup

    def act(db: Database) -> None:
        db.vectors.connection.create_table(table, schema=TABLES[table], exist_ok=True)

    return Mend("make it again, empty; `attribute` and `ingest` fill it", act)


def _check_files(at: Moment, wanted: _Wanted) -> Iterator[Finding]:
    there = wanted.table in VectorStore(at.vectors.uri).table_names()
    files = files_of(at.vectors, wanted.table, set(wanted.versions)) if there else Files(set(), {}, [])
    for version, whose in wanted.versions.items():
        for owner in whose if version not in files.seen else ():
            yield Finding("error", "missing version", owner, 1, f"version {version} of `{wanted.table}` is gone")
    for kind in NEEDED:
        lost: dict[str, int] = {}
        for version, whose in wanted.versions.items():
            lost |= {owner: n for owner in whose if (n := files.lost.get((version, kind), 0))}
        for owner, n in lost.items():
            detail = f"a {kind} of `{wanted.table}` is gone; restore it from a backup"
            yield Finding("error", "missing file", owner, n, detail)
    if files.orphans and at.nobody:
        detail = f"files that no version has, as a killed process leaves them: {shown(files.orphans)}"
        mend = _removal(wanted.table, files.orphans)
        yield Finding("warning", "unverified file", wanted.table, len(files.orphans), detail, mend)


def _removal(table: str, files: list[str]) -> Mend:
    return Mend("remove them", lambda db: remove_orphans(db, table, set(files)))


# --- indices -------------------------------------------------------------------------------------------------------


def check_indices(at: Moment) -> Iterator[Finding]:
    """Yield tables whose scalar indices are missing or do not cover all rows; where somebody writes, that may be."""
    if not at.nobody:
        return
    for name in at.vectors.table_names():
        kind = kind_of(name)
        if kind not in INDICES or kind == "failures":  # failures are few, and no index is kept up for them
            continue
        try:
            table = at.vectors.table(name)
            if table.count_rows() == 0:
                continue
            indices = {column: index for index in table.list_indices() for column in index.columns}
            missing = [column for column in INDICES[kind] if column not in indices]
            for column in indices:
                table.count_rows(where(**{column: 0 if column.endswith("_run") else "-"}))  # it has to read the index
            behind = {c: table.index_stats(i.name).num_unindexed_rows for c, i in indices.items()}
        except FAULTS as error:
            yield Finding("error", "index", name, 1, f"it can't be read: {first_line(error)}", _rebuilt(name))
            continue
        short = [column for column, n in behind.items() if n]
        if missing or short:
            words = [f"no index on {shown(missing)}"] if missing else []
            words += [f"{max(behind.values())} rows are not in the index of {shown(short)}"] if short else []
            mend = _refreshed(name)
            yield Finding("warning", "index", name, len(missing) + len(short), "; ".join(words), mend)


def _refreshed(name: str) -> Mend:
    return Mend("bring the indices up to date", lambda db: db.vectors.refresh_indices(db.vectors.table(name)))


def _rebuilt(name: str) -> Mend:
    def act(db: Database) -> None:
        for index in db.vectors.table(name).list_indices():
            retried(lambda i=index: db.vectors.table(name).drop_index(i.name), f"an index of `{name}` can't go")  # type: ignore[misc]
        db.vectors.refresh_indices(db.vectors.table(name))

    return Mend("build the indices anew", act)


# --- snapshots, locks, checkpoints ---------------------------------------------------------------------------------


def check_snapshots(at: Moment) -> Iterator[Finding]:
    """Yield snapshots that were cut off while they were made or removed, and tags that belong to none."""
    whole = set(at.location.snapshots.names())
    for name in sorted(whole):
        try:
            at.location.snapshots.record(name)["tables"]
        except (OSError, ValueError, KeyError) as error:
            yield Finding("error", "snapshot", f"snapshot {name}", 1, f"its record can't be read: {error}")
    parts = at.location.snapshots.parts()
    for table in at.vectors.table_names():
        try:
            tags = at.vectors.connection.open_table(table).to_lance().tags.list()
        except FAULTS:
            continue  # said by `check_files`
        parts |= {tag.removeprefix(TAG) for tag in tags if tag.startswith(TAG)}
    for name in sorted(parts - whole):
        mend = Mend("remove what is left of it", lambda db, n=name: remove(db, n, held=True))  # type: ignore[misc]
        yield Finding("note", "snapshot", f"snapshot {name}", 1, "it was cut off while it was made or removed", mend)


def check_locks(at: Moment) -> Iterator[Finding]:
    """Yield what killed processes left among the locks."""

    def act(_db: Database) -> None:
        for key in keys:
            at.location.locks.remove(key)

    keys = at.pause.leftovers
    if keys:
        detail = f"notes and locks of processes that were killed: {shown(keys)}"
        yield Finding("note", "lock", "locks", len(keys), detail, Mend("remove them", act))


def check_checkpoints(at: Moment) -> Iterator[Finding]:
    """Yield checkpoints whose folder is gone; hub names are not looked up."""
    for checkpoint in at.checkpoints:
        path = Path(checkpoint.path)
        if path.is_absolute() and not path.is_dir():
            detail = (
                f"`{path}` is gone; `ingest` and `verify` need it. If it moved, run `checkpoint add` with its new path"
            )
            yield Finding("note", "checkpoint files", f"checkpoint {checkpoint.name}", 1, detail)
