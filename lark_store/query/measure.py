"""`metrics`: read the committed source influences and hand them to the pure functions of `metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.errors import InputError, NothingToScoreError
from lark_store.query import metrics
from lark_store.query.methods import BETWEEN, Method
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
    SELECT i.over_checkpoints, i.query_variant, i.checkpoint, i.queries, i.query_id, i.source, s.stage, i.variant,
           i.max AS phi
    FROM source_influence i JOIN _source s ON s.name = i.source JOIN _checkpoint c ON c.name = i.checkpoint
    WHERE i.method = ? AND i.sketcher = ? AND i.query_checkpoint = i.checkpoint
      AND (? IS NULL OR list_contains(?::VARCHAR[], i.checkpoint)) AND (? IS NULL OR i.over_checkpoints = ?)
      AND (? IS NULL OR i.query_variant = ?)
    ORDER BY c.epoch NULLS FIRST, c.id, i.queries, i.score_run, i.query_id, s.id, i.source, i.variant"""


def measure(
    db: Database, checkpoints: list[str], view: str, method: Method, sketcher: str, query_variant: str | None
) -> pl.DataFrame:
    """Compute the metrics of what was scored; see `Store.metrics`."""
    if view not in _VIEWS:
        raise InputError(f"`{view}` is no view of the metrics", f"the views are {', '.join(f'`{v}`' for v in _VIEWS)}")
    with db.session() as session:
        find(session, Sketcher, sketcher)
        for name in checkpoints:
            find(session, Checkpoint, name)
        if query_variant is not None:
            find(session, FormatVariant, query_variant)
    over = BETWEEN.join(checkpoints) if method.over and len(checkpoints) > 1 else None
    at = checkpoints[-1:] if over else checkpoints
    named = [at or None, at, over, over, query_variant, query_variant]
    connection = connect(db)
    try:
        phi = fetch(connection, _PHI, [method.name, sketcher, *named])
    finally:
        connection.close()
    if phi.is_empty():
        raise _nothing(method, sketcher, over, at)
    variants = phi["query_variant"].unique(maintain_order=True).to_list()
    if len(variants) > 1:
        raise InputError(
            f"the queries are scored as {', '.join(f'`{v}`' for v in variants)}", "choose one with `--query-variant`"
        )
    return _VIEWS[view](phi).join(_labels(phi, method, sketcher), on="checkpoint", how="left", maintain_order="left")


def _labels(phi: pl.DataFrame, method: Method, sketcher: str) -> pl.DataFrame:
    """Return how the score at each checkpoint is called: `checkpoint` and `scored_by`."""
    import polars as pl

    rows = []
    for name, sums in phi.group_by("checkpoint", maintain_order=True).agg(pl.col("over_checkpoints").unique()).rows():
        if len(sums) > 1:
            raise InputError(
                f"the scores at `{name}` sum over {' and '.join(f'`{each}`' for each in sorted(map(str, sums)))}",
                "choose a sum by its checkpoints, or score all sources by the same with `lark-store attribute`",
            )
        rows.append((name, method.label(sketcher, (sums[0] or name).split(BETWEEN))))
    return pl.DataFrame(rows, {"checkpoint": pl.String, "scored_by": pl.String}, orient="row")


def _nothing(method: Method, sketcher: str, over: str | None, at: list[str]) -> NothingToScoreError:
    where = f" over `{over}`" if over else f" at checkpoint `{at[0]}`" if at else ""
    named = " ".join(f"--checkpoint {name}" for name in (over.split(BETWEEN) if over else at or ["NAME"]))
    how = f" --over-checkpoints {method.over}" if method.over else ""
    return NothingToScoreError(
        f"nothing is scored by `{method.name}` of `{sketcher}` sketches{where} yet",
        f"score with `lark-store attribute {named} --queries NAME --method {method.base}{how}`",
    )
