"""`top`: the samples with the most influence on a query, from the sketches themselves, with their statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.errors import InputError, NameUnknownError, NothingToScoreError
from lark_store.query.coverage import notes_of
from lark_store.query.groups import searched_groups
from lark_store.query.index import find_index
from lark_store.query.methods import BETWEEN
from lark_store.query.scores import Asked, Scores, Search, query_ids
from lark_store.query.significance import benjamini_hochberg_within, sign_null_p, source_null_p
from lark_store.schema.records import Hits
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from lark_store.query.groups import Group, Question, Wanted
    from lark_store.schema.catalog import SearchIndex
    from lark_store.schema.database import Database
    from lark_store.schema.vectors import VectorStore

    Columns = dict[str, NDArray[Any] | None]

_MOST_HITS = 1_000_000
NULLS = ("sources", "signs", "none")


@dataclass(frozen=True)
class Ranking:
    """How to rank; see `Store.top`. `null_groups` are those of a source that is named as the null.

    `check` is called now and then, to raise where the search must end.
    """

    k: int = 10
    opponents: bool = False
    condition: str | None = None
    null: str | None = None
    null_groups: tuple[Group, ...] = ()
    approximate: bool = False
    device: str = "auto"
    check: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.k <= _MOST_HITS:
            raise InputError(f"k = {self.k} is not from 1 to {_MOST_HITS}", "try `-k 10`")


def top(
    db: Database, queries: Sequence[str], questions: list[Question], ranking: Ranking, *, lenient: bool = False
) -> dict[str, Hits]:
    """Rank the rows of the questions' groups for each query; see `Store.top`.

    A query that has a sample and no sketch is an error, or with `lenient` has no answer.
    """
    found: dict[str, Hits] = {}
    for question, ids in find_queries(db, queries, questions, lenient=lenient):
        searcher = _Searcher(db, question, ranking)
        for asked in searcher.search.blocks(ids):
            found |= {hits.query_id: hits for hits in searcher.hits(asked)}
    return found


def top_of_new(db: Database, asked: Asked, question: Question, ranking: Ranking, made: tuple[str, str]) -> Hits:
    """Rank the rows of a question's groups for a text that is not in the store.

    `made` names the checkpoint and the variant that it was sketched at and as.
    """
    (hits,) = _Searcher(db, question, ranking, made).hits(asked)
    return hits


def null_groups(db: Database, wanted: Wanted, source: str) -> tuple[Group, ...]:
    """Return the groups of a source that is named as the null, at each checkpoint.

    Raises
    ------
    NameUnknownError, NothingToScoreError
    """
    at = [replace(wanted, checkpoints=[name], sources=[source]) for name in wanted.checkpoints]
    return tuple(group for each in at for group in searched_groups(db, each))


class _Searcher:
    """Answers queries of one question."""

    def __init__(self, db: Database, question: Question, ranking: Ranking, made: tuple[str, str] | None = None) -> None:
        self.db, self.question, self.ranking = db, question, ranking
        self.query_at, self.query_as = made or (question.queries.checkpoint.name, question.queries.variant.name)
        self.search = Search(
            db,
            question,
            condition=ranking.condition,
            null_groups=ranking.null_groups,
            device=ranking.device,
            check=ranking.check,
        )
        self.notes = notes_of(db, [group for term in question.terms for group in term.groups])
        rows = self.search.rows
        groups = rows.groups
        if rows.frame.is_empty() or self.search.null_only.all():
            raise nothing_searched(ranking.condition)
        sources = sorted({group.source.name for group in groups})
        variants = sorted({group.variant.name for group in groups})
        of = rows.frame["group"].to_numpy()
        self.source_N = np.array([sources.index(group.source.name) for group in groups])[of]
        self.variant_N = np.array([variants.index(group.variant.name) for group in groups])[of]
        self.stages = [group.source.stage for group in groups]
        self.null = self._null(sources)
        self.null_source = sources.index(self.null) if self.null in sources else None

    def _null(self, sources: list[str]) -> str:
        """Return what hits are held against."""
        wanted, method = self.ranking.null, self.question.method
        signs = method.is_adding
        if self.ranking.approximate:
            if wanted not in {None, "none"}:
                raise InputError("an approximate search has no p-values", "leave out `--approximate`")
            return "none"
        if wanted is None:
            return "sources" if len(set(self.source_N)) > 1 else "signs" if signs else "none"
        if wanted == "signs" and not signs:
            raise InputError(f"`{method.name}` has no signs to shuffle", "`--null sources`, or the name of a source")
        if wanted not in {*NULLS, *sources}:
            raise InputError(f"`{wanted}` is no null", "`sources`, `signs`, `none` or the name of a source")
        return wanted

    def hits(self, asked: Asked) -> Iterator[Hits]:
        """Yield the answer to each query of a block."""
        index = self._index() if self.ranking.approximate else None
        if index:
            for number in range(len(asked.ids)):
                yield self._approximate(asked, number, index)
            return
        scores = self.search.scores(asked, scales=self.null == "signs")
        allowed = np.flatnonzero(~self.search.null_only)
        for number, query in enumerate(asked.ids):
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
        """Return the numbers of the k best rows among those allowed, best first; ties by group and sample id."""
        score = score_N[allowed] if self.ranking.opponents else -score_N[allowed]
        k = min(self.ranking.k, len(score))
        threshold = np.partition(score, k - 1)[k - 1]
        near = allowed[score <= threshold]
        frame = self.search.rows.frame[near].select("group", "sample_id")
        frame = frame.with_columns(score=pl.Series(score_N[near]), number=pl.Series(near))
        descending = [not self.ranking.opponents, False, False]
        frame = frame.sort(["score", "group", "sample_id"], descending=descending)
        numbers: NDArray[np.int64] = frame.head(k)["number"].to_numpy()
        return numbers

    def _significance(self, scores: Scores, number: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return each row's p- and q-value for one query, (N) both; NaN where it is not tested."""
        score = scores.score[number]
        if self.null == "none":
            nothing = np.full(len(score), np.nan)
            return nothing, nothing
        if self.null == "signs":
            assert scores.scale is not None
            p = sign_null_p(-score if self.ranking.opponents else score, scores.scale[number])
        else:
            against = None if self.null_source is None else {self.null_source}
            how = {"opponents": self.ranking.opponents, "null_sources": against}
            p = source_null_p(score, self.source_N, self.variant_N, **how)  # type: ignore[arg-type]
        p[self.search.null_only] = np.nan
        return p, benjamini_hochberg_within(p, self.search.rows.frame["group"].to_numpy())

    def _index(self) -> SearchIndex:
        if not self.question.method.is_adding or self.ranking.null_groups:
            raise InputError(
                f"`{self.question.method.name}` has no approximate search",
                "`--approximate` goes with `cosine` and `dot`",
            )
        return find_index(self.db, self.question.groups[0].fingerprint, self.question.groups[0].sketcher.name)

    def _approximate(self, asked: Asked, number: int, index: SearchIndex) -> Hits:
        """Find candidates by their codes and score those exactly."""
        from lark_store.query.candidates import estimates

        rows, sketches = self.search.rows, asked.sketches[0]
        guess = estimates(self.db, rows, sketches.unit_QK[number].numpy())
        if self.question.method.base == "dot":
            guess *= rows.frame["grad_norm"].to_numpy()
        n = min(len(rows), max(index.candidates, index.candidates * self.ranking.k // 10))
        chosen = np.argpartition(guess if self.ranking.opponents else -guess, n - 1)[:n]
        query = type(sketches)([asked.ids[number]], sketches.unit_QK[number : number + 1], sketches.norm_Q[number:][:1])
        made = self.search.of_candidates(query, chosen)
        score = np.full(len(rows), np.nan, np.float32)
        score[chosen] = made.score[0]
        noise = np.full(len(rows), np.nan, np.float32)
        noise[chosen] = np.nan if made.noise is None else made.noise[0]
        best = self._best(score, chosen)
        columns: Columns = {"score": score[best], "noise": noise[best], "p_value": None, "q_value": None}
        return self._answer(asked.ids[number], best, columns, index)

    def _answer(self, query: str, best: NDArray[np.int64], columns: Columns, index: SearchIndex | None) -> Hits:
        rows, question = self.search.rows, self.question
        picked = rows.frame[best]
        frame = pl.DataFrame({"rank": np.arange(1, len(best) + 1, dtype=np.int32)})
        frame = frame.with_columns(pl.lit(v).alias(n) if v is None else pl.Series(n, v) for n, v in columns.items())
        frame = frame.with_columns(pl.col("noise", "p_value", "q_value").cast(pl.Float64).fill_nan(None))
        stages = pl.Series("stage", [self.stages[group] for group in picked["group"]], dtype=pl.String)
        frame = frame.with_columns(picked["source"], stages, picked["variant"], picked["sample_id"])
        keys = ["source", "sample_id"]
        frame = frame.join(texts_of_frame(self.db.vectors, frame), on=keys, how="left", maintain_order="left")
        return Hits(
            frame=frame,
            query_id=query,
            checkpoint=BETWEEN.join(question.checkpoints),
            query_checkpoint=self.query_at,
            query_variant=self.query_as,
            method=question.method.name,
            score=question.label,
            n_searched=len(rows) - int(self.search.null_only.sum()),
            ingest_runs=sorted({run for rows in self.search.of_terms for group in rows.groups for run in group.runs}),
            exact=index is None,
            condition=self.ranking.condition,
            null=self.null,
            recall=index.recall if index else None,
            candidates=index.candidates if index else None,
            notes=self.notes,
        )


def _ranks(score_N: NDArray[np.float32], chosen: NDArray[np.int64], among: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the ranks, from 1, that some rows have among others by one score; ties share the best."""
    below = np.searchsorted(np.sort(-score_N[among]), -score_N[chosen], side="left")
    return (below + 1).astype(np.int32)


def nothing_searched(condition: str | None) -> NothingToScoreError:
    """Return the error that no row is searched."""
    if condition is not None:
        return NothingToScoreError(f"no sketch satisfies `{condition}`", "count with `lark-store sql` what is there")
    return NothingToScoreError(
        "no sample of these groups has a sketch: all of them failed", "the SQL view `failures` has the reasons"
    )


def find_queries(
    db: Database, queries: Sequence[str], questions: list[Question], *, lenient: bool
) -> list[tuple[Question, list[str]]]:
    """Return each question with those of the queries that its query source holds."""
    holding: dict[str, list[Question]] = {query: [] for query in queries}
    for question in questions:
        for query in holding.keys() & ids_of(db, question):
            holding[query].append(question)
    for query, found in holding.items():
        if not found and not (lenient and query in _samples(db, questions)):
            known = [name for question in questions for name in ids_of(db, question)]
            raise NameUnknownError.of("query", query, known, "ingest a source of stage `query`")
        if len(found) > 1:
            names = ", ".join(f"`{q.queries.source.name}`" for q in found)
            raise NothingToScoreError(f"query `{query}` is in {names}", "say which with `--queries NAME`")
    return [
        (question, mine)
        for question in questions
        if (mine := [query for query, found in holding.items() if question in found])
    ]


def ids_of(db: Database, question: Question) -> set[str]:
    """Return the ids of a question's queries."""
    if not question.method.reads_sketches:  # the text is enough
        source = question.queries.source.name
        return set(db.vectors.read("samples", ["sample_id"], where(source=source))["sample_id"])
    return set(query_ids(db, question))


def _samples(db: Database, questions: list[Question]) -> set[str]:
    """Return the ids of all samples of the questions' query sources."""
    filter_ = where(source=[question.queries.source.name for question in questions])
    return set(db.vectors.read("samples", ["sample_id"], filter_)["sample_id"])


def texts_of_frame(vectors: VectorStore, frame: pl.DataFrame) -> pl.DataFrame:
    """Return source, sample_id and text (a prompt and its response as one) of the samples in a frame."""
    by_source = frame.group_by("source", maintain_order=True).agg(pl.col("sample_id").unique())
    wanted = [where(source=source, sample_id=ids) for source, ids in by_source.iter_rows()]
    columns = ["source", "sample_id", "prompt", "response", "text"]
    found = vectors.read("samples", columns, " OR ".join(f"({each})" for each in wanted) or "false")
    joined = pl.concat_str(["prompt", "response"], separator="\n")
    return found.select("source", "sample_id", text=pl.coalesce("text", joined))
