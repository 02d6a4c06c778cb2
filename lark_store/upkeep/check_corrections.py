"""Checks of the factors of corrections: the files that rows name, and those that no row names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from lark_store.schema.catalog import Correction
from lark_store.schema.corrections import factor_files, file_name, is_what_was_written
from lark_store.upkeep.findings import Finding, Mend, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.schema.database import Database
    from lark_store.upkeep.moment import Moment

_READ_ANYWAY = 64 << 20  # bytes; larger files are read by a deep check alone


def check_corrections(at: Moment, *, deep: bool) -> Iterator[Finding]:
    """Yield factors whose file is gone or damaged, and where nobody is at work files that no row names."""
    there = set(factor_files(at.vectors))
    for row in at.corrections:
        where = f"checkpoint {row.checkpoint.name}"
        name, again = file_name(row.sha256), "fit them again as they were, or restore a backup"
        if name not in there:
            yield Finding("error", "missing file", where, 1, f"its factors `{name}` are gone; {again}")
        elif (deep or row.n_bytes <= _READ_ANYWAY) and not is_what_was_written(at.vectors, row.sha256):
            yield Finding("error", "damaged file", where, 1, f"its factors `{name}` are not what was written; {again}")
    if not at.nobody or at.location.snapshots.names():  # a snapshot may name what the catalog does not
        return
    orphans = sorted(there - {file_name(row.sha256) for row in at.corrections})
    if orphans:
        detail = f"factors that no checkpoint has: {shown(orphans)}"
        mend = Mend("remove them", lambda db: _remove(db, orphans))
        yield Finding("warning", "unverified file", "corrections", len(orphans), detail, mend)


def _remove(db: Database, names: list[str]) -> None:
    with db.session() as session:
        needed = {file_name(sha256) for sha256 in session.scalars(select(Correction.sha256))}
    for name in names:
        if name not in needed:
            db.vectors.files.delete_file(name)
