"""`groups`: influence per value of a key of the samples, for one query or over many.

Shape letters: Q queries, N rows, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.core.text import coded, joined
from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.answers.top import find_queries, ids_of, nothing_searched
from lark_store.query.methods import Method
from lark_store.query.scoring.groups import HOW, GroupScores, group_scores
from lark_store.query.scoring.search import Search
from lark_store.query.select.coverage import notes_of
from lark_store.query.select.keys import Grouping, grouped
from lark_store.query.select.resolve import ask, mixed_variants
from lark_store.query.sql.columns import GROUPS, frame_schema
from lark_store.specs import Compute, GroupsSpec, SearchSpec
from lark_store.stats.bootstrap import Figure, evaluate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lark_store.query.select.resolve import Question
    from lark_store.schema.database import Database

_RESAMPLED = 500  # samples of a group; beyond, mean ± 1.96 standard errors, the bootstrap's own limit
_NORMAL_95 = 1.959964
_FLOATS = [name for name, column in GROUPS.items() if column.type == "DOUBLE"]


@dataclass(frozen=True, kw_only=True)
class Grouped(GroupsSpec):
    """Groups in a store, of the rows that satisfy `where`. `check` is called regularly and raises to end the search."""

    where: str | None = None
    device: str = "auto"
    memory: int = Compute.memory
    check: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise InputError(f"groups have no `{self.how}`", f"`--how` is {joined(coded(HOW), 'or')}")


@dataclass(frozen=True)
class Scored:
    """The groups of a question's rows and their scores, with the notes on both."""

    question: Question
    grouping: Grouping
    scores: GroupScores
    notes: tuple[str, ...]


def groups(db: Database, query_ids: Sequence[str] | None, spec: SearchSpec, grouped_by: Grouped) -> pl.DataFrame:
    """Score the groups at each checkpoint, or for a sum of them; see `Store.groups`."""
    rows: list[dict[str, Any]] = []
    questions = []
    for scored in scored_groups(db, query_ids, spec, grouped_by):
        rows += _rows(scored, grouped_by)
        questions.append(scored.question)
    mixed = mixed_variants(questions)
    for row in rows:
        row["note"] = "\nnote: ".join([*row["note"], *mixed]) or None
    frame = pl.DataFrame(rows, schema=frame_schema(GROUPS))
    return frame.with_columns(pl.col(*_FLOATS).fill_nan(None))


def scored_groups(
    db: Database, query_ids: Sequence[str] | None, spec: SearchSpec, grouped_by: Grouped
) -> Iterator[Scored]:
    """Yield the scored groups of each source of queries, checkpoint by checkpoint.

    Raises
    ------
    NameUnknownError, NothingToScoreError, InputError, QueryError
    """
    is_sum = Method.of(spec.method, spec.over_checkpoints).over is not None
    passes = [spec.checkpoints] if is_sum else [[name] for name in dict.fromkeys(spec.checkpoints)]
    for names in passes:
        questions = ask(db, replace(spec, checkpoints=names))
        if query_ids is None:
            asked = [(question, sorted(ids_of(db, question))) for question in questions]
        else:
            asked = find_queries(db, list(dict.fromkeys(query_ids)), questions, lenient=False)
        if not any(ids for _, ids in asked):
            raise NothingToScoreError(f"no query has a sketch at {joined(coded(names), 'and')}", "ingest the queries")
        yield from (_scored(db, question, ids, grouped_by) for question, ids in asked if ids)


def _scored(db: Database, question: Question, ids: list[str], grouped_by: Grouped) -> Scored:
    search = Search(
        db,
        question,
        condition=grouped_by.where,
        device=grouped_by.device,
        memory=grouped_by.memory,
        check=grouped_by.check,
    )
    n = len(search.rows)
    if not n:
        raise nothing_searched(grouped_by.where)
    grouping = grouped(db, search.rows, grouped_by.by)
    scores = group_scores(search, ids, grouping.group_N, grouped_by.how)
    lacking = [
        f"{n_without:,} of {n:,} searched samples have no `{key}`: their group is null"
        for key, n_without in grouping.n_without.items()
    ]
    coverage = notes_of(db, [group for term in question.terms for group in term.groups])
    return Scored(question, grouping, scores, (*coverage, *search.notes, *lacking))


def _rows(scored: Scored, grouped_by: Grouped) -> list[dict[str, Any]]:
    """Return a row per group, the highest value first; `note` is a list of notes."""
    question, scores = scored.question, scored.scores
    n_queries = len(scores.ids)
    wins_G = (scores.value_QG == scores.value_QG.max(axis=1, keepdims=True)).mean(axis=0)
    facts = {
        "checkpoint": question.terms[-1].checkpoint.name,
        "queries": question.queries.source.name,
        "query_id": scores.ids[0] if n_queries == 1 else None,
        "n_queries": n_queries,
        "query_checkpoint": question.queries.checkpoint.name,
        "query_variant": question.queries.variant.name,
        "scored_by": question.label,
        "note": scored.notes,
    }
    figures = _over_samples(scored, grouped_by.how) if n_queries == 1 else _over_queries(scores)
    rows = []
    for group, (names, figure) in enumerate(zip(scored.grouping.values, figures, strict=True)):
        name, subgroup = (*names, None)[:2]
        error = np.nan if scores.noise_QG is None else scores.noise_QG[:, group].mean()
        is_defined = not np.isnan(figure["low"])
        over = ("samples" if n_queries == 1 else "queries") if is_defined else None
        rows.append(
            facts
            | {"group_name": name, "subgroup_name": subgroup, "n_samples": int(scores.n_G[group])}
            | {"interval_over": over, "sketch_error": error, "wins": wins_G[group]}
            | {key: figure[key] for key in ("value", "low", "high")}
        )
    return sorted(rows, key=lambda row: -row["value"])


def _over_queries(scores: GroupScores) -> list[dict[str, Any]]:
    """Return each group's mean over queries, with its bootstrap interval over them."""
    return evaluate([Figure({}, column) for column in scores.value_QG.T])


def _over_samples(scored: Scored, how: str) -> list[dict[str, Any]]:
    """Return each group's value for one query, with its interval over the group's samples; none for a maximum."""
    scores = scored.scores
    assert scores.score_N is not None
    undefined = {"low": np.nan, "high": np.nan}
    if how == "max":
        return [{"value": value} | undefined for value in scores.value_QG[0]]
    order = np.argsort(scored.grouping.group_N, kind="stable")
    parts = np.split(scores.score_N[order], np.cumsum(scores.n_G)[:-1])
    means = [_normal(part) if len(part) > _RESAMPLED else None for part in parts]
    resampled = iter(evaluate([Figure({}, part) for part, mean in zip(parts, means, strict=True) if mean is None]))
    figures = [next(resampled) if mean is None else mean for mean in means]
    if how == "sum":
        figures = [{key: len(part) * f[key] for key in ("low", "high")} for part, f in zip(parts, figures, strict=True)]
    return [f | {"value": value} for f, value in zip(figures, scores.value_QG[0], strict=True)]


def _normal(scores_N: Any) -> dict[str, Any]:
    """Return the normal interval of a mean."""
    reach = _NORMAL_95 * scores_N.std(ddof=1) / np.sqrt(len(scores_N))
    return {"low": scores_N.mean() - reach, "high": scores_N.mean() + reach}
