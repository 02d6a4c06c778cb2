"""Checks of table versions: unreadable or missing newest versions, unreadable old ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.errors import StoreError
from lark_store.maintenance.check.findings import Finding, Repair, name_list
from lark_store.maintenance.table_versions import (
    forget_versions,
    lost_versions,
    manifests,
    misnamed,
    newest_readable,
    unreadable_versions,
)
from lark_store.schema.faults import FAULTS, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.maintenance.check.frozen_store import FrozenStore
    from lark_store.schema.database import Database

_BACKUP = "restore it from a backup"


def check_versions(store: FrozenStore) -> Iterator[Finding]:
    """Yield tables whose newest version is damaged or missing. Call it only if no process writes."""
    for table, reason in store.broken.items():
        last = newest_readable(store.vectors, table)
        yield _damaged_table(store, table, "unreadable", reason, last)
    for table, newest in (store.vectors.versions or {}).items():
        try:
            renamed = misnamed(table, store.vectors.table(table).schema)
            n = lost_versions(store.vectors, table)
        except (*FAULTS, StoreError) as error:
            yield Finding("error", "unreadable", table, 1, f"{first_line(error)}; {_BACKUP}")
            continue
        if renamed:
            last = newest_readable(store.vectors, table, check_columns=True)
            reason = f"it has columns {name_list(renamed)}, unknown to all versions of lark-store"
            yield _damaged_table(store, table, "columns", reason, last)
        elif n:
            detail = f"its newest {n} versions are missing; the table is at version {newest}"
            yield Finding("error", "missing version", table, n, detail, _rollback(table, [], newest))


def damaged_versions(store: FrozenStore, table: str, needed: dict[int, list[str]]) -> Iterator[Finding]:
    """Yield unreadable versions of a table. `needed` maps versions to their owners."""
    bad = unreadable_versions(store.vectors, table)
    for version in bad:
        for owner in needed.get(version, ()):
            detail = f"version {version} of `{table}` can't be read; {_BACKUP}"
            yield Finding("error", "missing version", owner, 1, detail)
    spare = [version for version in bad if version not in needed]
    if spare and store.is_idle:
        repair = Repair("remove them", lambda db: forget_versions(db.vectors, table, spare))
        detail = "unreadable old versions that are not needed"
        yield Finding("warning", "unreadable", table, len(spare), detail, repair)
    if not bad:
        yield Finding("error", "unreadable", table, 1, f"its versions can't be listed; {_BACKUP}")


def _damaged_table(store: FrozenStore, table: str, kind: str, reason: str, last: int | None) -> Finding:
    """Return the finding of a table with a damaged newest version; version `last` is intact."""
    newer = [version for version in manifests(store.vectors, table) if last is not None and version > last]
    if last is None or not newer:
        return Finding("error", kind, table, 1, f"{reason}; {_BACKUP}")
    detail = (
        f"{reason}; version {last} is intact, {len(newer)} newer ones are not: restore a backup, or roll back to it"
    )
    return Finding("error", kind, table, len(newer), detail, _rollback(table, newer, last))


def _rollback(table: str, newer: list[int], last: int) -> Repair:
    def roll_back(db: Database) -> None:
        forget_versions(db.vectors, table, newer)

    return Repair(f"roll back to version {last}: later commits are lost", roll_back, is_last=True)
