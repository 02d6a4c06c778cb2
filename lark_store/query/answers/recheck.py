"""Recompute stored scores from the sketches, for a sample of the queries of committed score runs.

Shape letters: Q queries, N rows of a group.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import joinedload

from lark_store.core.names import SUM_SEPARATOR
from lark_store.errors import LarkStoreError
from lark_store.query.answers.attribute import still_current
from lark_store.query.methods import Method
from lark_store.query.scoring.search import Search
from lark_store.query.select.resolve import ask
from lark_store.results import Progress
from lark_store.schema.catalog import IngestRun, ScoreRun
from lark_store.schema.vectors import where
from lark_store.specs import SearchSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl
    from numpy.typing import NDArray

    from lark_store.query.select.resolve import Group, Question
    from lark_store.results import OnProgress
    from lark_store.schema.database import Database

_TOLERANCE = 1e-4  # of a group's largest score: float32 sums depend on their order
_PARTS = ("checkpoint", "query_checkpoint", "queries", "query_variant", "source", "variant", "sketcher")


@dataclass(frozen=True)
class WrongScore:
    """A stored score that differs from the recomputed one: run, query, figure (`rank 3`, `mean`), both values."""

    run: ScoreRun
    query_id: str
    figure: str
    stored: float
    computed: float


def recheck(
    db: Database, n: int, seed: int, device: str = "auto", on_progress: OnProgress | None = None
) -> Iterator[WrongScore]:
    """Recompute the scores of `n` queries of score runs; yield those that differ.

    Skips runs outdated by new sketches if their scores depend on all searched rows: those can't be recomputed.
    """
    drawn = _draw(db, n, seed)
    for completed, (run, query_ids) in enumerate(drawn):
        if on_progress:
            on_progress(Progress("recomputing scores", completed, len(drawn)))
        question = _question(db, run)
        if question is not None:
            yield from _compare(db, run, question, query_ids, device)


def _draw(db: Database, n: int, seed: int) -> list[tuple[ScoreRun, list[str]]]:
    """Draw queries of score runs by a seed; returns them by run."""
    with db.session() as session:
        parts = [joinedload(getattr(ScoreRun, part)) for part in _PARTS]
        committed = select(ScoreRun).filter_by(status="done").where(ScoreRun.n_samples > 0).options(*parts)
        runs = {run.id: run for run in session.scalars(committed.order_by(ScoreRun.id))}
    rows = db.vectors.read("source_influence", ["score_run", "query_id"], where(score_run=list(runs)))
    pairs = sorted(rows.rows())
    sample = sorted(random.Random(seed).sample(pairs, min(n, len(pairs))))  # noqa: S311  # no secret
    ids: dict[int, list[str]] = {}
    for number, query_id in sample:
        ids.setdefault(number, []).append(query_id)
    return [(runs[number], query_ids) for number, query_ids in ids.items()]


def _question(db: Database, run: ScoreRun) -> Question | None:
    """Return the question a run answered; None if it can no longer be asked."""
    method = Method.of(run.method)
    checkpoints = run.over_checkpoints.split(SUM_SEPARATOR) if run.over_checkpoints else [run.checkpoint.name]
    query_checkpoint = None if method.over else run.query_checkpoint.name
    spec = SearchSpec(
        checkpoints=checkpoints,
        queries=run.queries.name,
        query_variant=run.query_variant.name,
        sketcher=run.sketcher.name,
        method=method.base,
        over_checkpoints=method.over,
        sources=[run.source.name] if method.is_adding else _sources(db, run.recipe["with"]),
        query_checkpoint=query_checkpoint,
    )
    try:
        (question,) = ask(db, spec)
    except LarkStoreError:  # its inputs were removed since; other checks report this
        return None
    if method.is_adding:
        return _original(question, run)
    return question if still_current(db, question, run) else None


def _sources(db: Database, ingest_runs: list[int]) -> list[str]:
    """Return the names of the sources that some ingest runs read."""
    with db.session() as session:
        runs = session.scalars(select(IngestRun).where(IngestRun.id.in_(ingest_runs)))
        return sorted({run.source.name for run in runs})


def _original(question: Question, run: ScoreRun) -> Question | None:
    """Return the question limited to the rows the run scored, without those added since."""
    (term,) = question.terms
    ingest_runs, query_ingest_runs = tuple(run.recipe["ingest_runs"]), tuple(run.recipe["query_ingest_runs"])
    groups = [group for group in question.groups if group.variant.id == run.variant_id and _has(group, ingest_runs)]
    if not groups or not _has(question.queries, query_ingest_runs):
        return None
    queries = replace(question.queries, runs=query_ingest_runs)
    return replace(question, terms=[replace(term, groups=[replace(groups[0], runs=ingest_runs)], queries=queries)])


def _has(group: Group, runs: tuple[int, ...]) -> bool:
    return set(runs) <= set(group.runs)


def _compare(
    db: Database, run: ScoreRun, question: Question, query_ids: list[str], device: str
) -> Iterator[WrongScore]:
    search = Search(db, question, device=device)
    frame = search.rows.frame
    mine_N = ((frame["source"] == run.source.name) & (frame["variant"] == run.variant.name)).to_numpy()
    ids_N = frame["sample_id"].to_numpy()[mine_N]
    keys = where(score_run=run.id, query_id=query_ids)
    hits = db.vectors.read("influence", ["query_id", "sample_id", "score", "rank"], keys)
    sums = db.vectors.read("source_influence", ["query_id", "max", "mean", "std"], keys)
    for block in search.blocks(query_ids):
        scores_QN = np.zeros((len(block.ids), len(frame)), np.float32)
        for numbers, scores in search.stream(block):
            scores_QN[:, numbers] = scores
        for query_id, scores_N in zip(block.ids, scores_QN[:, mine_N], strict=True):
            stored = {"hits": hits.filter(query_id=query_id), "sums": sums.filter(query_id=query_id)}
            for figure, value, computed in _figures(ids_N, scores_N, **stored):
                if not abs(value - computed) <= _TOLERANCE * float(np.abs(scores_N).max()):
                    yield WrongScore(run, query_id, figure, value, computed)


def _figures(
    ids_N: NDArray[Any], scores_N: NDArray[np.float32], *, hits: pl.DataFrame, sums: pl.DataFrame
) -> Iterator[tuple[str, float, float]]:
    """Yield a query's stored figures in a group: name, stored value and computed value."""
    of_sample = dict(zip(ids_N.tolist(), scores_N.tolist(), strict=True))
    best = sorted(of_sample.values(), reverse=True)
    for sample_id, score, rank in hits.select("sample_id", "score", "rank").iter_rows():
        yield f"rank {rank}", score, of_sample.get(sample_id, float("nan"))
        yield f"rank {rank}", score, best[rank - 1] if 0 < rank <= len(best) else float("nan")
    wide_N = scores_N.astype(np.float64)
    for name, computed in (("max", wide_N.max()), ("mean", wide_N.mean()), ("std", wide_N.std())):
        for stored in sums[name]:
            yield name, stored, float(computed)
