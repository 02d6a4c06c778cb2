"""An ingest run's life in the catalog: held, begun or continued, adopted, committed.

A run that was ended (killed, interrupted, failed) leaves rows that are right and a status that is not `done`, so nobody
reads them yet. The next ingest of the same unit continues it, or adopts its rows as they are.
"""

from __future__ import annotations

import hashlib
import platform
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from sqlalchemy import Select, select

from lark_store.ingest.ranks import Ranks
from lark_store.schema.catalog import IngestRun, now
from lark_store.schema.locks import Work
from lark_store.schema.vectors import sketch_table, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import Session

    from lark_store.schema.database import Database

Ids = dict[str, Any]  # the columns of ingest_run that say which unit: fingerprint, sketcher_id, checkpoint_id, …


@contextmanager
def held(db: Database, fingerprint: str, names: dict[str, str], ranks: Ranks | None = None) -> Iterator[None]:
    """Hold the unit of these names: two ingests never sketch the same rows, and nothing of it is removed meanwhile.

    Of several ranks the first holds it for all.

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
    """Tell whether a run of this unit was ended before its commit, or is under way elsewhere."""
    with db.session() as session:
        return session.scalar(_unfinished(ids).limit(1)) is not None


def settle(db: Database, ids: Ids) -> None:
    """Commit the unit's ended runs with the rows they have. The unit must be held."""
    with db.session() as session:
        for run in session.scalars(_unfinished(ids)):
            _adopt(db, run)


def begin(db: Database, ids: Ids, how: dict[str, Any], n_existing: int) -> IngestRun:
    """Continue the unit's ended run if it was made in the same way, else adopt it and start one. The unit must be held.

    `how` has the columns recipe, versions and device.
    """
    with db.session() as session:
        for run in session.scalars(_unfinished(ids)):
            if {key: getattr(run, key) for key in how} == how:
                run.status, run.error, run.finished_at = "running", None, None
                return run
            _adopt(db, run)
        return _new(session, IngestRun(**ids, **how, status="running", n_existing=n_existing))


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


def versions() -> dict[str, Any]:
    """Return the versions that a result depends on."""
    names = ("lark-store", "torch", "transformers", "tokenizers", "lancedb")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def device_name(device: torch.device) -> str:
    """Return a device's name as people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
