"""`metrics`: read the committed source influences and compute their metrics."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lark_store.core.names import SUM_SEPARATOR
from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.select.hints import for_scores
from lark_store.query.select.sketchers import sketcher_with_scores
from lark_store.query.sql.connection import connect, fetch
from lark_store.schema.catalog import ScoreRun, Sketcher
from lark_store.schema.database import Database, find
from lark_store.stats import metrics, sketch_error

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

    from lark_store.query.methods import Method
    from lark_store.query.select.score_filter import ScoreFilter

_VIEWS: dict[str, Callable[[pl.DataFrame], pl.DataFrame]] = {
    "all": metrics.all_metrics,
    "influence": lambda phi: metrics.influence_table(metrics.paper_metrics(phi)),
    "dominance": lambda phi: metrics.dominance_table(metrics.paper_metrics(phi)),
    "comparisons": metrics.comparisons,
}
_PHI = """
    SELECT i.over_checkpoints, i.query_variant, i.query_checkpoint, i.checkpoint, i.queries, i.query_id, i.source,
           s.stage, i.variant, i.max AS phi, i.argmax, i.score_run
    FROM source_influence i JOIN _source s ON s.name = i.source JOIN _checkpoint c ON c.name = i.checkpoint
    WHERE i.method = ? AND i.sketcher = ? AND i.query_checkpoint = coalesce(?, i.checkpoint)
      AND (i.query_checkpoint = i.checkpoint) = ?
      AND (? IS NULL OR list_contains(?::VARCHAR[], i.checkpoint)) AND (? IS NULL OR i.over_checkpoints = ?)
      AND (? IS NULL OR i.query_variant = ?)
    ORDER BY c.epoch NULLS FIRST, c.id, i.queries, i.score_run, i.query_id, s.id, i.source, i.variant"""

_NORMS = """
    SELECT i.score_run, i.query_id, z.checkpoint AS at, z.grad_norm::DOUBLE * q.grad_norm AS norms
    FROM source_influence i
    JOIN sketches z ON z.sketcher = i.sketcher AND z.source = i.source AND z.variant = i.variant
                   AND z.sample_id = i.argmax
    JOIN sketches q ON q.sketcher = i.sketcher AND q.source = i.queries AND q.variant = i.query_variant
                   AND q.sample_id = i.query_id
                   AND q.checkpoint = if(i.query_checkpoint = i.checkpoint, z.checkpoint, i.query_checkpoint)
    WHERE list_contains(?::BIGINT[], i.score_run)"""

_LOG = logging.getLogger(__name__)


def measure(db: Database, scores: ScoreFilter, view: str, sketcher: str | None) -> pl.DataFrame:
    """Compute the metrics of scored groups; see `Store.metrics`."""
    method = scores.method
    if view not in _VIEWS:
        raise InputError(f"metrics have no view `{view}`", f"the views are {', '.join(f'`{v}`' for v in _VIEWS)}")
    scores.check(db)
    sketcher, notes = sketcher_with_scores(db, sketcher, scores)
    with db.session() as session:
        sketcher_row = find(session, Sketcher, sketcher)
    for note in notes:
        _LOG.warning(note)
    at, summed, variant = scores.at or None, scores.summed, scores.query_variant
    parameters = [scores.query_checkpoint, not scores.is_across, at, at, summed, summed, variant, variant]
    connection = connect(db, query=_PHI + _NORMS)
    try:
        phi = fetch(connection, _PHI, [method.name, sketcher, *parameters])
        runs = phi["score_run"].unique().to_list()
        norms = fetch(connection, _NORMS, [runs]) if method.scoring.uses_norms else None
    finally:
        connection.close()
    if phi.is_empty():
        raise _no_scores(db, scores, sketcher_row)
    phi = _with_noise(db, phi, method, sketcher_row.k, norms)
    variants = phi["query_variant"].unique(maintain_order=True).to_list()
    if len(variants) > 1:
        raise InputError(
            f"the queries are scored as {', '.join(f'`{v}`' for v in variants)}", "choose one with `--query-variant`"
        )
    return _VIEWS[view](phi).join(_labels(phi, method, sketcher), on="checkpoint", how="left", maintain_order="left")


def _with_noise(db: Database, phi: pl.DataFrame, method: Method, k: int, norms: pl.DataFrame | None) -> pl.DataFrame:
    """Add `noise`, the standard deviation of each Φ from sketching; null where the method has none."""
    import polars as pl

    if not method.scoring.has_noise:
        return phi
    weight = pl.col("weight")
    terms = phi.with_row_index("row").join(_weights(db, phi), on="score_run", maintain_order="left")
    if norms is not None:
        norms = norms.unique(["score_run", "query_id", "at"])
        terms = terms.join(norms, on=["score_run", "query_id", "at"], how="left", maintain_order="left")
        terms = terms.with_columns(weight * pl.col("norms"))
    sums = terms.group_by("row", maintain_order=True).agg(pl.when(weight.null_count() == 0).then(weight.sum()))
    weight_Q = sums["weight"].fill_null(float("nan")).to_numpy()
    noise = sketch_error.noise_of(phi["phi"].cast(pl.Float64).to_numpy(), weight_Q, k)
    return phi.with_columns(noise=pl.Series(noise).fill_nan(None))


def _weights(db: Database, phi: pl.DataFrame) -> pl.DataFrame:
    """Return each score run's checkpoints (`at`) and their weights, for sums from the recipe."""
    import polars as pl

    rows = []
    with db.session() as session:
        for run, checkpoint in phi.select("score_run", "checkpoint").unique().rows():
            recipe = session.get_one(ScoreRun, run).recipe
            rows += [(run, *pair) for pair in recipe.get("weights", {checkpoint: 1.0}).items()]
    return pl.DataFrame(rows, {"score_run": pl.Int64, "at": pl.String, "weight": pl.Float64}, orient="row")


def _labels(phi: pl.DataFrame, method: Method, sketcher: str) -> pl.DataFrame:
    """Return the queries' checkpoint and the score's label at each checkpoint."""
    import polars as pl

    rows = []
    places = phi.group_by("checkpoint", "query_checkpoint", maintain_order=True)
    for name, query_checkpoint, sums in places.agg(pl.col("over_checkpoints").unique()).rows():
        if len(sums) > 1:
            raise InputError(
                f"the scores at `{name}` sum over {' and '.join(f'`{names}`' for names in sorted(map(str, sums)))}",
                "select one sum by its checkpoints, or score all sources by the same sum with `lark-store attribute`",
            )
        rows.append((name, query_checkpoint, method.label(sketcher, (sums[0] or name).split(SUM_SEPARATOR))))
    return pl.DataFrame(rows, dict.fromkeys(("checkpoint", "query_checkpoint", "scored_by"), pl.String), orient="row")


def _no_scores(db: Database, scores: ScoreFilter, sketcher: Sketcher) -> NothingToScoreError:
    summed, checkpoints = scores.summed, scores.checkpoints
    place = f" over `{summed}`" if summed else f" at checkpoint `{checkpoints[0]}`" if checkpoints else ""
    if scores.is_across:
        place += f", with the queries at `{scores.query_checkpoint}`,"
    return NothingToScoreError(
        f"there are no `{scores.method.name}` scores of `{sketcher.name}` sketches{place} yet",
        for_scores(db, scores, sketcher),
    )
