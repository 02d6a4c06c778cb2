"""The interface of a scoring method: a subclass of `ScoringMethod`, with one entry in the registry.

Nothing here imports numpy or Lance, so the options' help knows all methods at once. A method's module imports them in
its functions.

Shape letters: Q queries, N rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lark_store.query.scoring.geometry import Geometry
    from lark_store.query.scoring.products import Queries, QueryBatch, Scores
    from lark_store.query.scoring.search import Search
    from lark_store.query.select.rows import Rows

    Matrix = NDArray[np.float32]


class ScoringMethod:
    """A score of rows for queries, at one checkpoint.

    `name` is its name in `--method`, `meaning` its help. `reads_sketches`: the score uses gradients. `engine`: the
    lexical method whose index it reads, None for none. `is_adding`: a row's score depends only on the row and the
    query. `is_local`: queries and samples must be at the same checkpoints. `has_noise`: the score of a sketch varies
    with the map about the gradients' by `sketch_noise`. `uses_norms`: the score is in units of both gradients' norms.
    `scale` explains sign and unit under tables.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    scale: ClassVar[str] = "above 0: training on the sample lowers the query's loss, below 0: raises it"
    reads_sketches: ClassVar[bool] = True
    engine: ClassVar[str | None] = None
    is_adding: ClassVar[bool] = False
    is_local: ClassVar[bool] = False
    has_noise: ClassVar[bool] = False
    uses_norms: ClassVar[bool] = False

    def geometry(self) -> type[Geometry] | None:
        """Return the required statistics of all searched sketches, None for none."""
        return None

    def scores(self, search: Search, batch: QueryBatch, *, scales: bool = False) -> Scores:
        """Return every row's scores for a block of queries, (Q, N), summed over the checkpoints."""
        return search.summed(self, batch, scales=scales)

    def scores_at(self, search: Search, term: int, batch: QueryBatch, *, scales: bool = False) -> Scores:
        """Return every row's scores at one checkpoint, with the scales of the sign null if `scales`."""
        raise NotImplementedError

    def weighted(self, cosine_QN: Matrix, norm_Q: Matrix, norm_N: Matrix) -> Matrix:
        """Return scores from cosines, or their noise from the cosines' noise, for an adding method."""
        raise NotImplementedError

    def of_cosines(self, cosine_QN: Matrix, queries: Queries, rows: Rows, scale_QN: Matrix | None = None) -> Scores:
        """Return scores from the cosines of sketches, with their noise, for an adding method."""
        raise NotImplementedError

    def index(self, words: list[list[str]]) -> Any:
        """Build a lexical method's index of documents; it has `get_scores(words)`."""
        raise NotImplementedError
