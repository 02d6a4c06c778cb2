"""Checks of correction factors: missing, damaged and orphaned files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from lark_store.maintenance.check.findings import Finding, Repair, name_list
from lark_store.schema.catalog import Correction
from lark_store.schema.factor_files import factor_files, file_name, is_intact

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.maintenance.check.frozen_store import FrozenStore
    from lark_store.schema.database import Database

_MAX_SHALLOW_READ = 64 << 20  # bytes; only a deep check reads larger files


def check_corrections(store: FrozenStore) -> Iterator[Finding]:
    """Yield factors with a missing or damaged file and, if the store is idle, orphaned files."""
    files = set(factor_files(store.vectors))
    for row in store.corrections:
        checkpoint = f"checkpoint {row.checkpoint.name}"
        name, advice = file_name(row.sha256), "fit them again the same way, or restore a backup"
        if name not in files:
            yield Finding("error", "missing file", checkpoint, 1, f"its factors `{name}` are missing; {advice}")
        elif (store.deep or row.n_bytes <= _MAX_SHALLOW_READ) and not is_intact(store.vectors, row.sha256):
            detail = f"its factors `{name}` changed after they were written; {advice}"
            yield Finding("error", "damaged file", checkpoint, 1, detail)
    if not store.is_idle or store.location.snapshots.names():  # snapshots may need more files than the catalog
        return
    orphans = sorted(files - {file_name(row.sha256) for row in store.corrections})
    if orphans:
        detail = f"factor files of no checkpoint: {name_list(orphans)}"
        repair = Repair("remove them", lambda db: _remove(db, orphans))
        yield Finding("warning", "unverified file", "corrections", len(orphans), detail, repair)


def _remove(db: Database, names: list[str]) -> None:
    with db.session() as session:
        needed = {file_name(sha256) for sha256 in session.scalars(select(Correction.sha256))}
    for name in names:
        if name not in needed:
            db.vectors.files.delete_file(name)
