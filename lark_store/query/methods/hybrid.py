"""`hybrid`: z(cosine) + z(bm25), each over all searched rows for the query. The cosine may be summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.query.methods.cosine import Cosine

if TYPE_CHECKING:
    from lark_store.query.scoring.products import QueryBatch, Scores
    from lark_store.query.scoring.search import Search


class Hybrid(Cosine):
    """The sum of standardised gradient and lexical scores."""

    name = "hybrid"
    meaning = "z(cosine) + z(bm25)"
    scale = "standard deviations above the mean of the searched samples, of cosine and bm25 added up"
    engine = "bm25"
    is_adding = False
    has_noise = False

    def scores(self, search: Search, batch: QueryBatch, *, scales: bool = False) -> Scores:
        """Return every row's scores for a block of queries, (Q, N), and the two parts."""
        import numpy as np

        from lark_store.query.scoring.products import Scores
        from lark_store.stats.significance import z_scores

        gradient = super().scores(search, batch, scales=scales)
        parts = {"cosine": gradient.score, "bm25": search.lexical_scores(batch)}
        score = z_scores(parts["cosine"]) + z_scores(parts["bm25"])
        return Scores(score.astype(np.float32), parts=parts)
