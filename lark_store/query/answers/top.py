"""`top`: rank samples by their influence on a query, from the sketches, with statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.core.names import SUM_SEPARATOR
from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.nulls import find_null
from lark_store.query.nulls.base import TestedScores
from lark_store.query.scoring.ann_index import find_index
from lark_store.query.scoring.search import Search, query_ids
from lark_store.query.select.coverage import notes_of
from lark_store.query.select.queries import unknown_query
from lark_store.query.select.resolve import searched_groups
from lark_store.results import Hits
from lark_store.schema.chats import CONTENT, shown_text
from lark_store.schema.vectors import where
from lark_store.specs import RankSpec
from lark_store.stats.significance import benjamini_hochberg_within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from lark_store.query.scoring.products import QueryBatch, Scores
    from lark_store.query.select.resolve import Group, Question
    from lark_store.schema.catalog import SearchIndex
    from lark_store.schema.database import Database
    from lark_store.schema.vectors import VectorStore
    from lark_store.specs import SearchSpec

    Columns = dict[str, NDArray[Any] | None]


@dataclass(frozen=True, kw_only=True)
class Ranking(RankSpec):
    """A ranking in a store. `null_groups` are the groups of a null source given by name.

    `without` is the source and the id of a sample to leave out. Without `has_texts`, hits have no texts, which are
    read for each query.
    `check` is called regularly and raises to end the search.
    """

    null_groups: tuple[Group, ...] = ()
    without: tuple[str, str] | None = None
    device: str = "auto"
    check: Callable[[], None] | None = None
    has_texts: bool = True


def top(
    db: Database, queries: Sequence[str], questions: list[Question], ranking: Ranking, *, lenient: bool = False
) -> dict[str, Hits]:
    """Rank the rows of the questions' groups for each query; see `Store.top`.

    A query with a sample but no sketch is an error, or has no answer if `lenient`.
    """
    hits_by_query: dict[str, Hits] = {}
    for question, ids in find_queries(db, queries, questions, lenient=lenient):
        searcher = _Searcher(db, question, ranking)
        for batch in searcher.search.blocks(ids):
            hits_by_query |= {hits.query_id: hits for hits in searcher.hits(batch)}
    return hits_by_query


def top_of_new(
    db: Database, batch: QueryBatch, question: Question, ranking: Ranking, sketched_as: tuple[str, str]
) -> list[Hits]:
    """Rank the rows of a question's groups for each text of a batch, none of which is in the store.

    `sketched_as` names the checkpoint and variant of their sketches.
    """
    return list(_Searcher(db, question, ranking, sketched_as).hits(batch))


def null_groups(db: Database, spec: SearchSpec, source: str) -> tuple[Group, ...]:
    """Return the groups of a null source at each checkpoint.

    Raises
    ------
    NameUnknownError, NothingToScoreError
    """
    specs = [replace(spec, checkpoints=[name], sources=[source]) for name in spec.checkpoints]
    return tuple(group for null_spec in specs for group in searched_groups(db, null_spec))


class _Searcher:
    """Answers the queries of one question."""

    def __init__(
        self, db: Database, question: Question, ranking: Ranking, sketched_as: tuple[str, str] | None = None
    ) -> None:
        self.db, self.question, self.ranking = db, question, ranking
        self.query_at, self.query_as = sketched_as or (question.queries.checkpoint.name, question.queries.variant.name)
        self.search = Search(
            db,
            question,
            condition=ranking.where,
            null_groups=ranking.null_groups,
            device=ranking.device,
            check=ranking.check,
            without=ranking.without,
        )
        rows = self.search.rows
        groups = rows.groups
        if rows.frame.is_empty() or self.search.null_only.all():
            raise nothing_searched(ranking.where, left_out=bool(self.search.n_left_out))
        sources = sorted({group.source.name for group in groups})
        variants = sorted({group.variant.name for group in groups})
        group_N = rows.frame["group"].to_numpy()
        self.source_N = np.array([sources.index(group.source.name) for group in groups])[group_N]
        self.variant_N = np.array([variants.index(group.variant.name) for group in groups])[group_N]
        self.stages = [group.source.stage for group in groups]
        self.null = self._null_name()
        self.null_test = find_null(self.null, question.method, sources)
        coverage = notes_of(db, [group for term in question.terms for group in term.groups])
        left_out = ("the query itself is left out of the hits",) if self.search.n_left_out else ()
        self.notes = (*left_out, *coverage, *self.search.notes)
        self.null_source = sources.index(self.null) if self.null in sources else None

    def _null_name(self) -> str:
        """Return the name of the null used for p-values."""
        null = self.ranking.null
        if self.ranking.approximate:
            if null not in {None, "none"}:
                raise InputError("an approximate search has no p-values", "leave out `--approximate`, or `--null`")
            return "none"
        if null is None:
            has_signs = self.question.method.is_adding
            return "sources" if len(set(self.source_N)) > 1 else "signs" if has_signs else "none"
        return null

    def hits(self, batch: QueryBatch) -> Iterator[Hits]:
        """Yield the answer to each query of a batch."""
        index = self._index() if self.ranking.approximate else None
        if index:
            for number in range(len(batch.ids)):
                yield self._approximate(batch, number, index)
            return
        scores = self.search.scores(batch, scales=self.null_test.needs_scales)
        allowed = np.flatnonzero(~self.search.null_only)
        for number, query in enumerate(batch.ids):
            best = self._best(scores.score[number], allowed)
            p, q = self._significance(scores, number)
            columns: Columns = {"score": scores.score[number][best]}
            columns["noise"] = None if scores.noise is None else scores.noise[number][best]
            columns |= {"p_value": p[best], "q_value": q[best]}
            for name, part in scores.parts.items():
                columns[name] = part[number][best]
                columns[f"{name}_rank"] = _ranks(part[number], best, allowed)
            yield self._answer(query, best, columns, None)

    def _best(self, score_N: NDArray[np.float32], allowed: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers of the k best allowed rows, best first; ties by group and sample id."""
        score = score_N[allowed] if self.ranking.opponents else -score_N[allowed]
        k = min(self.ranking.k, len(score))
        threshold = np.partition(score, k - 1)[k - 1]
        is_near = score <= threshold
        near = allowed[is_near]
        frame = self.search.rows.frame[near].select("group", "sample_id")
        frame = frame.with_columns(score=pl.Series(score[is_near]), number=pl.Series(near))
        numbers: NDArray[np.int64] = frame.sort("score", "group", "sample_id").head(k)["number"].to_numpy()
        return numbers

    def _significance(self, scores: Scores, number: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return each row's p- and q-value for one query, (N) both; NaN where not tested."""
        score = scores.score[number]
        scale = None if scores.scale is None else scores.scale[number]
        null_sources = None if self.null_source is None else {self.null_source}
        tested = TestedScores(score, self.source_N, self.variant_N, self.ranking.opponents, scale, null_sources)
        p = self.null_test.p_values(tested)
        if p is None:
            untested = np.full(len(score), np.nan)
            return untested, untested
        p[self.search.null_only] = np.nan
        return p, benjamini_hochberg_within(p, self.search.rows.frame["group"].to_numpy())

    def _index(self) -> SearchIndex:
        if not self.question.method.is_adding or self.ranking.null_groups:
            raise InputError(
                f"`{self.question.method.name}` has no approximate search",
                "use `cosine` or `dot`, or leave out `--approximate`",
            )
        return find_index(self.db, self.question.groups[0].fingerprint, self.question.groups[0].sketcher.name)

    def _approximate(self, batch: QueryBatch, number: int, index: SearchIndex) -> Hits:
        """Select candidates by their codes and score them exactly."""
        from lark_store.query.scoring.ann import estimates

        rows, sketches = self.search.rows, batch.sketches[0]
        guess = estimates(self.db, rows, sketches.unit_QK[number])
        norms = (np.ones(1, np.float32), rows.frame["grad_norm"].to_numpy())
        guess = self.question.method.scoring.weighted(guess[None], *norms)[0]
        n = min(len(rows), max(index.candidates, index.candidates * self.ranking.k // 10))
        candidates = np.argpartition(guess if self.ranking.opponents else -guess, n - 1)[:n]
        query = type(sketches)([batch.ids[number]], sketches.unit_QK[[number]], sketches.norm_Q[[number]])
        exact = self.search.of_candidates(query, candidates)
        score = np.full(len(rows), np.nan, np.float32)
        score[candidates] = exact.score[0]
        noise = np.full(len(rows), np.nan, np.float32)
        noise[candidates] = np.nan if exact.noise is None else exact.noise[0]
        best = self._best(score, candidates)
        columns: Columns = {"score": score[best], "noise": noise[best], "p_value": None, "q_value": None}
        return self._answer(batch.ids[number], best, columns, index)

    def _answer(self, query: str, best: NDArray[np.int64], columns: Columns, index: SearchIndex | None) -> Hits:
        rows, question = self.search.rows, self.question
        picked = rows.frame[best]
        frame = pl.DataFrame({"rank": np.arange(1, len(best) + 1, dtype=np.int32)})
        frame = frame.with_columns(pl.lit(v).alias(n) if v is None else pl.Series(n, v) for n, v in columns.items())
        frame = frame.with_columns(pl.col("noise", "p_value", "q_value").cast(pl.Float64).fill_nan(None))
        stages = pl.Series("stage", [self.stages[group] for group in picked["group"]], dtype=pl.String)
        frame = frame.with_columns(picked["source"], stages, picked["variant"], picked["sample_id"])
        if self.ranking.has_texts:
            keys = ["source", "sample_id"]
            frame = frame.join(texts_of_frame(self.db.vectors, frame), on=keys, how="left", maintain_order="left")
        return Hits(
            frame=frame,
            query_id=query,
            checkpoint=SUM_SEPARATOR.join(question.checkpoints),
            query_checkpoint=self.query_at,
            query_variant=self.query_as,
            method=question.method.name,
            score=question.label,
            n_searched=len(rows) - int(self.search.null_only.sum()),
            ingest_runs=sorted({run for rows in self.search.of_terms for group in rows.groups for run in group.runs}),
            exact=index is None,
            condition=self.ranking.where,
            null=self.null,
            recall=index.recall if index else None,
            candidates=index.candidates if index else None,
            notes=self.notes,
            scale=question.method.scale,
        )


def _ranks(score_N: NDArray[np.float32], rows: NDArray[np.int64], population: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the ranks, from 1, of some rows among others by one score; ties share the best rank."""
    below = np.searchsorted(np.sort(-score_N[population]), -score_N[rows], side="left")
    return (below + 1).astype(np.int32)


def nothing_searched(condition: str | None, *, left_out: bool = False) -> NothingToScoreError:
    """Return the error for an empty search; `left_out`: the query itself was among the samples."""
    if left_out:
        return NothingToScoreError("the only searched sample is the query itself", "search other samples too")
    if condition is not None:
        return NothingToScoreError(f"no sketch satisfies `{condition}`", "explore the values with `lark-store sql`")
    return NothingToScoreError(
        "no sample of these groups has a sketch: all of them failed", "see the reasons in the SQL view `failures`"
    )


def find_queries(
    db: Database, queries: Sequence[str], questions: list[Question], *, lenient: bool
) -> list[tuple[Question, list[str]]]:
    """Return each question with the queries in its query source."""
    holding: dict[str, list[Question]] = {query: [] for query in queries}
    for question in questions:
        for query in holding.keys() & ids_of(db, question):
            holding[query].append(question)
    for query, holders in holding.items():
        if not holders and not (lenient and query in _samples(db, questions)):
            raise unknown_query(db, query, [name for question in questions for name in ids_of(db, question)])
        if len(holders) > 1:
            names = ", ".join(f"`{q.queries.source.name}`" for q in holders)
            raise NothingToScoreError(f"query `{query}` is in {names}", "choose one with `--queries NAME`")
    return [
        (question, ids)
        for question in questions
        if (ids := [query for query, holders in holding.items() if question in holders])
    ]


def ids_of(db: Database, question: Question) -> set[str]:
    """Return the ids of a question's queries."""
    if not question.method.reads_sketches:  # needs only the text
        source = question.queries.source.name
        return set(db.vectors.read("samples", ["sample_id"], where(source=source))["sample_id"])
    return set(query_ids(db, question))


def _samples(db: Database, questions: list[Question]) -> set[str]:
    """Return the ids of all samples of the questions' query sources."""
    filter_ = where(source=[question.queries.source.name for question in questions])
    return set(db.vectors.read("samples", ["sample_id"], filter_)["sample_id"])


def texts_of_frame(vectors: VectorStore, frame: pl.DataFrame) -> pl.DataFrame:
    """Return source, sample_id and text of a frame's samples: a chat as dialogue, a prompt and its response joined."""
    by_source = frame.group_by("source", maintain_order=True).agg(pl.col("sample_id").unique())
    conditions = [where(source=source, sample_id=ids) for source, ids in by_source.iter_rows()]
    columns = ["source", "sample_id", *CONTENT]
    samples = vectors.read("samples", columns, " OR ".join(f"({condition})" for condition in conditions) or "false")
    return samples.select("source", "sample_id", text=shown_text())
