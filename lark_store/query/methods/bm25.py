"""`bm25`, `bm25-okapi` and `bm25plus`: lexical baselines, scores of the texts; see `lark_store.query.scoring.bm25`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lark_store.query.methods.base import ScoringMethod

if TYPE_CHECKING:
    from lark_store.query.scoring.products import QueryBatch, Scores
    from lark_store.query.scoring.search import Search


class LexicalMethod(ScoringMethod):
    """A score of the texts, without gradients."""

    scale = "higher: more words in common with the query, rare ones count more"
    reads_sketches = False

    def scores(self, search: Search, batch: QueryBatch, *, scales: bool = False) -> Scores:  # noqa: ARG002
        """Return every row's scores for a block of queries, (Q, N)."""
        from lark_store.query.scoring.products import Scores

        return Scores(search.lexical_scores(batch))


class Bm25(LexicalMethod):
    """Lucene's BM25, by bm25s."""

    name = engine = "bm25"
    meaning = "Lucene's BM25 of the texts"
    settings: ClassVar[dict[str, Any]] = {"method": "lucene"}

    def index(self, words: list[list[str]]) -> Any:
        """Build an index of documents."""
        import bm25s

        index = bm25s.BM25(**self.settings)
        index.index(words, show_progress=False)
        return index


class Bm25Okapi(LexicalMethod):
    """BM25Okapi by rank-bm25, the paper's baseline."""

    name = engine = "bm25-okapi"
    meaning = "rank-bm25's"

    def index(self, words: list[list[str]]) -> Any:
        """Build an index of documents."""
        from rank_bm25 import BM25Okapi

        return BM25Okapi(words)


class Bm25Plus(Bm25):
    """BM25+ by bm25s: with δ = 1, an occurring word counts, however long the text (Lv & Zhai 2011)."""

    name = engine = "bm25plus"
    meaning = "BM25+"
    settings: ClassVar[dict[str, Any]] = {"method": "bm25+", "delta": 1.0}
