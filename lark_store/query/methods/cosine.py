"""`cosine` and `dot`: products of sketches. A row's score depends only on the row and the query."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.query.methods.base import ScoringMethod

if TYPE_CHECKING:
    from lark_store.query.methods.base import Matrix
    from lark_store.query.scoring.products import Queries, QueryBatch, Scores
    from lark_store.query.scoring.search import Search
    from lark_store.query.select.rows import Rows


UNIT_SCALE = "+1 same direction as the query's gradient, −1 opposite direction"


class Cosine(ScoringMethod):
    """The cosine of the sketches."""

    name = "cosine"
    meaning = "of the sketches; the default"
    scale = UNIT_SCALE
    is_adding = True
    has_noise = True

    def scores_at(self, search: Search, term: int, batch: QueryBatch, *, scales: bool = False) -> Scores:
        """Return every row's scores at one checkpoint, with the scales of the sign null if `scales`."""
        from lark_store.query.scoring.products import matrix

        rows, queries = search.of_terms[term], batch.sketches[term]
        cosine, scale = matrix(rows, queries, device=search.device, scales=scales)
        return self.of_cosines(cosine, queries, rows, scale)

    def weighted(self, cosine_QN: Matrix, norm_Q: Matrix, norm_N: Matrix) -> Matrix:  # noqa: ARG002
        """Return the cosines."""
        return cosine_QN

    def of_cosines(self, cosine_QN: Matrix, queries: Queries, rows: Rows, scale_QN: Matrix | None = None) -> Scores:
        """Return scores from the cosines of sketches, with their noise."""
        import numpy as np

        from lark_store.query.scoring.products import Scores
        from lark_store.stats.significance import sketch_noise

        norms = (queries.norm_Q, rows.frame["grad_norm"].to_numpy())
        noise = sketch_noise(cosine_QN, queries.unit_QK.shape[1]).astype(np.float32)
        scale = None if scale_QN is None else self.weighted(scale_QN, *norms)
        return Scores(self.weighted(cosine_QN, *norms), self.weighted(noise, *norms), scale)


class Dot(Cosine):
    """The dot product of the gradients: the cosine times both norms."""

    name = "dot"
    meaning = "cosine times both norms; the default with another `--query-checkpoint`"
    scale = f"{ScoringMethod.scale}; in units of both gradients' norms"
    uses_norms = True

    def weighted(self, cosine_QN: Matrix, norm_Q: Matrix, norm_N: Matrix) -> Matrix:
        """Return the cosines times both norms."""
        weighted: Matrix = cosine_QN * (norm_Q[:, None] * norm_N[None, :])
        return weighted
