"""`trajectory`: one sample's influence on one query at every checkpoint."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from sqlalchemy import select

from lark_store.errors import InputError, LarkStoreError, NameUnknownError, NothingToScoreError
from lark_store.query.methods import Method
from lark_store.query.scoring.products import load_queries
from lark_store.query.select.hints import for_sketches, quoted
from lark_store.query.select.resolve import ask
from lark_store.query.select.sketchers import sketched_checkpoints, with_sketcher
from lark_store.query.sql.columns import TRAJECTORY, frame_schema
from lark_store.schema.catalog import Checkpoint, IngestRun, Sketcher, Source
from lark_store.schema.database import find, find_sketcher
from lark_store.schema.table_schemas import sketch_table
from lark_store.schema.vectors import where
from lark_store.stats.significance import sketch_noise

if TYPE_CHECKING:
    from lark_store.query.select.resolve import Group, Question
    from lark_store.schema.database import Database
    from lark_store.specs import SearchSpec

_LOG = logging.getLogger(__name__)


def trajectory(db: Database, query: str, sample_id: str, spec: SearchSpec) -> pl.DataFrame:
    """Follow one sample's influence on one query across checkpoints; see `Store.trajectory`."""
    method = Method.of(spec.method, default="cosine" if spec.query_checkpoint is None else "dot")
    if not method.is_adding:
        raise InputError(f"`{method.name}` has no trajectory", "use `cosine` or `dot`")
    spec, notes = with_sketcher(db, replace(spec, method=method.name))
    with db.session() as session:
        if spec.query_checkpoint is not None:
            find(session, Checkpoint, spec.query_checkpoint)
        sketcher = find_sketcher(session, spec.sketcher)
        checkpoints = sketched_checkpoints(session, sketcher)
    rows: list[tuple[Any, ...]] = []
    n_asked = 0
    for checkpoint in checkpoints:
        for question in _questions_at(db, spec, checkpoint.name):
            queries = load_queries(db.vectors, question.queries, [query])
            n_asked += len(queries.ids)
            if queries.ids:
                rows += _steps(db, question, query, sample_id)
    if not n_asked and not _is_sketched(db, query, sketcher, spec.query_checkpoint):
        raise _missing_sketch(db, "query", query, sketcher, spec)
    if not rows:
        raise _missing_sketch(db, "sample", sample_id, sketcher, spec)
    for note in notes:
        _LOG.warning(note)
    return pl.DataFrame(rows, schema=frame_schema(TRAJECTORY), orient="row")


def _is_sketched(db: Database, query: str, sketcher: Sketcher, checkpoint: str | None) -> bool:
    """Tell whether a query has a sketch by a sketcher, at a checkpoint or (None) at any."""
    with db.session() as session:
        runs = select(IngestRun.fingerprint, IngestRun.id).join(Source).where(Source.stage == "query")
        if checkpoint is not None:
            runs = runs.where(IngestRun.checkpoint.has(name=checkpoint))
        committed = session.execute(runs.where(IngestRun.sketcher_id == sketcher.id, IngestRun.status == "done")).all()
    tables: dict[str, list[int]] = {}
    for fingerprint, run in committed:
        tables.setdefault(sketch_table(fingerprint), []).append(run)
    return any(
        db.vectors.has(table) and db.vectors.table(table).count_rows(where(sample_id=query, ingest_run=ids))
        for table, ids in tables.items()
    )


def _questions_at(db: Database, spec: SearchSpec, checkpoint: str) -> list[Question]:
    """Return the questions at one checkpoint, none without sketches."""
    try:
        return ask(db, replace(spec, checkpoints=[checkpoint]))
    except NothingToScoreError:
        return []


def _steps(db: Database, question: Question, query: str, sample_id: str) -> list[tuple[Any, ...]]:
    """Return the rows of one checkpoint, one per source and variant with the sample."""
    checkpoint, queries = question.terms[-1].checkpoint, question.queries
    asked = load_queries(db.vectors, queries, [query])
    losses = _losses(db, queries, query)
    rows = []
    for group in question.groups:
        sample = load_queries(db.vectors, group, [sample_id])
        if not sample.ids:
            continue
        cosine = float(asked.unit_QK[0] @ sample.unit_QK[0])
        one = np.ones((1, 1), np.float32)
        scale = float(question.method.scoring.weighted(one, asked.norm_Q, sample.norm_Q)[0, 0])
        noise = float(sketch_noise(cosine, asked.unit_QK.shape[1])) * scale
        at = (checkpoint.name, checkpoint.epoch, checkpoint.learning_rate, checkpoint.step)
        names = (queries.source.name, query, group.source.name, group.variant.name, sample_id)
        loss, by = _losses(db, group, sample_id), (queries.checkpoint.name, question.label)
        rows.append((*at, *names, cosine * scale, noise, losses, loss, *by))
    return rows


def _losses(db: Database, group: Group, sample_id: str) -> float:
    found = db.vectors.read(group.table, ["loss"], f"{group.filter} AND {where(sample_id=sample_id)}")
    return float(found["loss"][0])


def _missing_sketch(db: Database, kind: str, name: str, sketcher: Sketcher, spec: SearchSpec) -> LarkStoreError:
    with db.session() as session:
        queries = list(session.scalars(select(Source.name).where(Source.stage == "query")))
    of_queries = pl.col("source").is_in(queries)
    samples = db.vectors.read("samples", ["source", "sample_id"]).filter(of_queries if kind == "query" else ~of_queries)
    sources = samples.filter(sample_id=name)["source"].unique(maintain_order=True).to_list()
    if not sources:
        return NameUnknownError.of(
            kind, name, samples["sample_id"].to_list(), "add a source with `lark-store source add`"
        )
    at = spec.query_checkpoint if kind == "query" else None
    fact = f"{kind} `{name}` has no comparable `{sketcher.name}` sketch" + (f" at `{at}`" if at else "")
    source = spec.queries if kind == "query" else next(iter(spec.sources), None)
    if source and source not in sources:
        return NothingToScoreError(
            fact, f"it is in {quoted(sources)}; choose one with `--{'queries' if kind == 'query' else 'source'} NAME`"
        )
    variant = spec.query_variant if kind == "query" else next(iter(spec.variants), None)
    stages = ("query",) if kind == "query" else ("finetune", "pretrain")
    variants = [variant] if variant else []
    with db.session() as session:
        checkpoint = find(session, Checkpoint, at) if at else None
    return NothingToScoreError(fact, for_sketches(db, sketcher, checkpoint, sources, variants, stages=stages))
