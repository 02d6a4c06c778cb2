"""`attribute`: score every group that has new sketches, and commit influence rows group by group.

A group's rows carry their score run. Its commit, in the catalog, makes the new run current and the one before it
superseded in one transaction; readers join on current runs, so they never see half a group or one twice. All groups of
a question are scored in one pass over the sketches. Where sketches were only added, only those are read: what the run
before found is merged with what they give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
from sqlalchemy import select

from lark_store.errors import InputError
from lark_store.query.geometry import GEOMETRIES, n_fitted
from lark_store.query.lexical import corpus_sha256
from lark_store.query.scores import DEFAULT_MEMORY, Search, query_ids, rising_losses
from lark_store.query.scoring import device_name, pick_device
from lark_store.query.tally import GroupScores, Tally
from lark_store.schema.catalog import ScoreRun, now
from lark_store.schema.faults import reason_of
from lark_store.schema.records import OnProgress, Progress
from lark_store.schema.vectors import INFLUENCE, SOURCE_INFLUENCE, where

if TYPE_CHECKING:
    from lark_store.query.groups import Group, Question
    from lark_store.query.scores import Asked
    from lark_store.schema.database import Database

DEFAULT_HITS = 100
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
    "scored_by": pl.String,
    "note": pl.String,
}


@dataclass
class _Job:
    """One group to score against one set of queries: its run and, where sketches were only added, the run before."""

    question: Question
    group: Group
    hits: int
    besides: dict[str, Any]  # what the scores depend on that is no row of the group, see `_besides`
    run: ScoreRun | None = None
    before: ScoreRun | None = None

    @property
    def ids(self) -> dict[str, Any]:
        """The columns that say what is scored: two runs that agree on them answer the same question."""
        asked = self.question.queries
        return {
            "method": self.question.method.name,
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
        terms = self.question.terms
        recipe = {
            "hits": self.hits,
            "ingest_runs": list(self.group.runs),
            "query_ingest_runs": [run for term in terms if term.queries for run in term.queries.runs],
        }
        if self.question.method.over:
            recipe["over_checkpoints"] = self.question.over_checkpoints
            recipe["weights"] = {term.checkpoint.name: term.weight for term in terms}
        if not self.question.method.is_adding:  # the score depends on what else is searched
            recipe["with"] = sorted({run for term in terms for group in term.groups for run in group.runs})
        return recipe | self.besides

    def extends(self, run: ScoreRun) -> bool:
        """Tell whether a committed run lacks nothing but sketches that were added since."""
        if not self.question.method.is_adding:
            return False
        mine, theirs = self.recipe, dict(run.recipe)
        added = set(mine.pop("ingest_runs")) > set(theirs.pop("ingest_runs"))
        return added and mine == theirs

    @property
    def new_group(self) -> Group:
        """The group with the ingest runs that are to be read."""
        done = set(self.before.recipe["ingest_runs"]) if self.before else set()
        return replace(self.group, runs=tuple(run for run in self.group.runs if run not in done))


def attribute(
    db: Database,
    questions: list[Question],
    *,
    hits: int = DEFAULT_HITS,
    memory: int = DEFAULT_MEMORY,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> pl.DataFrame:
    """Score what changed; see `Store.attribute`."""
    if hits < 1:
        raise InputError(f"{hits} hits per group are too few", "the default is 100")
    rows: list[tuple[Any, ...]] = []
    for question in questions:
        besides = _besides(db, question, memory)
        jobs = [_Job(question, group, hits, besides) for group in question.groups]
        for job in jobs:
            job.run, job.before = _known(db, job)
        todo = [job for job in jobs if job.run is None]
        if todo:
            _score(db, question, todo, memory, device, on_progress)
        is_new = todo and question.method.gradient in GEOMETRIES
        notes = Search(db, question, device=device, memory=memory).notes if is_new else rising_losses(db, question)
        note = "\nnote: ".join(notes) or None
        rows += [(*_row(job, scored=job in todo), note) for job in jobs]
    if any(row[7] == "scored" for row in rows):
        for name in ("influence", "source_influence"):
            db.vectors.refresh_indices(db.vectors.table(name))
    return pl.DataFrame(rows, schema=_REPORT, orient="row")


def _besides(db: Database, question: Question, memory: int) -> dict[str, Any]:
    """Return what the scores depend on beside a group and the queries: as long as it is the same, so are they."""
    found: dict[str, Any] = {}
    if question.method.engine:
        found["corpus"] = corpus_sha256(db)
    if question.method.gradient in GEOMETRIES:
        n = len(Search(db, question).rows)
        found["searched"] = n
        if question.method.base == "whitened":
            found["fitted"] = n_fitted(n, memory // len(question.terms))
    return found


def _row(job: _Job, *, scored: bool) -> tuple[Any, ...]:
    run = job.run
    assert run is not None
    status = "empty" if run.n_samples == 0 else "scored" if scored else "current"
    names = (job.group.checkpoint.name, job.question.queries.source.name, job.group.source.name)
    return (
        *names,
        job.group.variant.name,
        run.method,
        run.n_queries,
        run.n_samples,
        status,
        run.id,
        job.question.label,
    )


def _known(db: Database, job: _Job) -> tuple[ScoreRun | None, ScoreRun | None]:
    """Return the committed run that answers the job, or else one that it extends."""
    before = None
    with db.session() as session:
        for run in session.scalars(select(ScoreRun).filter_by(**job.ids, status="done")):
            if run.recipe == job.recipe:
                return run, None
            if job.extends(run):
                before = run
    return None, before


def _score(
    db: Database, question: Question, jobs: list[_Job], memory: int, device: str, on_progress: OnProgress | None
) -> None:
    """Score some groups of a question in one pass, and commit each."""
    how = {
        "versions": {name: version(name) for name in ("lark-store", "torch", "lancedb")},
        "device": device_name(pick_device(device)),
    }
    for job in jobs:
        over = question.over_checkpoints
        job.run = ScoreRun(**job.ids, **how, over_checkpoints=over, recipe=job.recipe, status="running")
    with db.session() as session:
        session.add_all([job.run for job in jobs])
    try:
        _write(db, question, jobs, memory, device, on_progress)
    except BaseException as error:
        with db.session() as session:
            for job in jobs:
                assert job.run is not None
                job.run.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                job.run.error, job.run.finished_at = reason_of(error), now()
                session.merge(job.run)
        raise
    for job in jobs:
        assert job.run is not None
        _commit(db, job, job.run)


def _write(
    db: Database, question: Question, jobs: list[_Job], memory: int, device: str, on_progress: OnProgress | None
) -> None:
    """Score block after block of queries, as many as `memory` bytes hold, and write their rows."""
    asked = question.queries
    ids = query_ids(db, question)
    searched = [job.new_group for job in jobs] if question.method.is_adding else question.groups
    terms = [*question.terms[:-1], replace(question.terms[-1], groups=searched)]
    search = Search(db, replace(question, terms=terms), device=device, memory=memory)
    label = f"{question.terms[-1].checkpoint.name}: scoring {asked.source.name} by {question.method.name}"
    coded = _coded(db, search, searched, jobs)
    total, done = len(ids) * len(search.rows), 0
    for block in search.blocks(ids):

        def scored(n: int, block: Asked = block) -> None:
            nonlocal done
            done += n * len(block.ids)
            if on_progress:
                on_progress(Progress(label, done, total))

        tallies = [_tally(db, job, names, block.ids) for job, names in zip(jobs, coded.names, strict=True)]
        for numbers, scores_QB in search.stream(block):
            for job in np.unique(coded.job_N[numbers]):
                if job >= 0:
                    mine = coded.job_N[numbers] == job
                    tallies[job].take(coded.code_N[numbers[mine]], scores_QB[:, mine])
            scored(len(numbers))
        _append(db, jobs, coded.names, block.ids, tallies)


@dataclass(frozen=True)
class _Coded:
    """The rows of a pass: their job's number, -1 for none (N), and their sample's code in the job's sorted `names`."""

    job_N: np.ndarray[Any, Any]
    code_N: np.ndarray[Any, Any]
    names: list[np.ndarray[Any, Any]]


def _coded(db: Database, search: Search, searched: list[Group], jobs: list[_Job]) -> _Coded:
    of_group = {(job.group.source.id, job.group.variant.id): number for number, job in enumerate(jobs)}
    job_of = np.array([of_group.get((group.source.id, group.variant.id), -1) for group in searched])
    job_N, ids_N = job_of[search.rows.frame["group"].to_numpy()], search.rows.frame["sample_id"].to_numpy()
    code_N, names = np.full(len(ids_N), -1), []
    for number, job in enumerate(jobs):
        mine = np.flatnonzero(job_N == number)
        known = [] if job.before is None else _hits(db, job.before)["sample_id"].unique().to_list()
        both, codes = np.unique(np.array([*ids_N[mine], *known], dtype=object), return_inverse=True)
        code_N[mine] = codes[: len(mine)]
        names.append(both)
    return _Coded(job_N, code_N, names)


def _hits(db: Database, run: ScoreRun) -> pl.DataFrame:
    columns = ["query_id", "sample_id", "score", "rank"]
    return db.vectors.read("influence", columns, where(score_run=run.id)).sort("query_id", "rank")


def _tally(db: Database, job: _Job, names: np.ndarray[Any, Any], ids: list[str]) -> Tally:
    """Return an empty tally, or one that holds what the run before found."""
    tally = Tally(len(ids), job.hits)
    if job.before is None:
        return tally
    hits = _hits(db, job.before).filter(pl.col("query_id").is_in(ids))
    keys = where(score_run=job.before.id, query_id=ids)
    sums = db.vectors.read("source_influence", ["query_id", "mean", "std", "n"], keys).sort("query_id")
    if sums.is_empty():  # the run before had no sample
        return tally
    shape = (len(ids), len(hits) // len(ids))
    codes = np.searchsorted(names, hits["sample_id"].to_numpy()).reshape(shape)
    scores = hits["score"].to_numpy().reshape(shape)
    tally.resume(codes, scores, sums["mean"].to_numpy(), sums["std"].to_numpy(), int(sums["n"][0]))
    return tally


def _append(
    db: Database, jobs: list[_Job], names: list[np.ndarray[Any, Any]], ids: list[str], tallies: list[Tally]
) -> None:
    """Write what a block of queries found in all groups, in one commit for each table."""
    hits, sums, runs = [], [], []
    for job, known, tally in zip(jobs, names, tallies, strict=True):
        run, scores = job.run, tally.result()
        assert run is not None
        if scores is None:
            continue
        run.n_queries += len(ids)
        run.n_samples = scores.n
        keys = {"score_run": run.id, "checkpoint": job.group.checkpoint.name}
        keys |= {"source": job.group.source.name, "variant": job.group.variant.name}
        hits.append(_influence_rows(keys, ids, pa.array(known, pa.string()), scores))
        sums.append(_source_rows(keys, ids, pa.array(known, pa.string()), scores))
        runs.append(run)
    if not runs:
        return
    db.vectors.append(db.vectors.table("influence"), pa.concat_tables(hits))
    version = db.vectors.append(db.vectors.table("source_influence"), pa.concat_tables(sums))
    for run in runs:
        run.lance_version = version


def _table(columns: dict[str, Any], schema: pa.Schema, n: int) -> pa.Table:
    full = {
        field.name: columns[field.name]
        if isinstance(columns[field.name], np.ndarray | list | pa.Array)
        else pa.repeat(pa.scalar(columns[field.name], field.type), n)
        for field in schema
    }
    return pa.table(full, schema=schema)


def _influence_rows(keys: dict[str, Any], ids: list[str], names: pa.Array, scores: GroupScores) -> pa.Table:
    n_queries, hits = scores.top_scores.shape
    columns = keys | {
        "query_id": pa.array(ids).take(pa.array(np.repeat(np.arange(n_queries), hits))),
        "sample_id": names.take(pa.array(scores.top_codes.reshape(-1))),
        "score": scores.top_scores.reshape(-1),
        "rank": np.tile(np.arange(1, hits + 1, dtype=np.int32), n_queries),
    }
    return _table(columns, INFLUENCE, n_queries * hits)


def _source_rows(keys: dict[str, Any], ids: list[str], names: pa.Array, scores: GroupScores) -> pa.Table:
    columns = keys | {
        "query_id": ids,
        "max": scores.max_Q,
        "argmax": names.take(pa.array(scores.argmax)),
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
