"""Ingest runs in the catalog: lock, begin or resume, adopt, commit.

An interrupted or failed run leaves valid rows and a status other than `done`, which hides them from readers. The next
ingest of the unit resumes the run or adopts its rows.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import Select, select

from lark_store.ingest.distributed import Ranks
from lark_store.schema.catalog import IngestRun
from lark_store.schema.catalog_base import now
from lark_store.schema.locks import Work
from lark_store.schema.table_schemas import sketch_table
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import Session

    from lark_store.schema.database import Database

Ids = dict[str, Any]  # columns of ingest_run that identify a unit: fingerprint, sketcher_id, checkpoint_id, …


@contextmanager
def locked(db: Database, fingerprint: str, names: dict[str, str], ranks: Ranks | None = None) -> Iterator[None]:
    """Lock a unit: no other process ingests it or removes its parts. Rank 0 holds the lock for all ranks.

    Raises
    ------
    StoreBusyError
    """
    label = " · ".join(names.values())
    key = hashlib.sha256(f"{fingerprint} {label}".encode()).hexdigest()[:16]
    work = Work(db.location, f"ingest-{key}", f"ingesting {label}", {kind: [name] for kind, name in names.items()})
    (ranks or Ranks()).once(work.acquire)
    try:
        yield
    finally:
        work.release()


def _unfinished(ids: Ids) -> Select[IngestRun]:
    return select(IngestRun).filter_by(**ids).where(IngestRun.status != "done").order_by(IngestRun.id)


def has_unfinished(db: Database, ids: Ids) -> bool:
    """Tell whether the unit has an uncommitted run, interrupted or still running elsewhere."""
    with db.session() as session:
        return session.scalar(_unfinished(ids).limit(1)) is not None


def settle(db: Database, ids: Ids) -> None:
    """Commit the unit's unfinished runs with their rows. The caller holds the unit's lock."""
    with db.session() as session:
        for run in session.scalars(_unfinished(ids)):
            _adopt(db, run)


def begin(db: Database, ids: Ids, provenance: dict[str, Any], n_existing: int) -> IngestRun:
    """Resume the unit's unfinished run if its provenance is equal, else adopt it and start a new run.

    `provenance` has the columns recipe, versions and device. The caller holds the unit's lock.
    """
    with db.session() as session:
        for run in session.scalars(_unfinished(ids)):
            if {key: getattr(run, key) for key in provenance} == provenance:
                run.status, run.error, run.finished_at = "running", None, None
                return run
            _adopt(db, run)
        return _new(session, IngestRun(**ids, **provenance, status="running", n_existing=n_existing))


def _new(session: Session, run: IngestRun) -> IngestRun:
    session.add(run)
    session.flush()
    return run


def _adopt(db: Database, run: IngestRun) -> None:
    run.error = f"{run.status}; its rows are kept"
    run.status, run.finished_at = "done", run.finished_at or now()
    name = sketch_table(run.fingerprint)
    if db.vectors.has(name):
        run.n_sketched = int(db.vectors.table(name).count_rows(where(ingest_run=run.id)))
    run.n_failed = int(db.vectors.table("failures").count_rows(where(ingest_run=run.id)))
