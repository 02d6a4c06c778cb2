"""`metrics`: read the committed source influences and hand them to the pure functions of `metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.errors import InputError, NothingToScoreError
from lark_store.query import metrics
from lark_store.query.methods import Method
from lark_store.query.sql.engine import connect, fetch
from lark_store.schema.catalog import Checkpoint, FormatVariant, Sketcher
from lark_store.schema.database import Database, find

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

_VIEWS: dict[str, Callable[[pl.DataFrame], pl.DataFrame]] = {
    "all": metrics.all_metrics,
    "influence": lambda phi: metrics.influence_table(metrics.paper_metrics(phi)),
    "dominance": lambda phi: metrics.dominance_table(metrics.paper_metrics(phi)),
    "comparisons": metrics.comparisons,
}
_PHI = """
    SELECT i.query_variant, i.checkpoint, i.queries, i.query_id, i.source, s.stage, i.variant, i.max AS phi
    FROM source_influence i JOIN _source s ON s.name = i.source JOIN _checkpoint c ON c.name = i.checkpoint
    WHERE i.method = ? AND i.sketcher = ? AND i.query_checkpoint = i.checkpoint AND (? IS NULL OR i.checkpoint = ?)
      AND (? IS NULL OR i.query_variant = ?)
    ORDER BY c.epoch NULLS FIRST, c.id, i.queries, i.score_run, i.query_id, s.id, i.source, i.variant"""


def measure(
    db: Database, checkpoint: str | None, view: str, method: str, sketcher: str, query_variant: str | None
) -> pl.DataFrame:
    """Compute the metrics of what was scored; see `Store.metrics`."""
    if view not in _VIEWS:
        raise InputError(f"`{view}` is no view of the metrics", f"the views are {', '.join(f'`{v}`' for v in _VIEWS)}")
    method = Method.of(method).name
    with db.session() as session:
        find(session, Sketcher, sketcher)
        if checkpoint is not None:
            find(session, Checkpoint, checkpoint)
        if query_variant is not None:
            find(session, FormatVariant, query_variant)
    connection = connect(db)
    try:
        phi = fetch(connection, _PHI, [method, sketcher, checkpoint, checkpoint, query_variant, query_variant])
    finally:
        connection.close()
    if phi.is_empty():
        at = f" at checkpoint `{checkpoint}`" if checkpoint else ""
        raise NothingToScoreError(
            f"nothing is scored by `{method}` of `{sketcher}` sketches{at} yet",
            f"score with `lark-store attribute --checkpoint {checkpoint or 'NAME'} --queries NAME`",
        )
    variants = phi["query_variant"].unique(maintain_order=True).to_list()
    if len(variants) > 1:
        raise InputError(
            f"the queries are scored as {', '.join(f'`{v}`' for v in variants)}", "choose one with `--query-variant`"
        )
    return _VIEWS[view](phi)
