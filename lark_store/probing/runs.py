"""Probe runs in the catalog: lock, begin or reopen, commit.

A unit has one run per way of decoding. A run that was interrupted, or whose source has new facts, is opened again: its
rows are read once it is `done`.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from lark_store.core.retry import retry
from lark_store.schema.catalog import ProbeRun
from lark_store.schema.catalog_base import now
from lark_store.schema.faults import failure_reason
from lark_store.schema.locks import working
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from lark_store.probing.units import Unit
    from lark_store.schema.database import Database


def locked(db: Database, unit: Unit, how: dict[str, Any]) -> AbstractContextManager[None]:
    """Lock a unit: no other process probes it in this way, or removes its parts.

    Raises
    ------
    StoreBusyError
    """
    key = hashlib.sha256(f"{unit.label} {sorted(how.items())}".encode()).hexdigest()[:16]
    touches = {kind: [name] for kind, name in unit.names.items()}
    return working(db.location, f"probe-{key}", f"probing {unit.label}", touches)


def find_run(db: Database, unit: Unit, how: dict[str, Any], recipe: dict[str, Any]) -> ProbeRun | None:
    """Return the unit's run with this way of decoding and this recipe."""
    ids = {"checkpoint_id": unit.checkpoint.id, "source_id": unit.source.id, "variant_id": unit.variant.id}
    with db.session() as session:
        runs = session.scalars(select(ProbeRun).filter_by(**ids, **how).where(ProbeRun.status != "superseded"))
        return next((run for run in runs if run.recipe == recipe), None)


@contextmanager
def running(db: Database, unit: Unit, how: dict[str, Any], provenance: dict[str, Any]) -> Iterator[ProbeRun]:
    """Begin or reopen the unit's run, and close it as done, failed or interrupted. Its failed facts are tried again.

    `provenance` has the columns recipe, versions and device. The caller holds the unit's lock.
    """
    run = find_run(db, unit, how, provenance["recipe"])
    if run is None:
        ids = {"checkpoint_id": unit.checkpoint.id, "source_id": unit.source.id, "variant_id": unit.variant.id}
        run = ProbeRun(**ids, **how, **provenance, status="running")
        with db.session() as session:
            session.add(run)
    else:
        _set(db, run, status="running", error=None, finished_at=None, **provenance)
        failed = f"{where(probe_run=run.id)} AND reason IS NOT NULL"
        if db.vectors.table("probes").count_rows(failed):
            retry(lambda: db.vectors.table("probes").delete(failed), "rows of `probes` can't be deleted")
    try:
        yield run
    except KeyboardInterrupt:
        _close(db, run, "interrupted")
        raise
    except Exception as error:
        _close(db, run, "failed", failure_reason(error))
        raise
    _close(db, run, "done")
    db.vectors.refresh_indices(db.vectors.table("probes"))


def _close(db: Database, run: ProbeRun, status: str, error: str | None = None) -> None:
    """End a run, with the counts of its actual rows."""
    table = db.vectors.table("probes")
    n_rows, failed = where(probe_run=run.id), f"{where(probe_run=run.id)} AND reason IS NOT NULL"
    n_failed = table.count_rows(failed)
    counts = {"n_failed": n_failed, "n_probed": table.count_rows(n_rows) - n_failed, "lance_version": table.version}
    _set(db, run, status=status, error=error, finished_at=now(), **counts)


def _set(db: Database, run: ProbeRun, **values: Any) -> None:
    for name, value in values.items():
        setattr(run, name, value)
    with db.session() as session:
        session.merge(run)
