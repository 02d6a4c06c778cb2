"""`attribute`: score every group that has new sketches, and commit influence rows group by group.

A group's rows carry their score run. Its commit, in the catalog, makes the new run current and the one before it
superseded in one transaction; readers join on current runs, so they never see half a group or one twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from sqlalchemy import select

from lark_store.errors import InputError
from lark_store.query.scoring import GroupScores, load_queries, score_group
from lark_store.schema.catalog import ScoreRun, now
from lark_store.schema.records import OnProgress, Progress
from lark_store.schema.vectors import INFLUENCE, SOURCE_INFLUENCE, where

if TYPE_CHECKING:
    from lark_store.query.groups import Group, Question
    from lark_store.schema.database import Database

DEFAULT_HITS = 100
DEFAULT_MEMORY = 1 << 30
_REPORT = {
    "checkpoint": pl.String,
    "queries": pl.String,
    "source": pl.String,
    "variant": pl.String,
    "method": pl.String,
    "n_queries": pl.Int64,
    "n_samples": pl.Int64,
    "status": pl.String,
    "score_run": pl.Int64,
}


@dataclass(frozen=True)
class _Job:
    """One group to score against one set of queries."""

    question: Question
    group: Group
    hits: int

    @property
    def ids(self) -> dict[str, Any]:
        """The columns that say what is scored: two runs that agree on them answer the same question."""
        asked = self.question.queries
        return {
            "method": self.question.method,
            "fingerprint": self.group.fingerprint,
            "sketcher_id": self.group.sketcher.id,
            "checkpoint_id": self.group.checkpoint.id,
            "query_checkpoint_id": asked.checkpoint.id,
            "queries_id": asked.source.id,
            "query_variant_id": asked.variant.id,
            "source_id": self.group.source.id,
            "variant_id": self.group.variant.id,
        }

    @property
    def recipe(self) -> dict[str, Any]:
        """What the answer depends on besides: a run with another recipe is out of date."""
        asked = self.question.queries
        return {
            "hits": self.hits,
            "ingest_runs": list(self.group.runs),
            "query_ingest_runs": list(asked.runs),
        }


def attribute(
    db: Database,
    questions: list[Question],
    *,
    hits: int = DEFAULT_HITS,
    memory: int = DEFAULT_MEMORY,
    on_progress: OnProgress | None = None,
) -> pl.DataFrame:
    """Score what changed; see `Store.attribute`."""
    if hits < 1:
        raise InputError(f"{hits} hits per group are too few", "the default is 100")
    jobs = [_Job(question, group, hits) for question in questions for group in question.groups]
    rows = []
    for number, job in enumerate(jobs):
        if on_progress:
            on_progress(Progress(f"{job.group.checkpoint.name}: scoring {job.group.label}", number, len(jobs)))
        current = _current(db, job)
        run = current or _score(db, job, memory)
        names = (job.group.checkpoint.name, job.question.queries.source.name, job.group.source.name)
        status = "empty" if run.n_samples == 0 else "current" if current else "scored"
        facts = (job.group.variant.name, run.method, run.n_queries, run.n_samples, status, run.id)
        rows.append((*names, *facts))
    if any(row[7] == "scored" for row in rows):
        for name in ("influence", "source_influence"):
            db.vectors.refresh_indices(db.vectors.table(name))
    if on_progress and jobs:
        on_progress(Progress("scored", len(jobs), len(jobs)))
    return pl.DataFrame(rows, schema=_REPORT, orient="row")


def _current(db: Database, job: _Job) -> ScoreRun | None:
    """Return the committed run that answers the job, if no sketch was added since."""
    with db.session() as session:
        for run in session.scalars(select(ScoreRun).filter_by(**job.ids, status="done")):
            if run.recipe == job.recipe:
                return run
    return None


def _score(db: Database, job: _Job, memory: int) -> ScoreRun:
    how = {
        "recipe": job.recipe,
        "versions": {
            "lark-store": version("lark-store"),
            "torch": torch.__version__,
            "lancedb": version("lancedb"),
        },
        "device": f"cpu ({torch.get_num_threads()} threads)",
    }
    run = ScoreRun(**job.ids, **how, status="running")
    with db.session() as session:
        session.add(run)
    try:
        _write(db, job, run, memory)
    except BaseException as error:
        run.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        run.error, run.finished_at = f"{type(error).__name__}: {error}", now()
        with db.session() as session:
            session.merge(run)
        raise
    _commit(db, job, run)
    return run


def _write(db: Database, job: _Job, run: ScoreRun, memory: int) -> None:
    """Score block after block of queries, as many as `memory` bytes hold, and write their rows."""
    asked = job.question.queries
    ids = sorted(db.vectors.read(asked.table, ["sample_id"], asked.filter)["sample_id"])
    block = max(1, memory // (4 * asked.sketcher.k))
    for start in range(0, len(ids), block):
        some = load_queries(db.vectors, asked, ids[start : start + block])
        scores = score_group(db.vectors, job.group, some, job.question.method, job.hits)
        if scores is None:
            continue
        run.n_queries += len(some.ids)
        run.n_samples = scores.n
        keys = {"score_run": run.id, "checkpoint": job.group.checkpoint.name}
        keys |= {"source": job.group.source.name, "variant": job.group.variant.name}
        db.vectors.append(db.vectors.table("influence"), _influence_rows(keys, some.ids, scores))
        table = db.vectors.table("source_influence")
        run.lance_version = db.vectors.append(table, _source_rows(keys, some.ids, scores))


def _table(columns: dict[str, Any], schema: pa.Schema, n: int) -> pa.Table:
    full = {name: value if isinstance(value, np.ndarray | list) else [value] * n for name, value in columns.items()}
    return pa.table({name: full[name] for name in schema.names}, schema=schema)


def _influence_rows(keys: dict[str, Any], ids: list[str], scores: GroupScores) -> pa.Table:
    n_queries, hits = scores.top_scores.shape
    columns = keys | {
        "query_id": np.repeat(np.array(ids, dtype=object), hits),
        "sample_id": scores.top_ids.reshape(-1),
        "score": scores.top_scores.reshape(-1),
        "rank": np.tile(np.arange(1, hits + 1, dtype=np.int32), n_queries),
    }
    return _table(columns, INFLUENCE, n_queries * hits)


def _source_rows(keys: dict[str, Any], ids: list[str], scores: GroupScores) -> pa.Table:
    columns = keys | {
        "query_id": ids,
        "max": scores.max_Q,
        "argmax": scores.argmax,
        "mean": scores.mean_Q,
        "std": scores.std_Q,
        "n": scores.n,
    }
    return _table(columns, SOURCE_INFLUENCE, len(ids))


def _commit(db: Database, job: _Job, run: ScoreRun) -> None:
    """Make the run current and what it replaces superseded; then clear the rows that nothing reads any more.

    Of two processes that score the same at the same time, the one that began later wins.
    """
    same = select(ScoreRun).filter_by(**job.ids)
    run.finished_at = now()
    run.status = "done"
    with db.session() as session:
        mine = session.merge(run)
        session.flush()  # the write comes first and takes the lock: of two commits, the second sees the first
        newer = session.scalar(same.where(ScoreRun.id > run.id, ScoreRun.status == "done"))
        run.status = mine.status = "superseded" if newer else "done"
        old = [] if newer else list(session.scalars(same.where(ScoreRun.id < run.id, ScoreRun.status != "superseded")))
        for each in old:
            each.status = "superseded"
    dead = [each.id for each in old] or ([run.id] if newer else [])
    if dead:
        for name in ("influence", "source_influence"):
            db.vectors.table(name).delete(where(score_run=dead))
