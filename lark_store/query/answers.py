"""Answers that SQL, Python and commands give alike: fine-tuning against pretraining, trajectories, texts alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from sqlalchemy import select

from lark_store.errors import InputError, LarkStoreError, NameUnknownError, NothingToScoreError
from lark_store.query.groups import Wanted, ask
from lark_store.query.lexical import open_lexical, texts_of
from lark_store.query.methods import Method
from lark_store.query.scores import Search, query_ids
from lark_store.query.scoring import load_queries
from lark_store.query.significance import sketch_noise
from lark_store.query.top import texts_of_frame
from lark_store.schema.catalog import Checkpoint, IngestRun, Sketcher, Source
from lark_store.schema.database import find
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from lark_store.query.groups import Group, Question
    from lark_store.schema.database import Database

FT_PT = {
    **dict.fromkeys(("checkpoint", "queries", "query_id", "source", "variant"), pl.String),
    **dict.fromkeys(("against_source", "against_variant"), pl.String),
    **dict.fromkeys(("ft", "pt", "ratio"), pl.Float64),
    "winner": pl.String,
}
TRAJECTORY = {
    "checkpoint": pl.String,
    **dict.fromkeys(("epoch", "learning_rate"), pl.Float64),
    "step": pl.Int64,
    **dict.fromkeys(("queries", "query_id", "source", "variant", "sample_id"), pl.String),
    **dict.fromkeys(("score", "noise", "query_loss", "sample_loss"), pl.Float64),
}
SIMILAR = {
    "rank": pl.Int32,
    "score": pl.Float32,
    **dict.fromkeys(("source", "stage", "sample_id", "text"), pl.String),
}


# --- fine-tuning against pretraining -------------------------------------------------------------------------------


def ft_pt(db: Database, wanted: Wanted, *, check: Callable[[], None] | None = None) -> pl.DataFrame:
    """Compare, query by query, what fine-tuning and pretraining groups reach; see `Store.ft_pt`."""
    rows: list[tuple[Any, ...]] = []
    for question in ask(db, wanted):
        rows += _compared(question, _phi(db, question, check))
    if not rows:
        raise NothingToScoreError(
            f"at `{wanted.checkpoints[0]}` there is no pair of a fine-tuning and a pretraining source",
            "ingest a source of stage `finetune` and one of stage `pretrain`",
        )
    return pl.DataFrame(rows, schema=FT_PT, orient="row")


def _phi(db: Database, question: Question, check: Callable[[], None] | None) -> list[tuple[str, NDArray[np.float32]]]:
    """Return each query's id and Φ, (groups): the highest score in each group."""
    search = Search(db, question, check=check)
    group_N = search.rows.frame["group"].to_numpy()
    ids = query_ids(db, question)
    found: list[tuple[str, NDArray[np.float32]]] = []
    for block in search.blocks(ids):
        phi = np.full((len(block.ids), len(question.groups)), -np.inf, np.float32)
        for numbers, scores in search.stream(block):
            for group in np.unique(group_N[numbers]):
                best = scores[:, group_N[numbers] == group].max(axis=1)
                phi[:, group] = np.maximum(phi[:, group], best)
        found += zip(block.ids, phi, strict=True)
    return found


def _compared(question: Question, phi: list[tuple[str, NDArray[np.float32]]]) -> list[tuple[Any, ...]]:
    stages = [group.source.stage for group in question.groups]
    pairs = [
        (left, right)
        for left, stage in enumerate(stages)
        if stage == "finetune"
        for right, other in enumerate(stages)
        if other == "pretrain"
    ]
    rows = []
    for query, best in phi:
        for left, right in pairs:
            ft, pt = float(best[left]), float(best[right])
            if np.isinf(ft) or np.isinf(pt):  # a group whose samples all failed
                continue
            names = [
                name
                for number in (left, right)
                for name in (question.groups[number].source.name, question.groups[number].variant.name)
            ]
            winner = "finetune" if ft > pt else "pretrain" if pt > ft else "tie"
            ratio = ft / pt if pt > 0 else None
            at = (question.terms[-1].checkpoint.name, question.queries.source.name, query)
            rows.append((*at, *names, ft, pt, ratio, winner))
    return rows


# --- one pair over the checkpoints ---------------------------------------------------------------------------------


def trajectory(db: Database, query: str, sample_id: str, wanted: Wanted) -> pl.DataFrame:
    """Follow one sample's influence on one query over the checkpoints; see `Store.trajectory`."""
    method = Method.of(wanted.method)
    if not method.is_adding:
        raise InputError(f"`{method}` is not offered here", "`cosine` or `dot`")
    with db.session() as session:
        by = find(session, Sketcher, wanted.sketcher)
        done = select(IngestRun.checkpoint_id).filter_by(sketcher_id=by.id, status="done")
        order = (Checkpoint.epoch.is_not(None), Checkpoint.epoch, Checkpoint.id)
        at = list(session.scalars(select(Checkpoint).where(Checkpoint.id.in_(done)).order_by(*order)))
    rows: list[tuple[Any, ...]] = []
    n_asked = 0
    for checkpoint in at:
        for question in _questions_at(db, wanted, checkpoint.name):
            asked = load_queries(db.vectors, question.queries, [query])
            n_asked += len(asked.ids)
            if asked.ids:
                rows += _steps(db, question, query, sample_id)
    if not n_asked:
        raise _unknown(db, "query", query, by)
    if not rows:
        raise _unknown(db, "sample", sample_id, by)
    return pl.DataFrame(rows, schema=TRAJECTORY, orient="row")


def _questions_at(db: Database, wanted: Wanted, checkpoint: str) -> list[Question]:
    """Return the questions at one checkpoint, none where nothing is sketched."""
    from dataclasses import replace

    try:
        return ask(db, replace(wanted, checkpoints=[checkpoint]))
    except NothingToScoreError:
        return []


def _steps(db: Database, question: Question, query: str, sample_id: str) -> list[tuple[Any, ...]]:
    """Return the rows of one checkpoint, one for each source and variant that has the sample."""
    checkpoint, queries = question.terms[-1].checkpoint, question.queries
    asked = load_queries(db.vectors, queries, [query])
    losses = _losses(db, queries, query)
    rows = []
    for group in question.groups:
        sample = load_queries(db.vectors, group, [sample_id])
        if not sample.ids:
            continue
        cosine = float(asked.unit_QK[0] @ sample.unit_QK[0])
        scale = float(asked.norm_Q[0] * sample.norm_Q[0]) if question.method.base == "dot" else 1.0
        noise = float(sketch_noise(cosine, asked.unit_QK.shape[1])) * scale
        at = (checkpoint.name, checkpoint.epoch, checkpoint.learning_rate, checkpoint.step)
        names = (queries.source.name, query, group.source.name, group.variant.name, sample_id)
        rows.append((*at, *names, cosine * scale, noise, losses, _losses(db, group, sample_id)))
    return rows


def _losses(db: Database, group: Group, sample_id: str) -> float:
    found = db.vectors.read(group.table, ["loss"], f"{group.filter} AND {where(sample_id=sample_id)}")
    return float(found["loss"][0])


def _unknown(db: Database, what: str, name: str, by: Sketcher) -> LarkStoreError:
    with db.session() as session:
        queries = list(session.scalars(select(Source.name).where(Source.stage == "query")))
    of_queries = pl.col("source").is_in(queries)
    known = db.vectors.read("samples", ["source", "sample_id"]).filter(of_queries if what == "query" else ~of_queries)
    if name in known["sample_id"]:
        return NothingToScoreError(
            f"{what} `{name}` has no `{by.name}` sketch beside one that it can be compared with",
            "ingest it, and its partner, at the same checkpoint",
        )
    return NameUnknownError.of(what, name, known["sample_id"].to_list(), "add a source with `lark-store source add`")


# --- texts alike ---------------------------------------------------------------------------------------------------


def similar_text(
    db: Database, query: str | None, *, text: str | None = None, k: int = 10, sources: Sequence[str] = ()
) -> pl.DataFrame:
    """Rank samples by BM25 against a query's text, or any text; see `Store.similar_text`."""
    if k < 1:
        raise InputError(f"k = {k} is less than 1", "try `k = 10`")
    if (query is None) == (text is None):
        fact = "one query is needed" if query is None else "an id and a text are two queries"
        raise InputError(fact, "give the id of a query, or a text")
    with db.session() as session:
        stages = {name: find(session, Source, name).stage for name in sources}
        every = {source.name: source.stage for source in session.scalars(select(Source))}
    lexical = open_lexical(db, "bm25")
    asked = text if text is not None else _text_of(db, str(query), every)
    frame = lexical.documents.with_columns(score=pl.Series(lexical.scores([asked])[0]))
    if stages:
        frame = frame.filter(pl.col("source").is_in(list(stages)))
    best = frame.sort(["score", "source", "sample_id"], descending=[True, False, False]).head(k)
    ranked = best.select(
        pl.int_range(1, pl.len() + 1, dtype=pl.Int32).alias("rank"),
        "score",
        "source",
        pl.col("source").replace_strict(every, return_dtype=pl.String).alias("stage"),
        "sample_id",
    )
    keys = ["source", "sample_id"]
    return ranked.join(texts_of_frame(db.vectors, ranked), on=keys, how="left", maintain_order="left")


def check_query(db: Database, query: str) -> None:
    """Raise an error if no query source has a sample of this id; it may have no sketch.

    Raises
    ------
    NameUnknownError
    """
    with db.session() as session:
        _text_of(db, query, {source.name: source.stage for source in session.scalars(select(Source))})


def _text_of(db: Database, query: str, stages: dict[str, str]) -> str:
    asking = [name for name, stage in stages.items() if stage == "query"]
    found = db.vectors.read("samples", ["source"], where(sample_id=query, source=asking))["source"].to_list()
    if len(found) > 1:
        raise InputError(f"query `{query}` is in {', '.join(f'`{name}`' for name in found)}", "give its text instead")
    if not found:
        known = db.vectors.read("samples", ["sample_id"], where(source=asking))["sample_id"].to_list()
        raise NameUnknownError.of("query", query, known, "add a source of stage `query`")
    return texts_of(db, found[0], [query])[0]
