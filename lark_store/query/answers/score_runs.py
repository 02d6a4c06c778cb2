"""Score runs in the catalog: find the run that answers a job, begin a new one, commit it.

Other processes may ingest and score the same groups meanwhile. So a commit holds the catalog's write lock and checks
its inputs: the ingest runs, the score run it extends, and the rows it covers. It never replaces a run committed
meanwhile over as many sketches. A run that fails these checks is discarded, and the caller scores again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from lark_store.core.retry import retry
from lark_store.schema.catalog import IngestRun, ScoreRun
from lark_store.schema.catalog_base import now
from lark_store.schema.database import lock_catalog
from lark_store.schema.locks import n_scoring
from lark_store.schema.score_inputs import has_rows, has_valid_inputs, inputs, query_groups, scored_groups
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from lark_store.query.select.resolve import Group, Question
    from lark_store.schema.database import Database

SCORE_TABLES = ("influence", "source_influence")
_ENDED = ("interrupted", "failed")
_AT_ONCE = 1_000
_Ingests = dict[int, IngestRun]


class ReplacedError(Exception):
    """Another process replaced an input of a score run."""


@dataclass
class Job:
    """One group to score for one set of queries: its run and, where sketches were only added, the previous run."""

    question: Question
    group: Group
    hits: int
    extra_recipe: dict[str, Any]  # inputs of the scores other than rows of the group
    run: ScoreRun | None = None
    before: ScoreRun | None = None

    @property
    def ids(self) -> dict[str, Any]:
        """The columns that identify the scored group and queries: runs with equal ids answer the same question."""
        queries = self.question.queries
        return {
            "method": self.question.method.name,
            "fingerprint": self.group.fingerprint,
            "sketcher_id": self.group.sketcher.id,
            "checkpoint_id": self.group.checkpoint.id,
            "query_checkpoint_id": queries.checkpoint.id,
            "queries_id": queries.source.id,
            "query_variant_id": queries.variant.id,
            "source_id": self.group.source.id,
            "variant_id": self.group.variant.id,
        }

    @property
    def recipe(self) -> dict[str, Any]:
        """All other inputs of the answer: a run with another recipe is out of date."""
        terms = self.question.terms
        recipe = {
            "hits": self.hits,
            "ingest_runs": list(self.group.runs),
            "query_ingest_runs": [run for term in terms if term.queries for run in term.queries.runs],
        }
        if self.question.method.over:
            recipe["over_checkpoints"] = self.question.over_checkpoints
            recipe["weights"] = {term.checkpoint.name: term.weight for term in terms}
        if not self.question.method.is_adding:  # the score depends on all searched rows
            recipe["with"] = sorted({run for term in terms for group in term.groups for run in group.runs})
        return recipe | self.extra_recipe

    def extends(self, run: ScoreRun) -> bool:
        """Tell whether a committed run differs from this job only by sketches added since."""
        if not self.question.method.is_adding:
            return False
        recipe, earlier = self.recipe, dict(run.recipe)
        added = set(recipe.pop("ingest_runs")) > set(earlier.pop("ingest_runs"))
        return added and recipe == earlier

    @property
    def new_group(self) -> Group:
        """The group, limited to the ingest runs not read yet."""
        already_read = set(self.before.recipe["ingest_runs"]) if self.before else set()
        return replace(self.group, runs=tuple(run for run in self.group.runs if run not in already_read))


def committed(db: Database) -> frozenset[int]:
    """Return the ids of all committed score runs."""
    with db.session() as session:
        return frozenset(session.scalars(select(ScoreRun.id).filter_by(status="done")))


def find_run(db: Database, job: Job) -> None:
    """Set the committed run that answers a job, or else the one to extend.

    Ignores a run that lacks rows of its ingest runs; that group is scored from scratch.
    """
    with db.session() as session:
        runs = list(session.scalars(select(ScoreRun).filter_by(**job.ids, status="done").order_by(ScoreRun.id)))
        ingests = _ingests(session, runs)
    for run in runs:
        if run.recipe == job.recipe and _is_whole(db, run, ingests):
            job.run, job.before = run, None
            return
        if job.extends(run) and _is_whole(db, run, ingests):
            job.before = run


def drop_empty(db: Database, jobs: list[Job]) -> None:
    """Clear the runs of jobs whose rows are gone, so that they are scored again."""
    runs = [job.run for job in jobs if job.run and job.run.n_samples]
    rows: Counter[int] = Counter()
    for batch in db.vectors.scan("source_influence", ["score_run"], where(score_run=[run.id for run in runs])):
        rows.update(batch.column("score_run").to_pylist())
    for job in jobs:
        if job.run in runs and rows[job.run.id] != job.run.n_queries:
            job.run = None


def _ingests(session: Session, runs: list[ScoreRun]) -> _Ingests:
    numbers = sorted(frozenset[int]().union(*map(inputs, runs)))
    runs_by_id: _Ingests = {}
    for start in range(0, len(numbers), _AT_ONCE):
        chunk = select(IngestRun).where(IngestRun.id.in_(numbers[start : start + _AT_ONCE]))
        runs_by_id |= {run.id: run for run in session.scalars(chunk)}
    return runs_by_id


def _is_whole(db: Database, run: ScoreRun, ingests: _Ingests) -> bool:
    """Tell whether a run covers all rows of its ingest runs, and these are unchanged."""
    if not has_valid_inputs(run, ingests):
        return False
    samples, queries = scored_groups(run, ingests), query_groups(run, ingests)
    if not samples or not has_rows(db.vectors, samples, run.n_samples):
        return False
    return run.n_samples == 0 or has_rows(db.vectors, queries, run.n_queries)


def begin(db: Database, jobs: list[Job], environment: dict[str, Any]) -> None:
    """Start a run for each job; `environment` has versions and device."""
    for job in jobs:
        summed = job.question.over_checkpoints
        job.run = ScoreRun(**job.ids, **environment, over_checkpoints=summed, recipe=job.recipe, status="running")
    with db.session() as session:
        session.add_all([job.run for job in jobs])


def close(db: Database, jobs: list[Job], status: str, error: str | None = None) -> None:
    """End the jobs' runs without a commit."""
    with db.session() as session:
        for job in jobs:
            assert job.run is not None
            job.run.status, job.run.error, job.run.finished_at = status, error, now()
            session.merge(job.run)


def discard(db: Database, jobs: list[Job]) -> None:
    """End the jobs' runs and delete their rows, to score again."""
    close(db, jobs, "superseded")
    _delete_rows(db, [job.run.id for job in jobs if job.run])
    for job in jobs:
        job.run = job.before = None


def commit(db: Database, job: Job, seen: frozenset[int]) -> bool:
    """Make a job's run current, supersede the runs it replaces, and delete rows no longer read.

    `seen` are the runs committed before the question was resolved. Returns False and discards the run if another
    process replaced one of its inputs, or meanwhile committed a run with as many inputs.
    """
    assert job.run is not None
    with db.session() as session:
        ingests = _ingests(session, [job.run])
    left = _left_running(db, job)
    if not _is_whole(db, job.run, ingests):
        discard(db, [job])
        return False
    with db.session() as session:
        lock_catalog(session)
        replaced = None if _is_stale(session, job, ingests, seen) else _replace(session, job, left)
    if replaced is None:
        discard(db, [job])
        return False
    _delete_rows(db, replaced)
    return True


def _is_stale(session: Session, job: Job, ingests: _Ingests, seen: frozenset[int]) -> bool:
    """Tell whether an input of a run was replaced. The catalog must be held."""
    run, before = job.run, job.before
    assert run is not None
    stored = session.get(ScoreRun, run.id)
    if stored is None or stored.status != "running":
        return True
    if before is not None:
        earlier = session.get(ScoreRun, before.id)
        if earlier is None or earlier.status != "done":
            return True
    ingests_now = _ingests(session, [run])
    if not has_valid_inputs(run, ingests_now) or any(
        ingests_now[i].n_sketched != old.n_sketched for i, old in ingests.items()
    ):
        return True
    concurrent = session.scalars(select(ScoreRun).filter_by(**job.ids, status="done"))
    return any(candidate.id not in seen and not inputs(candidate) < inputs(run) for candidate in concurrent)


def _replace(session: Session, job: Job, left: list[int]) -> list[int]:
    """Mark a run done and supersede the others, of running ones only those in `left`. Return the superseded ids."""
    run = job.run
    assert run is not None
    run.status, run.finished_at = "done", now()
    session.merge(run)
    siblings = session.scalars(select(ScoreRun).filter_by(**job.ids).where(ScoreRun.id != run.id))
    old = [o for o in siblings if o.status in ("done", *_ENDED) or (o.status == "running" and o.id in left)]
    for sibling in old:
        sibling.status = "superseded"
    return [sibling.id for sibling in old]


def _left_running(db: Database, job: Job) -> list[int]:
    """Return running runs of the same group left by killed processes; none while others are scoring."""
    assert job.run is not None
    running = select(ScoreRun.id).filter_by(**job.ids, status="running").where(ScoreRun.id != job.run.id)
    with db.session() as session:
        run_ids = list(session.scalars(running))
    return run_ids if run_ids and n_scoring(db.location) <= 1 else []


def _delete_rows(db: Database, runs: list[int]) -> None:
    for name in SCORE_TABLES if runs else ():
        _delete(db, name, where(score_run=runs))


def _delete(db: Database, table: str, condition: str) -> None:
    retry(lambda: db.vectors.table(table).delete(condition), f"rows of `{table}` can't be deleted")
