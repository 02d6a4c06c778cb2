"""`attribute`: score every group with new sketches, and commit influence rows group by group.

A group's rows carry their score run. Committing it in the catalog makes the new run current and supersedes the previous
one in one transaction. Readers join on current runs, so they never see half a group or one twice. All groups of a
question are scored in one pass over the sketches. Where sketches were only added, only the new ones are read and merged
with the previous run's results.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa

from lark_store.core.device import device_name, pick_device
from lark_store.errors import StoreBusyError
from lark_store.query.answers.score_runs import (
    SCORE_TABLES,
    Job,
    ReplacedError,
    begin,
    close,
    commit,
    committed,
    discard,
    drop_empty,
    find_run,
)
from lark_store.query.scoring.bm25 import corpus_sha256
from lark_store.query.scoring.search import DEFAULT_MEMORY, Search, query_ids, rising_losses
from lark_store.query.select.resolve import ask
from lark_store.results import OnProgress, Progress
from lark_store.schema.checksums import with_score_checksums
from lark_store.schema.faults import failure_reason
from lark_store.schema.table_schemas import INFLUENCE, SOURCE_INFLUENCE
from lark_store.schema.vectors import where
from lark_store.stats.running_top_k import GroupScores, Tally

if TYPE_CHECKING:
    from lark_store.query.scoring.products import QueryBatch
    from lark_store.query.select.resolve import Group, Question
    from lark_store.schema.catalog import ScoreRun
    from lark_store.schema.database import Database
    from lark_store.specs import AttributeSpec, Compute

_ATTEMPTS = 5
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


def attribute(
    db: Database, specs: list[AttributeSpec], compute: Compute, on_progress: OnProgress | None = None
) -> pl.DataFrame:
    """Score the groups with changes; see `Store.attribute`."""
    for spec in specs:
        ask(db, spec)  # wrong names fail before anything is scored
    scorer = _Scorer(db, compute, on_progress)
    rows = [row for spec in specs for row in scorer.answer(spec)]
    if any(row[7] == "scored" for row in rows):
        for name in SCORE_TABLES:
            db.vectors.refresh_indices(db.vectors.table(name))
    return pl.DataFrame(rows, schema=_REPORT, orient="row")


@dataclass(frozen=True)
class _Scorer:
    """Answers questions from current runs, or scores them."""

    db: Database
    compute: Compute
    on_progress: OnProgress | None
    scored: set[int] = field(default_factory=set)  # runs committed by this scorer
    unusable: set[int] = field(default_factory=set)  # committed runs whose rows were gone before extending them

    def answer(self, spec: AttributeSpec) -> list[tuple[Any, ...]]:
        """Return a row of the report for each group.

        Resolves and scores again if another process replaced an input meanwhile; the last attempt extends no run.

        Raises
        ------
        StoreBusyError
            Another process interfered with every attempt.
        """
        for attempt in range(_ATTEMPTS):
            seen = committed(self.db)  # before resolving: later commits may have seen more
            questions = ask(self.db, spec)
            jobs = [self._settled(q, spec.hits, seen, from_nothing=attempt == _ATTEMPTS - 1) for q in questions]
            if all(job.run for group_jobs in jobs for job in group_jobs):
                pairs = zip(questions, jobs, strict=True)
                return [row for question, group_jobs in pairs for row in self._rows(question, group_jobs)]
        raise StoreBusyError(
            f"other processes replaced the scores of the same groups in all {_ATTEMPTS} attempts",
            "wait for them and run the command again; if there are none, run `lark-store db check`",
        )

    def _settled(self, question: Question, hits: int, seen: frozenset[int], *, from_nothing: bool) -> list[Job]:
        """Find or compute each group's run; a job left without a run must be retried."""
        extra_recipe = _extra_recipe(self.db, question, self.compute.memory)
        jobs = [Job(question, group, hits, extra_recipe) for group in question.groups]
        for job in jobs:
            find_run(self.db, job)
            if job.before and (from_nothing or job.before.id in self.unusable):
                job.before = None
        drop_empty(self.db, jobs)
        todo = [job for job in jobs if job.run is None]
        if todo:
            self._score(question, todo, seen)
        return jobs

    def _score(self, question: Question, jobs: list[Job], seen: frozenset[int]) -> None:
        """Score groups of a question in one pass and commit each."""
        versions = {name: version(name) for name in ("lark-store", "torch", "lancedb")}
        begin(self.db, jobs, {"versions": versions, "device": device_name(pick_device(self.compute.device))})
        try:
            _write(self.db, question, jobs, self.compute, self.on_progress)
        except ReplacedError:
            self.unusable.update(job.before.id for job in jobs if job.before)
            discard(self.db, jobs)
            return
        except BaseException as error:
            close(
                self.db,
                jobs,
                "interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
                failure_reason(error),
            )
            raise
        self.scored.update(job.run.id for job in jobs if commit(self.db, job, seen) and job.run)

    def _rows(self, question: Question, jobs: list[Job]) -> list[tuple[Any, ...]]:
        is_new = any(job.run and job.run.id in self.scored for job in jobs)
        has_notes = is_new and question.method.scoring.geometry() is not None
        search = None
        if has_notes:
            search = Search(self.db, question, device=self.compute.device, memory=self.compute.memory)
        notes = search.notes if search else (*question.notes, *rising_losses(self.db, question))
        note = "\nnote: ".join(notes) or None
        return [(*_row(job, self.scored), note) for job in jobs]


def _extra_recipe(db: Database, question: Question, memory: int) -> dict[str, Any]:
    """Return further inputs of the scores, besides the group and the queries, for the recipe."""
    inputs: dict[str, Any] = {}
    if question.method.engine:
        inputs["corpus"] = corpus_sha256(db)
    geometry = question.method.scoring.geometry()
    if geometry is not None:
        n = len(Search(db, question).rows)
        inputs |= {"searched": n} | geometry.recipe(n, memory // len(question.terms))
    return inputs


def _row(job: Job, scored: set[int]) -> tuple[Any, ...]:
    run = job.run
    assert run is not None
    status = "empty" if run.n_samples == 0 else "scored" if run.id in scored else "current"
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


def still_current(db: Database, question: Question, run: ScoreRun) -> bool:
    """Tell whether scoring a question now would give a committed run's recipe."""
    groups = (
        group for group in question.groups if (group.source.id, group.variant.id) == (run.source_id, run.variant_id)
    )
    group = next(groups, None)
    if group is None:
        return False
    job = Job(question, group, run.recipe["hits"], _extra_recipe(db, question, DEFAULT_MEMORY))
    return bool(job.recipe == run.recipe)


def _write(db: Database, question: Question, jobs: list[Job], compute: Compute, on_progress: OnProgress | None) -> None:
    """Score the queries in blocks that fit into memory, and write their rows."""
    source = question.queries.source.name
    ids = query_ids(db, question)
    searched = [job.new_group for job in jobs] if question.method.is_adding else question.groups
    terms = [*question.terms[:-1], replace(question.terms[-1], groups=searched)]
    search = Search(db, replace(question, terms=terms), device=compute.device, memory=compute.memory)
    if question.method.engine and search.lexical and {corpus_sha256(db)} != {j.extra_recipe["corpus"] for j in jobs}:
        raise ReplacedError  # the open index may cover other samples
    label = f"{question.terms[-1].checkpoint.name}: scoring {source} by {question.method.name}"
    coded = _coded(db, search, searched, jobs)
    total, completed = len(ids) * len(search.rows), 0
    for block in search.blocks(ids):

        def scored(n: int, block: QueryBatch = block) -> None:
            nonlocal completed
            completed += n * len(block.ids)
            if on_progress:
                on_progress(Progress(label, completed, total))

        tallies = [_tally(db, job, names, block.ids) for job, names in zip(jobs, coded.names, strict=True)]
        for numbers, scores_QB in search.stream(block):
            for number, tally in enumerate(tallies):
                in_job = coded.job_N[numbers] == number
                if in_job.any():
                    tally.take(coded.code_N[numbers[in_job]], scores_QB[:, in_job])
            scored(len(numbers))
        _append(db, jobs, coded.names, block.ids, tallies)


@dataclass(frozen=True)
class _Coded:
    """The rows of a pass: job number, -1 for none (N), and the sample's code in the job's sorted `names` (N)."""

    job_N: np.ndarray[Any, Any]
    code_N: np.ndarray[Any, Any]
    names: list[np.ndarray[Any, Any]]


def _coded(db: Database, search: Search, searched: list[Group], jobs: list[Job]) -> _Coded:
    of_group = {(job.group.source.id, job.group.variant.id): number for number, job in enumerate(jobs)}
    job_of = np.array([of_group.get((group.source.id, group.variant.id), -1) for group in searched])
    job_N, ids_N = job_of[search.rows.frame["group"].to_numpy()], search.rows.frame["sample_id"].to_numpy()
    code_N, names = np.empty(len(ids_N), np.int64), []
    for number, job in enumerate(jobs):
        job_rows = np.flatnonzero(job_N == number)
        earlier = [] if job.before is None else _hits(db, job.before)["sample_id"].unique().to_list()
        ids, codes = np.unique(np.array([*ids_N[job_rows], *earlier], dtype=object), return_inverse=True)
        code_N[job_rows] = codes[: len(job_rows)]
        names.append(ids)
    return _Coded(job_N, code_N, names)


def _hits(db: Database, run: ScoreRun, ids: list[str] | None = None) -> pl.DataFrame:
    """Return a run's hits, only those of some queries if `ids` are given."""
    keys = where(score_run=run.id) if ids is None else where(score_run=run.id, query_id=ids)
    hits = db.vectors.read("influence", ["query_id", "sample_id", "score", "rank"], keys)
    n_queries = run.n_queries if ids is None else len(ids)
    if len(hits) != n_queries * min(run.recipe["hits"], run.n_samples):
        raise ReplacedError  # another run replaced it and its rows are deleted
    return hits.sort("query_id", "rank")


def _tally(db: Database, job: Job, names: np.ndarray[Any, Any], ids: list[str]) -> Tally:
    """Return a tally, resumed from the previous run if there is one."""
    tally, before = Tally(len(ids), job.hits), job.before
    if before is None or before.n_samples == 0:
        return tally
    hits = _hits(db, before, ids)
    keys = where(score_run=before.id, query_id=ids)
    sums = db.vectors.read("source_influence", ["query_id", "mean", "std", "n"], keys).sort("query_id")
    if sums["query_id"].to_list() != ids or set(sums["n"]) != {before.n_samples}:
        raise ReplacedError
    shape = (len(ids), len(hits) // len(ids))
    codes = np.searchsorted(names, hits["sample_id"].to_numpy()).reshape(shape)
    scores = hits["score"].to_numpy().reshape(shape)
    tally.resume(codes, scores, sums["mean"].to_numpy(), sums["std"].to_numpy(), before.n_samples)
    return tally


def _append(
    db: Database, jobs: list[Job], names: list[np.ndarray[Any, Any]], ids: list[str], tallies: list[Tally]
) -> None:
    """Write one query block's results for all groups, with one commit per table."""
    hits, sums, runs = [], [], []
    for job, job_names, tally in zip(jobs, names, tallies, strict=True):
        run, scores = job.run, tally.result()
        assert run is not None
        if scores is None:
            continue
        run.n_queries += len(ids)
        run.n_samples = scores.n
        keys = {"score_run": run.id, "checkpoint": job.group.checkpoint.name}
        keys |= {"source": job.group.source.name, "variant": job.group.variant.name}
        hits.append(_influence_rows(keys, ids, pa.array(job_names, pa.string()), scores))
        sums.append(_source_rows(keys, ids, pa.array(job_names, pa.string()), scores))
        runs.append(run)
    if not runs:
        return
    db.vectors.append(db.vectors.table("influence"), pa.concat_tables(hits))
    checked = with_score_checksums(pa.concat_tables(sums), pa.concat_tables(hits))
    version = db.vectors.append(db.vectors.table("source_influence"), checked)
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
        "sample_id": names.take(pa.array(scores.top_codes.ravel())),
        "score": scores.top_scores.ravel(),
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
        "checksum": None,  # set by `_append`, because it also covers the hits
    }
    return _table(columns, SOURCE_INFLUENCE, len(ids))
