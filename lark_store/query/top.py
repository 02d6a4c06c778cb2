"""`top`: the samples with the most influence on one query, exact, from the sketches themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from lark_store.errors import InputError, NameUnknownError, NothingToScoreError
from lark_store.query.scoring import load_queries, score_batches
from lark_store.schema.records import Hits
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from lark_store.query.groups import Question
    from lark_store.schema.database import Database
    from lark_store.schema.vectors import VectorStore

_MOST_HITS = 1_000_000
_COLUMNS = ("rank", "score", "source", "stage", "variant", "sample_id", "text")


def top(db: Database, query_id: str, questions: list[Question], *, k: int, opponents: bool) -> Hits:
    """Rank all sketches of the question's groups for one query; see `Store.top`."""
    if not 1 <= k <= _MOST_HITS:
        raise InputError(f"k = {k} is not from 1 to {_MOST_HITS}", "try `-k 10`")
    question = _find(db, query_id, questions)
    asked = question.queries
    query = load_queries(db.vectors, asked, [query_id])
    kept = pl.DataFrame(schema={"sample_id": pl.String, "score": pl.Float32, "group": pl.Int64})
    n_searched = 0
    for number, group in enumerate(question.groups):
        for ids, scores in score_batches(db.vectors, group, query, question.method):
            n_searched += len(ids)
            batch = pl.DataFrame({"sample_id": ids, "score": scores[0].numpy()}).with_columns(
                group=pl.lit(number, pl.Int64)
            )
            kept = _best(pl.concat([kept, batch]), k, opponents=opponents)
    if n_searched == 0:
        raise NothingToScoreError(
            "no sample of these groups has a sketch: all of them failed", "the SQL view `failures` has the reasons"
        )
    frame = pl.DataFrame(
        {
            "rank": range(1, len(kept) + 1),
            "score": kept["score"],
            "source": [question.groups[g].source.name for g in kept["group"]],
            "stage": [question.groups[g].source.stage for g in kept["group"]],
            "variant": [question.groups[g].variant.name for g in kept["group"]],
            "sample_id": kept["sample_id"],
        },
        schema_overrides={"rank": pl.Int32},
    )
    frame = frame.join(_texts(db.vectors, frame), on=["source", "sample_id"], how="left", maintain_order="left")
    return Hits(
        frame=frame.select(_COLUMNS),
        query_id=query_id,
        checkpoint=question.groups[0].checkpoint.name,
        query_checkpoint=asked.checkpoint.name,
        query_variant=asked.variant.name,
        method=question.method,
        n_searched=n_searched,
        ingest_runs=sorted({run for group in question.groups for run in group.runs}),
    )


def _best(frame: pl.DataFrame, k: int, *, opponents: bool) -> pl.DataFrame:
    return frame.sort(["score", "group", "sample_id"], descending=[not opponents, False, False]).head(k)


def _find(db: Database, query_id: str, questions: list[Question]) -> Question:
    """Return the question whose queries hold this id."""
    holding = []
    known: list[str] = []
    for question in questions:
        ids = db.vectors.read(question.queries.table, ["sample_id"], question.queries.filter)["sample_id"].to_list()
        known += ids
        if query_id in ids:
            holding.append(question)
    if not holding:
        raise NameUnknownError.of("query", query_id, known, "ingest a source of stage `query`")
    if len(holding) > 1:
        names = ", ".join(f"`{q.queries.source.name}`" for q in holding)
        raise NothingToScoreError(f"query `{query_id}` is in {names}", "say which with `--queries NAME`")
    return holding[0]


def _texts(vectors: VectorStore, frame: pl.DataFrame) -> pl.DataFrame:
    """Return source, sample_id and text (a prompt and its response as one) of the samples in a frame."""
    columns = ["source", "sample_id", "prompt", "response", "text"]
    parts = [vectors.read("samples", columns, "false")]
    for (source,), same in frame.group_by("source", maintain_order=True):
        wanted = where(source=str(source), sample_id=same["sample_id"].to_list())
        parts.append(vectors.read("samples", columns, wanted))
    joined = pl.concat_str(["prompt", "response"], separator="\n")
    return pl.concat(parts).select("source", "sample_id", text=pl.coalesce("text", joined))
