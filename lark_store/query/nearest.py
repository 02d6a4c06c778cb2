"""Candidates: the samples of large sources that are nearest to some queries, to which an ingest keeps.

Of each source the union over queries of each one's n nearest, by BM25 or by the cosine of embeddings. A sample with no
word in common with a query is not near to it by BM25, whatever n is; among equal scores the first ids are taken, so
that the same store gives the same candidates.

Shape letters: Q queries, N samples of a source, B of a block, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from sqlalchemy import select

from lark_store.errors import InputError
from lark_store.query.lexical import corpus_sha256, open_lexical, texts_of
from lark_store.schema.catalog import Source
from lark_store.schema.database import Database, find
from lark_store.schema.records import Chosen
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    Block = tuple[list[str], NDArray[np.float32]]

BY = ("bm25", "embedding")


@dataclass(frozen=True)
class Nearest:
    """Which samples are candidates: those of `sources` nearest to the samples of `queries`, `n` for each query."""

    n: int
    by: str
    queries: str
    sources: list[str]

    def chosen(self, ids: Iterable[str], n_samples: int, **more: Any) -> Chosen:
        """Return the candidates of one source, with how they were found, for the recipe of its runs."""
        kept = frozenset(ids)
        how = {"n": self.n, "by": self.by, "queries": self.queries, "n_chosen": len(kept), "n_samples": n_samples}
        return Chosen(kept, how | more)


def find_nearest(db: Database, sources: Sequence[str], n: int, by: str, queries: str | None) -> Nearest:
    """Resolve what candidates are to be chosen among and for; sources of stage `query` are never cut.

    Raises
    ------
    NameUnknownError, InputError
    """
    if n < 1:
        raise InputError(f"{n} candidates leave nothing to do", "try `--candidates 2000`, or leave it out to take all")
    if by not in BY:
        raise InputError(f"candidates are not chosen by `{by}`", f"by {' or '.join(f'`{name}`' for name in BY)}")
    with db.session() as session:
        cut = [name for name in sources if find(session, Source, name).stage != "query"]
        asking = list(session.scalars(select(Source.name).where(Source.stage == "query").order_by(Source.id)))
        if queries is not None and find(session, Source, queries).stage != "query":
            raise InputError(f"source `{queries}` has not the stage `query`", "queries are samples of such a source")
    if not cut:
        named = ", ".join(f"`{name}`" for name in sources)
        raise InputError(f"queries are always taken whole: {named}", "leave `--candidates` out")
    if queries is None and len(asking) != 1:
        fact = "there are no queries to be near to" if not asking else "candidates of which queries?"
        hint = "add a source of stage `query`" if not asking else f"choose with `--queries`: {', '.join(asking)}"
        raise InputError(fact, hint)
    nearest = Nearest(n, by, queries or asking[0], cut)
    if not _ids(db, nearest.queries):
        raise InputError(f"the queries `{nearest.queries}` are empty", "add samples with `lark-store source add`")
    return nearest


def _ids(db: Database, source: str) -> list[str]:
    return db.vectors.read("samples", ["sample_id"], where(source=source))["sample_id"].to_list()


def by_words(db: Database, nearest: Nearest) -> dict[str, Chosen]:
    """Choose candidates by BM25 over all samples of the store that are no queries.

    Raises
    ------
    InputError
        No sample of a source has a word in common with any query.
    """
    lexical = open_lexical(db, "bm25")
    numbered = lexical.documents.with_row_index("_document").sort("source", "sample_id")
    places = {name: numbered.filter(source=name)["_document"].to_numpy() for name in nearest.sources}
    found: dict[str, set[int]] = {name: set() for name in nearest.sources}
    for text in texts_of(db, nearest.queries, _ids(db, nearest.queries)):
        score_N = lexical.scores([text])[0]
        for name, of in places.items():
            best = of[highest(score_N[of], nearest.n)]
            found[name].update(best[score_N[best] > 0].tolist())
    corpus = corpus_sha256(db)
    chosen = {}
    for name, documents in found.items():
        if len(places[name]) and not documents:
            raise InputError(
                f"no sample of `{name}` has a word in common with the queries `{nearest.queries}`",
                "choose `--by embedding`, or leave `--candidates` out",
            )
        ids = lexical.documents["sample_id"].gather(pl.Series(sorted(documents), dtype=pl.UInt32))
        chosen[name] = nearest.chosen(ids, len(places[name]), corpus_sha256=corpus)
    return chosen


def by_vectors(
    nearest: Nearest, blocks: Callable[[str], Iterable[Block]], encoder: dict[str, Any]
) -> dict[str, Chosen]:
    """Choose candidates by the cosine of embeddings.

    `blocks` yields the ids and unit vectors, (B, D), of a source's samples; each source is read once, for all queries.
    `encoder` is what the recipe is to say of it.
    """
    queries_QD = np.concatenate([unit_BD for _, unit_BD in blocks(nearest.queries)])
    chosen = {}
    for name in nearest.sources:
        ids, numbers = _nearest_of(queries_QD, blocks(name), nearest.n)
        chosen[name] = nearest.chosen((ids[number] for number in numbers), len(ids), **encoder)
    return chosen


def _nearest_of(
    queries_QD: NDArray[np.float32], blocks: Iterable[Block], n: int
) -> tuple[list[str], NDArray[np.int32]]:
    """Return all ids of a source, and the numbers of those that are among the n nearest of a query."""
    ids: list[str] = []
    score_QN = np.empty((len(queries_QD), 0), np.float32)
    number_QN = np.empty((len(queries_QD), 0), np.int32)
    for names, unit_BD in blocks:
        here = np.arange(len(ids), len(ids) + len(names), dtype=np.int32)
        ids += names
        score_QN = np.concatenate([score_QN, queries_QD @ unit_BD.T], axis=1)
        number_QN = np.concatenate([number_QN, np.broadcast_to(here, (len(queries_QD), len(here)))], axis=1)
        kept = np.stack([highest(score_N, n) for score_N in score_QN])
        score_QN = np.take_along_axis(score_QN, kept, axis=1)
        number_QN = np.take_along_axis(number_QN, kept, axis=1)
    return ids, np.unique(number_QN)


def highest(score_N: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    """Return the places of the n highest scores, of equal ones the first, in no order.

    >>> highest(np.array([1, 3, 3, 2, 3]), 2).tolist()
    [1, 2]
    """
    if n >= len(score_N):
        return np.arange(len(score_N))
    least = np.partition(score_N, len(score_N) - n)[len(score_N) - n]
    above, level = np.flatnonzero(score_N > least), np.flatnonzero(score_N == least)
    return np.concatenate([above, level[: n - len(above)]])
