"""`db check`: verify catalog and tables, each by itself and against each other, by streaming."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import polars as pl
from sqlalchemy.exc import DatabaseError

from lark_store.errors import StoreBusyError
from lark_store.maintenance.check.catalog import check_catalog
from lark_store.maintenance.check.corrections import check_corrections
from lark_store.maintenance.check.files import check_checkpoints, check_files, check_locks, check_snapshots
from lark_store.maintenance.check.findings import Finding
from lark_store.maintenance.check.frozen_store import FrozenStore, freeze
from lark_store.maintenance.check.indices import check_indices
from lark_store.maintenance.check.measured import check_eif, check_probes
from lark_store.maintenance.check.rows import check_embeddings, check_failures, check_samples, check_scores
from lark_store.maintenance.check.sketches import check_ingest_runs, check_sketches
from lark_store.results import Progress
from lark_store.schema.column_types import UnreadableValueError
from lark_store.schema.faults import FAULTS, first_line, is_panic
from lark_store.schema.locks import maintenance, paused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from lark_store.results import OnProgress
    from lark_store.schema.database import Database
    from lark_store.schema.locks import Pause


def check(db: Database, *, deep: bool, on_progress: OnProgress | None = None) -> list[Finding]:
    """Check the store's current state; see `Store.db_check`. Other work may continue meanwhile."""
    with maintenance(db.location):
        catalog_findings = list(check_catalog(db.location))
        with paused(db.location) as pause:
            store = _frozen(db, pause, catalog_findings, deep=deep)
        return _combine(catalog_findings, check_frozen(store, on_progress) if store else [])


def check_alone(db: Database, pause: Pause, *, on_progress: OnProgress | None = None) -> list[Finding]:
    """Check the store while the caller has exclusive access."""
    catalog_findings = list(check_catalog(db.location))
    store = _frozen(db, pause, catalog_findings)
    return _combine(catalog_findings, check_frozen(store, on_progress) if store else [])


def _combine(catalog_findings: list[Finding], table_findings: list[Finding]) -> list[Finding]:
    """Return all findings, without repairs of tables if the catalog is damaged."""
    if any(finding.what == "catalog" for finding in catalog_findings):
        table_findings = [replace(finding, repair=None) for finding in table_findings]
    return catalog_findings + table_findings


def _frozen(db: Database, pause: Pause, findings: list[Finding], *, deep: bool = False) -> FrozenStore | None:
    try:
        return freeze(db, pause, deep=deep)
    except UnreadableValueError:
        return None  # reported by `check_catalog`
    except (DatabaseError, sqlite3.DatabaseError) as error:
        reason = str(getattr(error, "orig", error))
        if "locked" in reason:
            raise StoreBusyError("the catalog is locked by writers", "run the command again") from error
        if not any(finding.what == "catalog" for finding in findings):
            findings.append(Finding("error", "catalog", "catalog", 1, f"{reason}; restore it from a backup"))
        return None


@dataclass(frozen=True)
class Check:
    """A check of a frozen store: the part it checks, and the tables without which it is skipped."""

    part: str
    run: Callable[[FrozenStore], Iterable[Finding]]
    tables: frozenset[str] = frozenset()


# In this order: later checks use the samples' keys and the counts of rows found by earlier ones.
CHECKS = (
    Check("files", check_files),
    Check("snapshots", check_snapshots),
    Check("locks", check_locks),
    Check("checkpoints", check_checkpoints),
    Check("corrections", check_corrections),
    Check("samples", check_samples, frozenset({"samples"})),
    Check("sketches", check_sketches),
    Check("ingest runs", check_ingest_runs),
    Check("embeddings", check_embeddings),
    Check("failures", check_failures, frozenset({"failures"})),
    Check("scores", check_scores, frozenset({"influence", "source_influence"})),
    Check("probes", check_probes, frozenset({"probes"})),
    Check("measured influence", check_eif, frozenset({"eif"})),
    Check("indices", check_indices),
)


def check_frozen(store: FrozenStore, on_progress: OnProgress | None = None) -> list[Finding]:
    """Return all findings of a frozen store, catalogs excepted."""
    findings: list[Finding] = []
    tables = set(store.vectors.table_names())
    for i, step in enumerate(CHECKS):
        if on_progress:
            on_progress(Progress(f"checking {step.part}", i, len(CHECKS)))
        if step.tables <= tables:
            findings += _guarded(step, store)
    if on_progress:
        on_progress(Progress("checked", len(CHECKS), len(CHECKS)))
    return findings


def _guarded(step: Check, store: FrozenStore) -> Iterator[Finding]:
    """Yield a check's findings; an error on corrupt values becomes a finding too."""
    try:
        yield from step.run(store)
    except (*FAULTS, *_VALUE_ERRORS) as error:
        yield Finding("error", "unreadable", step.part, 1, f"{first_line(error)}; restore it from a backup")
    except BaseException as error:
        if not is_panic(error):
            raise
        yield Finding("error", "unreadable", step.part, 1, f"{first_line(error)}; restore it from a backup")


_VALUE_ERRORS = (KeyError, TypeError, AttributeError, ArithmeticError, pl.exceptions.PolarsError)
