"""`db check`: catalog and tables against each other and against themselves, streamed."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from typing import TYPE_CHECKING

from sqlalchemy.exc import DatabaseError

from lark_store.errors import StoreBusyError
from lark_store.schema.locks import maintenance, paused
from lark_store.schema.records import Progress
from lark_store.upkeep.check_files import (
    check_catalog,
    check_checkpoints,
    check_files,
    check_indices,
    check_locks,
    check_snapshots,
)
from lark_store.upkeep.check_rows import check_embeddings, check_failures, check_samples, check_scores
from lark_store.upkeep.check_sketches import check_ingest_runs, check_sketches
from lark_store.upkeep.findings import Finding
from lark_store.upkeep.moment import Moment, take

if TYPE_CHECKING:
    from lark_store.schema.database import Database
    from lark_store.schema.locks import Pause
    from lark_store.schema.records import OnProgress


def check(db: Database, *, deep: bool, on_progress: OnProgress | None = None) -> list[Finding]:
    """Look at the store as it is at one moment; see `Store.db_check`. Work may go on meanwhile."""
    with maintenance(db.location):
        found = list(check_catalog(db.location))
        with paused(db.location) as pause:
            at = _taken(db, pause, found)
        return _judged(found, look(at, deep=deep, on_progress=on_progress) if at else [])


def check_alone(db: Database, pause: Pause, *, on_progress: OnProgress | None = None) -> list[Finding]:
    """Look at the store while the caller holds it alone."""
    found = list(check_catalog(db.location))
    at = _taken(db, pause, found)
    return _judged(found, look(at, deep=False, on_progress=on_progress) if at else [])


def _judged(of_catalog: list[Finding], others: list[Finding]) -> list[Finding]:
    """Return all findings; by a catalog that is damaged itself nothing is mended."""
    if any(finding.where == "catalog" for finding in of_catalog):
        others = [replace(finding, mend=None) for finding in others]
    return of_catalog + others


def _taken(db: Database, pause: Pause, found: list[Finding]) -> Moment | None:
    try:
        return take(db, pause)
    except (DatabaseError, sqlite3.DatabaseError) as error:
        said = str(getattr(error, "orig", error))
        if "locked" in said:
            raise StoreBusyError("the catalog is being written to all the time", "run the command again") from error
        if not any(finding.where == "catalog" for finding in found):
            found.append(Finding("error", "catalog", "catalog", 1, f"{said}; restore it from a backup"))
        return None


def look(at: Moment, *, deep: bool, on_progress: OnProgress | None = None) -> list[Finding]:
    """Return all that is found at a moment."""
    steps = ("files", "samples", "sketches", "scores", "indices")

    def tell(step: str) -> None:
        if on_progress:
            on_progress(Progress(f"checking {step}", steps.index(step), len(steps)))

    tell("files")
    found = [*check_files(at), *check_snapshots(at), *check_locks(at), *check_checkpoints(at)]
    tell("samples")
    samples = None
    if "samples" in at.vectors.table_names():
        samples, of_samples = check_samples(at)
        found += of_samples
    tell("sketches")
    found += check_sketches(at, samples, deep=deep)
    found += check_ingest_runs(at)
    found += check_embeddings(at, samples)
    tell("scores")
    there = at.vectors.table_names()
    if "failures" in there:
        found += check_failures(at)
    if {"influence", "source_influence"} <= set(there):
        found += check_scores(at, samples)
    tell("indices")
    found += check_indices(at)
    if on_progress:
        on_progress(Progress("checked", len(steps), len(steps)))
    return found
