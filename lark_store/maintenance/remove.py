"""Remove samples, sources and checkpoints, in an order safe to interrupt anywhere.

The row of the target (the sample, or the catalog row of the source or checkpoint) is deleted last, so that a
killed removal can be run again to finish. Before that, in this order:

1. Catalog, in one transaction: dependent score runs become `superseded`, and for a source or checkpoint its ingest runs
   too. Readers use only `done` runs, so no result includes them from here on.
2. Sketches, embeddings, failures and influence rows, one commit per table. A sample in between has no sketch, as if it
   was not ingested. If the removal ends here, the next ingest sketches it again (reusing rows of superseded runs).
3. The counts of remaining ingest runs; or a checkpoint's correction files, the catalog rows of its runs and, before the
   row of the checkpoint, its files if they are in the store. Run rows are deleted only when no vector row has their id,
   since SQLite reuses the ids of deleted rows.

Probes and measured influence go like sketches: rows of a removed sample, or whole runs. The rest of a run stays, since
its rows don't depend on each other.

A removed sample changes the maximum, mean and ranks of its group, and a removed query changes the count of its query
set: the score runs of both are superseded, and the next `attribute` scores them again. The same holds for scores that
depend on everything searched (`hybrid`, `whitened`, sums) if one of their sources or checkpoints is removed.

All steps run under `locks.removing`: no other work that touches the name is running.
"""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import polars as pl
from sqlalchemy import and_, delete, func, literal, or_, select

from lark_store.core.names import SUM_SEPARATOR
from lark_store.core.retry import retry
from lark_store.errors import InputError, NameUnknownError
from lark_store.modeling.save_objects import saved_folder
from lark_store.schema.catalog import (
    Checkpoint,
    CheckpointMetric,
    Correction,
    EifRun,
    IngestRun,
    ProbeRun,
    ScoreRun,
    Source,
)
from lark_store.schema.database import Database, find
from lark_store.schema.factor_files import discard, drafts
from lark_store.schema.locks import removing
from lark_store.schema.score_inputs import inputs
from lark_store.schema.table_schemas import sketch_table
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.orm import Session

REPORT = {"kind": pl.String, "table": pl.String, "rows": pl.Int64}
_IDS_FOR_HINT = 100_000
_Group = tuple[str, int, int, int]  # fingerprint and the ids of checkpoint, source and variant


def remove_samples(db: Database, source: str, sample_ids: Sequence[str], *, dry_run: bool) -> pl.DataFrame:
    """Remove samples of a source; see `Store.sample_remove`."""
    ids = list(dict.fromkeys(sample_ids))
    if not ids:
        raise InputError("no sample ids were given", "give the ids of the samples to remove")
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
    """Remove everything derived from samples that are about to change. Call it under `removing`."""
    _forget(_Sweep(db, dry_run=False), source, ids)


def remove_source(db: Database, name: str, *, dry_run: bool) -> pl.DataFrame:
    """Remove a source and everything derived from it; see `Store.source_remove`."""
    return _remove_named(db, Source, name, dry_run=dry_run)


def remove_checkpoint(db: Database, name: str, *, dry_run: bool) -> pl.DataFrame:
    """Remove a checkpoint and everything derived from it; see `Store.checkpoint_remove`."""
    return _remove_named(db, Checkpoint, name, dry_run=dry_run)


class _Sweep:
    """Counts the removed rows and, unless it is a dry run, deletes them."""

    def __init__(self, db: Database, *, dry_run: bool) -> None:
        self.db, self.dry_run = db, dry_run
        self.rows: list[tuple[str, str, int]] = []

    def count(self, kind: str, table: str, rows: int) -> None:
        """Add a line to the report."""
        if rows:
            self.rows.append((kind, table, rows))

    def delete(self, kind: str, table: str, condition: str) -> None:
        """Delete the rows of a Lance table that match a condition, in one commit."""
        n = int(self.db.vectors.table(table).count_rows(condition))
        self.count(kind, table, n)
        if n and not self.dry_run:
            retry(lambda: self.db.vectors.table(table).delete(condition), f"rows of `{table}` can't be removed")

    def delete_scores(self, runs: list[int]) -> None:
        """Delete the rows of superseded score runs."""
        self.delete("influence", "influence", where(score_run=runs))
        self.delete("source influence", "source_influence", where(score_run=runs))

    def report(self) -> pl.DataFrame:
        """Return the number of removed rows, or of rows to remove in a dry run."""
        return pl.DataFrame(self.rows, schema=REPORT, orient="row")


def _check_ids(db: Database, source: str, ids: list[str]) -> None:
    with db.session() as session:
        find(session, Source, source)
    existing = set(db.vectors.read("samples", ["sample_id"], where(source=source, sample_id=ids))["sample_id"])
    missing = next((sample_id for sample_id in ids if sample_id not in existing), None)
    if missing is None:
        return
    candidates: list[str] = []
    for batch in db.vectors.scan("samples", ["sample_id"], where(source=source)):
        candidates += batch.column("sample_id").to_pylist()
        if len(candidates) >= _IDS_FOR_HINT:
            break
    error = NameUnknownError.of("sample", missing, candidates, "the source is empty")
    raise NameUnknownError(f"{error.fact} in source `{source}`; nothing was removed", error.hint)


# --- samples -------------------------------------------------------------------------------------------------------


def _forget(sweep: _Sweep, source: str, ids: list[str]) -> None:
    db, condition = sweep.db, where(source=source, sample_id=ids)
    runs = _supersede(sweep, source, _touched(db, source, ids))
    for table in db.vectors.sketch_tables():
        sweep.delete("sketch", table, condition)
    _delete_embeddings(sweep, condition)
    sweep.delete("failure", "failures", condition)
    sweep.delete("probe", "probes", condition)
    sweep.delete("measured influence", "eif", f"({condition}) OR ({where(queries=source, query_id=ids)})")
    sweep.delete_scores(runs)
    if not sweep.dry_run:
        _recount(db, source)
        recount_measured(db, source)


def _delete_embeddings(sweep: _Sweep, condition: str) -> None:
    for table in sweep.db.vectors.embedding_tables():
        sweep.delete("embedding", table, condition)


def _touched(db: Database, source: str, ids: list[str]) -> list[_Group]:
    """Return the groups in which any of the samples has a sketch."""
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
    """Supersede the score runs of the touched groups.

    Returns all superseded runs of this source, whose rows are not read any more.
    """
    with sweep.db.session() as session:
        source_id = find(session, Source, source).id
        uses_source = or_(ScoreRun.source_id == source_id, ScoreRun.queries_id == source_id)
        runs = list(session.scalars(select(ScoreRun).where(uses_source)))
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


def _recount(db: Database, source: str) -> None:
    """Set the counts of a source's ingest runs to their actual rows, in one scan for all runs."""
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


def recount_measured(db: Database, source: str | None = None) -> None:
    """Set the counts of probe and EIF runs, or of those of one source, to their actual rows."""
    with db.session() as session:
        source_id = None if source is None else find(session, Source, source).id
        probes, measured = select(ProbeRun), select(EifRun)
        if source_id is not None:
            probes = probes.filter_by(source_id=source_id)
            measured = measured.where(or_(EifRun.source_id == source_id, EifRun.queries_id == source_id))
        for run in session.scalars(probes):
            rows = db.vectors.read("probes", ["reason"], where(probe_run=run.id))
            run.n_failed = len(rows) - rows["reason"].null_count()
            run.n_probed = len(rows) - run.n_failed
        for eif in session.scalars(measured):
            rows = db.vectors.read("eif", ["sample_id", "query_id"], where(eif_run=eif.id))
            eif.n_samples, eif.n_queries = rows["sample_id"].n_unique(), rows["query_id"].n_unique()


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
    db, condition = sweep.db, where(**{kind.__tablename__: name})
    with db.session() as session:
        target = find(session, kind, name)
        ingests, scores = _runs_of(target)
        score_runs = list(session.scalars(select(ScoreRun).where(scores)))
        score_runs += _computed_from(session, set(session.scalars(select(IngestRun.id).where(ingests))), score_runs)
        if not sweep.dry_run:
            for score_run in score_runs:
                score_run.status = "superseded"
            for ingest_run in session.scalars(select(IngestRun).where(ingests)):
                ingest_run.status, ingest_run.n_sketched, ingest_run.n_failed = "superseded", 0, 0
        measured = _supersede_measured(sweep, session, target)
    for table in db.vectors.sketch_tables():
        sweep.delete("sketch", table, condition)
    sweep.delete("failure", "failures", condition)
    sweep.delete("probe", "probes", where(probe_run=measured[ProbeRun]))
    sweep.delete("measured influence", "eif", where(eif_run=measured[EifRun]))
    sweep.delete_scores([run.id for run in score_runs])
    if isinstance(target, Source):
        _delete_embeddings(sweep, condition)
        sweep.delete("sample", "samples", condition)
    else:
        if not sweep.dry_run:
            _discard_corrections(sweep, target)
        _remove_saved_model(sweep, target)
    _remove_rows(sweep, target)


def _supersede_measured(
    sweep: _Sweep, session: Session, target: Source | Checkpoint
) -> dict[type[ProbeRun | EifRun], list[int]]:
    """Supersede the probe and EIF runs of a source or checkpoint; returns their ids."""
    ids: dict[type[ProbeRun | EifRun], list[int]] = {}
    for kind, condition in _measured_runs_of(target).items():
        runs: list[Any] = list(session.scalars(select(kind).where(condition)))
        ids[kind] = [run.id for run in runs]
        for run in runs if not sweep.dry_run else ():
            run.status = "superseded"
    return ids


def _measured_runs_of(target: Source | Checkpoint) -> dict[type[ProbeRun | EifRun], ColumnElement[bool]]:
    """Return the conditions for the probe and EIF runs of a source or checkpoint."""
    if isinstance(target, Source):
        measured = or_(EifRun.source_id == target.id, EifRun.queries_id == target.id)
        return {ProbeRun: ProbeRun.source_id == target.id, EifRun: measured}
    return {ProbeRun: ProbeRun.checkpoint_id == target.id, EifRun: EifRun.checkpoint_id == target.id}


def _remove_saved_model(sweep: _Sweep, checkpoint: Checkpoint) -> None:
    """Remove the files of a model that was saved in the store; all others belong to the user."""
    folder = saved_folder(sweep.db.location, checkpoint.name)
    if folder is None or checkpoint.path != str(folder) or not folder.is_dir():
        return
    sweep.count("saved model", "checkpoints", 1)
    if not sweep.dry_run:
        shutil.rmtree(folder)


def _computed_from(session: Session, ingests: set[int], listed: list[ScoreRun]) -> list[ScoreRun]:
    """Return more committed score runs that used the ingest runs, such as whitened scores of another source.

    The catalog may reuse the ids of removed ingest runs, so no score run may keep them in its recipe.
    """
    done = session.scalars(select(ScoreRun).filter_by(status="done"))
    return [run for run in done if run not in listed and not ingests.isdisjoint(inputs(run))]


def _discard_corrections(sweep: _Sweep, checkpoint: Checkpoint) -> None:
    with sweep.db.session() as session:
        rows = list(session.scalars(select(Correction).filter_by(checkpoint_id=checkpoint.id)))
    for row in rows:
        discard(sweep.db, row.sha256, row.id)
    for name in drafts(sweep.db.vectors, checkpoint.id):
        sweep.db.vectors.files.delete_file(name)


def _runs_of(target: Source | Checkpoint) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Return the conditions for the ingest runs and the score runs of a source or checkpoint."""
    if isinstance(target, Source):
        return IngestRun.source_id == target.id, or_(ScoreRun.source_id == target.id, ScoreRun.queries_id == target.id)
    summed = literal(SUM_SEPARATOR) + ScoreRun.over_checkpoints + SUM_SEPARATOR
    is_summed = summed.contains(f"{SUM_SEPARATOR}{target.name}{SUM_SEPARATOR}", autoescape=True)
    scores = or_(ScoreRun.checkpoint_id == target.id, ScoreRun.query_checkpoint_id == target.id, is_summed)
    return IngestRun.checkpoint_id == target.id, scores


def _remove_rows(sweep: _Sweep, target: Source | Checkpoint) -> None:
    """Delete the catalog's rows in one transaction."""
    ingests, scores = _runs_of(target)
    kind: Any = type(target)
    measured = _measured_runs_of(target)
    deletions: list[tuple[str, Any, ColumnElement[bool]]] = [
        ("probe run", ProbeRun, measured[ProbeRun]),
        ("EIF run", EifRun, measured[EifRun]),
        ("score run", ScoreRun, scores),
        ("ingest run", IngestRun, ingests),
        (kind.__tablename__, kind, and_(kind.id == target.id)),
    ]
    if isinstance(target, Checkpoint):
        deletions.insert(-1, ("metric", CheckpointMetric, CheckpointMetric.checkpoint_id == target.id))
        deletions.insert(-1, ("correction", Correction, Correction.checkpoint_id == target.id))
    with sweep.db.session() as session:
        for label, table, condition in deletions:
            n = session.scalar(select(func.count()).select_from(table).where(condition)) or 0
            sweep.count(label, table.__tablename__, n)
            if not sweep.dry_run:
                session.execute(delete(table).where(condition))
