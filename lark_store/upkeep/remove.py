"""Removal of samples, sources and checkpoints, in an order that may be cut off anywhere.

What names the removal, the sample's own row or the catalog's row of the source or checkpoint, goes last. So a removal
that was killed is there to be run again, and does what is left. Before it, in this order:

1. The catalog, in one transaction: score runs that depend on what goes are `superseded`, and where a source or
   checkpoint goes its ingest runs too. From here on no answer is made of them: readers take `done` runs only.
2. Sketches, embeddings, failures and influence rows, a commit per table. A reader sees a table before or after its
   commit. A sample between the two has no sketch, as one that was not ingested yet: the truth, should the removal end
   here. Then the next ingest would sketch it again (and take up what is left of superseded ingest runs).
3. The counts of ingest runs that stay; or the files of a checkpoint's corrections, and the catalog's rows of runs
   that go. Rows of runs are deleted only when no vector row has their number, since SQLite gives the number of a
   deleted row to the next.

Of a searched group that lost a sample the maximum, mean and ranks are others, and a query set that lost a query has
another count: the score runs of both are superseded, and the next `attribute` scores them again.

All of it is done behind `locks.removing`: no ingest, scoring or adding that touches the name is under way.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import polars as pl
from sqlalchemy import and_, delete, func, or_, select

from lark_store.errors import InputError, NameUnknownError
from lark_store.schema.catalog import Checkpoint, CheckpointMetric, Correction, IngestRun, ScoreRun, Source
from lark_store.schema.corrections import discard
from lark_store.schema.database import Database, find
from lark_store.schema.locks import removing
from lark_store.schema.retry import retried
from lark_store.schema.vectors import sketch_table, where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement

REPORT = {"kind": pl.String, "table": pl.String, "rows": pl.Int64}
_IDS_FOR_HINT = 100_000
_Group = tuple[str, int, int, int]  # fingerprint and the ids of checkpoint, source and variant


def remove_samples(db: Database, source: str, sample_ids: Sequence[str], *, dry_run: bool) -> pl.DataFrame:
    """Remove samples of a source; see `Store.sample_remove`."""
    ids = list(dict.fromkeys(sample_ids))
    if not ids:
        raise InputError("no sample is named", "name the ids of the samples that are to go")
    _check_ids(db, source, ids)
    sweep = _Sweep(db, dry_run=dry_run)
    if dry_run:
        _forget(sweep, source, ids)
        sweep.delete("sample", "samples", where(source=source, sample_id=ids))
        return sweep.report()
    with removing(db.location, "source", source):
        _forget(sweep, source, ids)
        sweep.delete("sample", "samples", where(source=source, sample_id=ids))
    return sweep.report()


def forget_samples(db: Database, source: str, ids: list[str]) -> None:
    """Remove all that was made of samples, but not the samples: they are about to change. Behind `removing`."""
    _forget(_Sweep(db, dry_run=False), source, ids)


def remove_source(db: Database, name: str, *, dry_run: bool) -> pl.DataFrame:
    """Remove a source and all that was made of it; see `Store.source_remove`."""
    return _remove_named(db, Source, name, dry_run=dry_run)


def remove_checkpoint(db: Database, name: str, *, dry_run: bool) -> pl.DataFrame:
    """Remove a checkpoint and all that was made at it; see `Store.checkpoint_remove`."""
    return _remove_named(db, Checkpoint, name, dry_run=dry_run)


class _Sweep:
    """Counts what goes, and makes it go unless it is a dry run."""

    def __init__(self, db: Database, *, dry_run: bool) -> None:
        self.db, self.dry_run = db, dry_run
        self.rows: list[tuple[str, str, int]] = []

    def count(self, kind: str, table: str, rows: int) -> None:
        """Put a line into the report."""
        if rows:
            self.rows.append((kind, table, rows))

    def delete(self, kind: str, table: str, condition: str) -> None:
        """Delete the rows of a Lance table that fulfil a condition, in one commit."""
        n = int(self.db.vectors.table(table).count_rows(condition))
        self.count(kind, table, n)
        if n and not self.dry_run:
            retried(lambda: self.db.vectors.table(table).delete(condition), f"rows of `{table}` can't be removed")

    def delete_scores(self, runs: list[int]) -> None:
        """Delete the rows of score runs that nothing reads any more."""
        self.delete("influence", "influence", where(score_run=runs))
        self.delete("source influence", "source_influence", where(score_run=runs))

    def report(self) -> pl.DataFrame:
        """Return what went, or would go."""
        return pl.DataFrame(self.rows, schema=REPORT, orient="row")


def _check_ids(db: Database, source: str, ids: list[str]) -> None:
    with db.session() as session:
        find(session, Source, source)
    found = set(db.vectors.read("samples", ["sample_id"], where(source=source, sample_id=ids))["sample_id"])
    missing = next((sample_id for sample_id in ids if sample_id not in found), None)
    if missing is None:
        return
    known: list[str] = []
    for batch in db.vectors.scan("samples", ["sample_id"], where(source=source)):
        known += batch.column("sample_id").to_pylist()
        if len(known) >= _IDS_FOR_HINT:
            break
    error = NameUnknownError.of("sample", missing, known, "the source is empty")
    raise NameUnknownError(f"{error.fact} in source `{source}`; nothing was removed", error.hint)


# --- samples -------------------------------------------------------------------------------------------------------


def _forget(sweep: _Sweep, source: str, ids: list[str]) -> None:
    db, chosen = sweep.db, where(source=source, sample_id=ids)
    runs = _supersede(sweep, source, _touched(db, source, ids))
    for table in db.vectors.sketch_tables():
        sweep.delete("sketch", table, chosen)
    _delete_embeddings(sweep, chosen)
    sweep.delete("failure", "failures", chosen)
    sweep.delete_scores(runs)
    if not sweep.dry_run:
        _count_again(db, source)


def _delete_embeddings(sweep: _Sweep, condition: str) -> None:
    for table in sweep.db.vectors.embedding_tables():
        sweep.delete("embedding", table, condition)


def _touched(db: Database, source: str, ids: list[str]) -> list[_Group]:
    """Return the groups in which one of the samples has a sketch."""
    with db.session() as session:
        source_id = find(session, Source, source).id
        runs = list(session.scalars(select(IngestRun).filter_by(source_id=source_id)))
        groups = {
            (run.fingerprint, run.checkpoint_id, source_id, run.variant_id): (run.checkpoint.name, run.variant.name)
            for run in runs
        }
    touched = []
    for group, (checkpoint, variant) in groups.items():
        table = sketch_table(group[0])
        rows = where(source=source, checkpoint=checkpoint, variant=variant, sample_id=ids)
        if db.vectors.has(table) and db.vectors.table(table).count_rows(rows):
            touched.append(group)
    return touched


def _supersede(sweep: _Sweep, source: str, touched: list[_Group]) -> list[int]:
    """Make the score runs of the touched groups superseded.

    Returns the runs of this source whose rows nothing reads now: these and those that were superseded before.
    """
    with sweep.db.session() as session:
        source_id = find(session, Source, source).id
        of_source = or_(ScoreRun.source_id == source_id, ScoreRun.queries_id == source_id)
        runs = list(session.scalars(select(ScoreRun).where(of_source)))
        stale = [run for run in runs if run.status != "superseded" and not _groups(run).isdisjoint(touched)]
        dead = [run.id for run in runs if run.status == "superseded" or run in stale]
        sweep.count("score run, superseded", "score_run", len(stale))
        if not sweep.dry_run:
            for run in stale:
                run.status = "superseded"
    return dead


def _groups(run: ScoreRun) -> set[_Group]:
    return {
        (run.fingerprint, run.checkpoint_id, run.source_id, run.variant_id),
        (run.fingerprint, run.query_checkpoint_id, run.queries_id, run.query_variant_id),
    }


def _count_again(db: Database, source: str) -> None:
    """Set the counts of a source's ingest runs to the rows that they have; one scan, however many runs there were."""
    with db.session() as session:
        source_id = find(session, Source, source).id
        fingerprints = set(session.scalars(select(IngestRun.fingerprint).filter_by(source_id=source_id)))
    tables = {sketch_table(fingerprint) for fingerprint in fingerprints}
    n_sketched = _rows_of_runs(db, [name for name in tables if db.vectors.has(name)], source)
    n_failed = _rows_of_runs(db, ["failures"], source)
    with db.session() as session:
        for run in session.scalars(select(IngestRun).filter_by(source_id=source_id)):
            run.n_sketched, run.n_failed = n_sketched[run.id], n_failed[run.id]


def _rows_of_runs(db: Database, tables: list[str], source: str) -> Counter[int]:
    counts: Counter[int] = Counter()
    for table in tables:
        for batch in db.vectors.scan(table, ["ingest_run"], where(source=source)):
            counts.update(batch.column("ingest_run").to_pylist())
    return counts


# --- sources and checkpoints ---------------------------------------------------------------------------------------


def _remove_named(db: Database, kind: type[Source | Checkpoint], name: str, *, dry_run: bool) -> pl.DataFrame:
    with db.session() as session:
        find(session, kind, name)
    sweep = _Sweep(db, dry_run=dry_run)
    if dry_run:
        _remove(sweep, kind, name)
    else:
        with removing(db.location, kind.__tablename__, name):
            _remove(sweep, kind, name)
    return sweep.report()


def _remove(sweep: _Sweep, kind: type[Source | Checkpoint], name: str) -> None:
    db, of_name = sweep.db, where(**{kind.__tablename__: name})
    with db.session() as session:
        found = find(session, kind, name)
        ingests, scores = _runs_of(found)
        score_runs = list(session.scalars(select(ScoreRun).where(scores)))
        if not sweep.dry_run:
            for score_run in score_runs:
                score_run.status = "superseded"
            for ingest_run in session.scalars(select(IngestRun).where(ingests)):
                ingest_run.status, ingest_run.n_sketched, ingest_run.n_failed = "superseded", 0, 0
    for table in db.vectors.sketch_tables():
        sweep.delete("sketch", table, of_name)
    sweep.delete("failure", "failures", of_name)
    sweep.delete_scores([run.id for run in score_runs])
    if isinstance(found, Source):
        _delete_embeddings(sweep, of_name)
        sweep.delete("sample", "samples", of_name)
    elif not sweep.dry_run:
        _discard_corrections(sweep, found)
    _remove_rows(sweep, found)


def _discard_corrections(sweep: _Sweep, checkpoint: Checkpoint) -> None:
    with sweep.db.session() as session:
        rows = list(session.scalars(select(Correction).filter_by(checkpoint_id=checkpoint.id)))
    for row in rows:
        discard(sweep.db, row.sha256, row.id)


def _runs_of(found: Source | Checkpoint) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Return the conditions that select the ingest runs and the score runs in which something takes part."""
    if isinstance(found, Source):
        return IngestRun.source_id == found.id, or_(ScoreRun.source_id == found.id, ScoreRun.queries_id == found.id)
    at = or_(ScoreRun.checkpoint_id == found.id, ScoreRun.query_checkpoint_id == found.id)
    return IngestRun.checkpoint_id == found.id, at


def _remove_rows(sweep: _Sweep, found: Source | Checkpoint) -> None:
    """Delete the catalog's rows, in one transaction."""
    ingests, scores = _runs_of(found)
    kind: Any = type(found)
    doomed: list[tuple[str, Any, ColumnElement[bool]]] = [
        ("score run", ScoreRun, scores),
        ("ingest run", IngestRun, ingests),
        (kind.__tablename__, kind, and_(kind.id == found.id)),
    ]
    if isinstance(found, Checkpoint):
        doomed.insert(2, ("metric", CheckpointMetric, CheckpointMetric.checkpoint_id == found.id))
        doomed.insert(2, ("correction", Correction, Correction.checkpoint_id == found.id))
    with sweep.db.session() as session:
        for label, table, condition in doomed:
            n = session.scalar(select(func.count()).select_from(table).where(condition)) or 0
            sweep.count(label, table.__tablename__, n)
            if not sweep.dry_run:
                session.execute(delete(table).where(condition))
