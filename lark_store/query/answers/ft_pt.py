"""`ft-pt`: the highest influence of fine-tuning and pretraining groups, compared query by query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.errors import NothingToScoreError
from lark_store.query.scoring.search import Search, query_ids
from lark_store.query.select.hints import for_sketches
from lark_store.query.select.resolve import ask
from lark_store.query.sql.columns import FT_PT, frame_schema

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from lark_store.query.select.resolve import Question
    from lark_store.schema.database import Database
    from lark_store.specs import SearchSpec


def ft_pt(db: Database, spec: SearchSpec, *, check: Callable[[], None] | None = None) -> pl.DataFrame:
    """Compare the maxima of fine-tuning and pretraining groups per query; see `Store.ft_pt`."""
    rows: list[tuple[Any, ...]] = []
    questions = ask(db, spec)
    for question in questions:
        search = Search(db, question, check=check)
        note = "\nnote: ".join(search.notes) or None
        rows += [(*row, note) for row in _compared(question, _phi(db, search))]
    if not rows:
        raise _no_pair(db, spec, questions)
    return pl.DataFrame(rows, schema=frame_schema(FT_PT), orient="row")


def _phi(db: Database, search: Search) -> list[tuple[str, NDArray[np.float32]]]:
    """Return each query's id and Φ, (groups): the highest score in each group."""
    question = search.question
    group_N = search.rows.frame["group"].to_numpy()
    ids = query_ids(db, question)
    phi_by_query: list[tuple[str, NDArray[np.float32]]] = []
    for block in search.blocks(ids):
        phi = np.full((len(block.ids), len(question.groups)), -np.inf, np.float32)
        for numbers, scores in search.stream(block):
            for group in np.unique(group_N[numbers]):
                best = scores[:, group_N[numbers] == group].max(axis=1)
                phi[:, group] = np.maximum(phi[:, group], best)
        phi_by_query += zip(block.ids, phi, strict=True)
    return phi_by_query


def _compared(question: Question, phi: list[tuple[str, NDArray[np.float32]]]) -> list[tuple[Any, ...]]:
    stages = [group.source.stage for group in question.groups]
    pairs = [
        (left, right)
        for left, stage in enumerate(stages)
        if stage == "finetune"
        for right, right_stage in enumerate(stages)
        if right_stage == "pretrain"
    ]
    rows = []
    for query, best in phi:
        for left, right in pairs:
            ft, pt = float(best[left]), float(best[right])
            if np.isinf(ft) or np.isinf(pt):  # all samples of the group failed
                continue
            names = [
                name
                for number in (left, right)
                for name in (question.groups[number].source.name, question.groups[number].variant.name)
            ]
            winner = "finetune" if ft > pt else "pretrain" if pt > ft else "tie"
            ratio = ft / pt if pt > 0 else None
            keys = (question.terms[-1].checkpoint.name, question.queries.source.name, query)
            rows.append((*keys, *names, ft, pt, ratio, winner, question.queries.checkpoint.name, question.label))
    return rows


def _no_pair(db: Database, spec: SearchSpec, questions: list[Question]) -> NothingToScoreError:
    """Return the error for a missing stage, or for sources all of one stage."""
    place = spec.checkpoints[-1]
    fact = f"there are no fine-tuning and pretraining sketches to compare at `{place}`"
    groups = [group for question in questions for group in question.groups]
    stages = {group.source.stage for group in groups}
    lacking = next((stage for stage in ("finetune", "pretrain") if stage not in stages), None)
    if lacking is None or not groups:  # both exist, but all samples of one failed
        return NothingToScoreError(fact, "see the reasons in the SQL view `failures`")
    sketcher, checkpoint = groups[0].sketcher, groups[0].checkpoint
    return NothingToScoreError(fact, for_sketches(db, sketcher, checkpoint, stages=(lacking,)))
