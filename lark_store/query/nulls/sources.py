"""`sources`: a row is compared with the rows of other sources, or of one source by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.query.nulls.base import Null

if TYPE_CHECKING:
    from lark_store.query.nulls.base import Floats, TestedScores


class SourcesNull(Null):
    """The scores of other sources' rows in the same variant; see `significance.source_null_p`."""

    name = "sources"
    meaning = "the scores of the other sources"

    def p_values(self, scores: TestedScores) -> Floats:
        """Return conformal p-values (N)."""
        from lark_store.stats.significance import source_null_p

        return source_null_p(
            scores.score_N,
            scores.source_N,
            scores.variant_N,
            opponents=scores.opponents,
            null_sources=scores.null_sources,
        )
