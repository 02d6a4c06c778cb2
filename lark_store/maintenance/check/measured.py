"""Row checks of probes and measured influence: each row belongs to a run, and each run has the rows that it counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.maintenance.check.checksums import check_checksums
from lark_store.maintenance.check.findings import Finding, Repair
from lark_store.maintenance.check.frozen_store import FrozenStore, duplicates, hashes, stream
from lark_store.maintenance.check.rows import row_deletion, rows_per_run
from lark_store.maintenance.delete_rows import deletion
from lark_store.maintenance.remove import recount_measured
from lark_store.schema.catalog import EifRun, ProbeRun
from lark_store.schema.faults import FAULTS, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lark_store.schema.database import Database

_SAMPLE, _QUERY = ["source", "sample_id"], ["queries", "query_id"]


def check_probes(store: FrozenStore) -> Iterator[Finding]:
    """Yield probes that changed, are repeated, or belong to no run or sample, and runs with a wrong count."""
    try:
        yield from _check_rows(store, "probes", ["probe_run", "sample_id"], store.probe_runs, [_SAMPLE])
        counts = rows_per_run(store, "probes", "probe_run")
        yield from _check_runs(
            store, store.probe_runs, {r.id: r.n_probed + r.n_failed for r in _done(store.probe_runs)}, counts
        )
    except FAULTS as error:
        yield Finding("error", "unreadable", "probes", 1, first_line(error))


def check_eif(store: FrozenStore) -> Iterator[Finding]:
    """Yield measured influence that changed, is repeated, or belongs to no run or sample, and incomplete runs."""
    try:
        yield from _check_rows(store, "eif", ["eif_run", "sample_id", "query_id"], store.eif_runs, [_SAMPLE, _QUERY])
        counts = rows_per_run(store, "eif", "eif_run")
        yield from _check_runs(
            store, store.eif_runs, {r.id: r.n_samples * r.n_queries for r in _done(store.eif_runs)}, counts
        )
    except FAULTS as error:
        yield Finding("error", "unreadable", "eif", 1, first_line(error))


def _done(runs: Mapping[int, Any]) -> list[Any]:
    return [run for run in runs.values() if run.status == "done"]


def _check_rows(
    store: FrozenStore, table: str, keys: list[str], runs: Mapping[int, object], samples: list[list[str]]
) -> Iterator[Finding]:
    yield from check_checksums(store, table, "measured values", "delete the rows; the same command measures them again")
    extra = duplicates(store.vectors, table, keys, []).sort("_rowid").filter(~pl.struct(keys).is_first_distinct())
    if len(extra):
        repair = deletion(table, extra["_rowid"].to_numpy(), "delete all but one")
        yield Finding("error", "duplicate key", table, len(extra), "repeated rows", repair)
    for run, n in rows_per_run(store, table, keys[0]).items():
        if run not in runs:
            detail = "their run does not exist; a new run may get its id"
            yield Finding("error", "orphan rows", f"{table} of run {run}", n, detail, row_deletion(table, keys[0], run))
    if store.samples is not None:
        yield from _orphans(store, table, samples)


def _orphans(store: FrozenStore, table: str, samples: list[list[str]]) -> Iterator[Finding]:
    """Yield rows whose sample or query is not in the store."""
    assert store.samples is not None
    ids = [np.empty(0, np.uint64)]
    for frame in stream(store.vectors, table, [name for names in samples for name in names]):
        is_known = np.ones(len(frame), bool)
        for names in samples:
            renamed = frame.select(names).rename(dict(zip(names, _SAMPLE, strict=True)))
            is_known &= np.isin(hashes(renamed, _SAMPLE), store.samples)
        ids.append(frame["_rowid"].to_numpy()[~is_known])
    wrong = np.concatenate(ids)
    if len(wrong):
        repair = deletion(table, wrong, "delete the rows")
        yield Finding("error", "sample", table, len(wrong), "rows of samples that are not in the store", repair)


def _check_runs(
    store: FrozenStore,
    runs: Mapping[int, ProbeRun] | Mapping[int, EifRun],
    expected: dict[int, int],
    counts: dict[int, int],
) -> Iterator[Finding]:
    """Yield runs that count other rows than they have, and uncommitted or superseded runs."""
    for run in runs.values():
        n = counts.get(run.id, 0)
        if run.status == "done" and expected[run.id] != n:
            detail = f"the run counts {expected[run.id]} rows, its table has {n}"
            yield Finding("error", "count", store.label(run), abs(expected[run.id] - n), detail, _reopening(run))
        elif run.status in {"running", "interrupted", "failed"} and not store.is_at_work(run):
            detail = f"{run.status}, without a running process: its rows are not read until the same command resumes it"
            yield Finding("note", "stale run", store.label(run), n, detail)
        elif run.status == "superseded" and n and not store.pause.works:
            table, column = ("probes", "probe_run") if isinstance(run, ProbeRun) else ("eif", "eif_run")
            detail = "their run is superseded; they are never read"
            yield Finding("warning", "orphan rows", store.label(run), n, detail, row_deletion(table, column, run.id))


def _reopening(run: ProbeRun | EifRun) -> Repair:
    """Return the repair of a wrong count: count probes again, but reopen an EIF run, which must be complete."""

    def reopen(db: Database) -> None:
        if isinstance(run, ProbeRun):
            recount_measured(db)
        else:
            with db.session() as session:
                session.get_one(EifRun, run.id).status = "interrupted"

    return Repair("count again" if isinstance(run, ProbeRun) else "reopen the run; `eif` completes it", reopen)
