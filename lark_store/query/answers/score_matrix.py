"""`scores`: the whole score matrix of a question, queries × samples, scored as by `top`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lark_store.errors import NothingToScoreError
from lark_store.query.answers.top import find_queries, ids_of, nothing_searched
from lark_store.query.scoring.search import Search
from lark_store.results import ScoreMatrix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.query.select.resolve import Question
    from lark_store.schema.database import Database
    from lark_store.specs import Compute


def all_scores(
    db: Database,
    query_ids: Sequence[str] | None,
    questions: list[Question],
    condition: str | None,
    compute: Compute,
) -> ScoreMatrix:
    """Score every row of a question's groups for each query; see `Store.scores`."""
    question, ids = _one(db, query_ids, questions)
    search = Search(db, question, condition=condition, device=compute.device, memory=compute.memory)
    keys = ["source", "variant", "sample_id"]
    samples = search.rows.frame.select(keys).with_row_index("_number").sort(keys)
    if samples.is_empty():
        raise nothing_searched(condition)
    place_N = np.empty(len(samples), np.int64)
    place_N[samples["_number"].to_numpy()] = np.arange(len(samples))
    row_of = {name: row for row, name in enumerate(ids)}
    matrix = np.empty((len(ids), len(samples)), np.float32)
    for block in search.blocks(ids):
        rows = np.array([row_of[name] for name in block.ids])
        for numbers, scores in search.stream(block):
            matrix[rows[:, None], place_N[numbers][None, :]] = scores
    return ScoreMatrix(
        query_ids=ids,
        samples=samples.select(keys),
        matrix=matrix,
        score=question.label,
        method=question.method.name,
        checkpoints=question.checkpoints,
        notes=search.notes,
        scale=question.method.scale,
        query_checkpoint=question.queries.checkpoint.name,
    )


def _one(db: Database, query_ids: Sequence[str] | None, questions: list[Question]) -> tuple[Question, list[str]]:
    """Return the one question, and its query ids: the given ones, or all, sorted."""
    if query_ids is None:
        matches = [(question, sorted(ids_of(db, question))) for question in questions]
    else:
        matches = find_queries(db, query_ids, questions, lenient=False)
    if len(matches) != 1:
        names = ", ".join(f"`{question.queries.source.name}`" for question, _ in matches)
        raise NothingToScoreError(f"these queries are in {names}", "choose one with `--queries NAME`")
    question, ids = matches[0]
    if not ids:
        raise NothingToScoreError(
            "no query has a sketch at each of these checkpoints", "ingest the queries at all of them"
        )
    return question, ids
