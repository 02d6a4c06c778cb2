"""`similar-text`: the samples with the texts most similar to a query's, by BM25."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl
from sqlalchemy import select

from lark_store.errors import InputError, NameUnknownError, NothingToScoreError
from lark_store.query.answers.top import texts_of_frame
from lark_store.query.scoring.bm25 import open_lexical, texts_of
from lark_store.query.select.hints import quoted
from lark_store.schema.catalog import Source
from lark_store.schema.database import find
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.schema.database import Database


def similar_text(db: Database, query: str | None, *, text: str | None, k: int, sources: Sequence[str]) -> pl.DataFrame:
    """Rank samples by BM25 against a query's text, or any text; see `Store.similar_text`."""
    if (query is None) == (text is None):
        fact = "no query is given" if query is None else "a query id and a text can't be combined"
        raise InputError(fact, "give the id of a query, or a text")
    with db.session() as session:
        stages = {name: find(session, Source, name).stage for name in sources}
        stage_of = {source.name: source.stage for source in session.scalars(select(Source))}
    lexical = open_lexical(db, "bm25")
    if lexical.documents.is_empty():
        raise NothingToScoreError(
            "the store has no samples except queries", "add a source with `lark-store source add --stage pretrain`"
        )
    query_text = text if text is not None else _text_of(db, str(query), stage_of)
    frame = lexical.documents.with_columns(score=pl.Series(lexical.scores([query_text])[0]))
    if stages:
        frame = frame.filter(pl.col("source").is_in(list(stages)))
    best = frame.sort(-pl.col("score"), "source", "sample_id").head(k)
    ranked = best.select(
        pl.int_range(1, pl.len() + 1, dtype=pl.Int32).alias("rank"),
        "score",
        "source",
        pl.col("source").replace_strict(stage_of, return_dtype=pl.String).alias("stage"),
        "sample_id",
    )
    keys = ["source", "sample_id"]
    return ranked.join(texts_of_frame(db.vectors, ranked), on=keys, how="left", maintain_order="left")


def check_query(db: Database, query: str) -> None:
    """Check that a query source has a sample of this id, sketched or not.

    Raises
    ------
    NameUnknownError
    """
    with db.session() as session:
        _text_of(db, query, {source.name: source.stage for source in session.scalars(select(Source))})


def _text_of(db: Database, query: str, stages: dict[str, str]) -> str:
    query_sources = [name for name, stage in stages.items() if stage == "query"]
    sources = db.vectors.read("samples", ["source"], where(sample_id=query, source=query_sources))["source"].to_list()
    if len(sources) > 1:
        raise InputError(f"query `{query}` is in {quoted(sources)}", "give the text instead of the id")
    if not sources:
        ids = db.vectors.read("samples", ["sample_id"], where(source=query_sources))["sample_id"].to_list()
        raise NameUnknownError.of("query", query, ids, "add a source of stage `query`")
    return texts_of(db, sources[0], [query])[0]
