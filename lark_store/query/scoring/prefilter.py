"""Candidates: the samples of large sources nearest to the queries; an ingest can be limited to them.

For each source, the union over queries of the n nearest samples, by BM25 or by the cosine of embeddings. By BM25 a
sample without a common word is never near, whatever n is. Ties are broken by id, so the same store gives the same
candidates.

Shape letters: Q queries, N samples of a source, B of a block, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from sqlalchemy import select

from lark_store.errors import InputError
from lark_store.query.scoring.bm25 import corpus_sha256, open_lexical, texts_of
from lark_store.results import Chosen
from lark_store.schema.catalog import Source
from lark_store.schema.database import Database, find
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    Block = tuple[list[str], NDArray[np.float32]]

METHODS = ("bm25", "embedding")


@dataclass(frozen=True)
class Nearest:
    """A choice of candidates: the samples of `sources` nearest to those of `queries`, `n` per query."""

    n: int
    method: str
    queries: str
    sources: list[str]

    def chosen(self, ids: Iterable[str], n_samples: int, **extra: Any) -> Chosen:
        """Return one source's candidates, with the facts for the recipe of its runs."""
        sample_ids = frozenset(ids)
        facts = {"n": self.n, "by": self.method, "queries": self.queries}
        facts |= {"n_chosen": len(sample_ids), "n_samples": n_samples}
        return Chosen(sample_ids, facts | extra)


def find_nearest(db: Database, sources: Sequence[str], n: int, method: str, queries: str | None) -> Nearest:
    """Resolve the sources to choose from and the queries. Sources of stage `query` are never limited.

    Raises
    ------
    NameUnknownError, InputError
    """
    if n < 1:
        raise InputError(f"`--candidates` must be at least 1, not {n}", "try `--candidates 2000`, or leave it out")
    if method not in METHODS:
        methods = " or ".join(f"`{name}`" for name in METHODS)
        raise InputError(f"candidates can't be chosen by `{method}`", f"use {methods}")
    with db.session() as session:
        limited = [name for name in sources if find(session, Source, name).stage != "query"]
        query_sources = list(session.scalars(select(Source.name).where(Source.stage == "query").order_by(Source.id)))
        if queries is not None and find(session, Source, queries).stage != "query":
            raise InputError(f"source `{queries}` is not of stage `query`", "choose a source of stage `query`")
    if not limited:
        listed = ", ".join(f"`{name}`" for name in sources)
        raise InputError(f"`--candidates` does not apply to query sources: {listed}", "leave out `--candidates`")
    if queries is None and not query_sources:
        raise InputError("there are no queries to choose candidates for", "add a source of stage `query`")
    if queries is None and len(query_sources) > 1:
        raise InputError("several sources have queries", f"choose one with `--queries`: {', '.join(query_sources)}")
    nearest = Nearest(n, method, queries or query_sources[0], limited)
    if not _ids(db, nearest.queries):
        raise InputError(f"the query source `{nearest.queries}` is empty", "add samples with `lark-store source add`")
    return nearest


def _ids(db: Database, source: str) -> list[str]:
    return db.vectors.read("samples", ["sample_id"], where(source=source))["sample_id"].to_list()


def by_words(db: Database, nearest: Nearest) -> dict[str, Chosen]:
    """Choose candidates by BM25 over all samples of the store except queries.

    Raises
    ------
    InputError
        No sample of a source has a word in common with any query.
    """
    lexical = open_lexical(db, "bm25")
    numbered = lexical.documents.with_row_index("_document").sort("source", "sample_id")
    places = {name: numbered.filter(source=name)["_document"].to_numpy() for name in nearest.sources}
    documents_of: dict[str, set[int]] = {name: set() for name in nearest.sources}
    for text in texts_of(db, nearest.queries, _ids(db, nearest.queries)):
        score_N = lexical.scores([text])[0]
        for name, numbers in places.items():
            best = numbers[highest(score_N[numbers], nearest.n)]
            documents_of[name].update(best[score_N[best] > 0].tolist())
    corpus = corpus_sha256(db)
    candidates = {}
    for name, documents in documents_of.items():
        if len(places[name]) and not documents:
            raise InputError(
                f"no sample of `{name}` has a word in common with the queries `{nearest.queries}`",
                "use `--by embedding`, or leave out `--candidates`",
            )
        ids = lexical.documents["sample_id"].gather(pl.Series(sorted(documents), dtype=pl.UInt32))
        candidates[name] = nearest.chosen(ids, len(places[name]), corpus_sha256=corpus)
    return candidates


def by_vectors(
    nearest: Nearest, blocks: Callable[[str], Iterable[Block]], encoder: dict[str, Any]
) -> dict[str, Chosen]:
    """Choose candidates by the cosine of embeddings.

    `blocks` yields the ids and unit vectors, (B, D), of a source's samples; each source is read once for all queries.
    `encoder` has the encoder's facts for the recipe.
    """
    queries_QD = np.concatenate([unit_BD for _, unit_BD in blocks(nearest.queries)])
    candidates = {}
    for name in nearest.sources:
        ids, numbers = _nearest_of(queries_QD, blocks(name), nearest.n)
        candidates[name] = nearest.chosen((ids[number] for number in numbers), len(ids), **encoder)
    return candidates


def _nearest_of(
    queries_QD: NDArray[np.float32], blocks: Iterable[Block], n: int
) -> tuple[list[str], NDArray[np.int32]]:
    """Return all ids of a source, and the numbers of the samples among the n nearest of any query."""
    ids: list[str] = []
    score_QN = np.empty((len(queries_QD), 0), np.float32)
    number_QN = np.empty((len(queries_QD), 0), np.int32)
    for names, unit_BD in blocks:
        numbers = np.arange(len(ids), len(ids) + len(names), dtype=np.int32)
        ids += names
        score_QN = np.concatenate([score_QN, queries_QD @ unit_BD.T], axis=1)
        number_QN = np.concatenate([number_QN, np.broadcast_to(numbers, (len(queries_QD), len(numbers)))], axis=1)
        best = np.stack([highest(score_N, n) for score_N in score_QN])
        score_QN = np.take_along_axis(score_QN, best, axis=1)
        number_QN = np.take_along_axis(number_QN, best, axis=1)
    return ids, np.unique(number_QN)


def highest(score_N: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    """Return the positions of the n highest scores, unordered; earlier ones win ties.

    >>> highest(np.array([1, 3, 3, 2, 3]), 2).tolist()
    [1, 2]
    """
    if n >= len(score_N):
        return np.arange(len(score_N))
    least = np.partition(score_N, len(score_N) - n)[len(score_N) - n]
    above, level = np.flatnonzero(score_N > least), np.flatnonzero(score_N == least)
    return np.concatenate([above, level[: n - len(above)]])
