"""`whitened` and `centred`: cosines without the components shared by all samples; see `query.scoring.geometry`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.query.methods.base import ScoringMethod
from lark_store.query.methods.cosine import UNIT_SCALE

if TYPE_CHECKING:
    from lark_store.query.scoring.geometry import Geometry
    from lark_store.query.scoring.products import QueryBatch, Scores
    from lark_store.query.scoring.search import Search


class Whitened(ScoringMethod):
    """A product in the inverse covariance of the searched sketches."""

    name = "whitened"
    meaning = "cosine, with components common to all samples damped"
    scale = UNIT_SCALE

    def geometry(self) -> type[Geometry]:
        """Return the covariance of the searched sketches."""
        from lark_store.query.scoring.geometry import Whitening

        return Whitening

    def scores_at(self, search: Search, term: int, batch: QueryBatch, *, scales: bool = False) -> Scores:  # noqa: ARG002
        """Return every row's scores at one checkpoint."""
        import numpy as np

        from lark_store.query.scoring.products import Scores
        from lark_store.stats.significance import sketch_noise

        scores = search.geometries[term].scores(batch.sketches[term], batch.variant)
        k = batch.sketches[term].unit_QK.shape[1]
        return Scores(scores, sketch_noise(scores, k).astype(np.float32) if self.has_noise else None)


class Centred(Whitened):
    """The cosine after each format variant's mean sketch is subtracted."""

    name = "centred"
    meaning = "cosine, with each format variant's mean subtracted"
    has_noise = True
    is_local = True

    def geometry(self) -> type[Geometry]:
        """Return the means of the searched sketches."""
        from lark_store.query.scoring.geometry import Centring

        return Centring
