"""The ranks of each query's own samples: those with its value of the truth column.

The candidates are all samples of all sources except the queries', each source in one variant: fine-tuning in its first,
the others in `chatml` if they have it. Candidates are ranked together by score. Ties count against the method: among
equal scores, own samples rank last. (BM25 gives 0 to every text without a word of the query; a mean rank would reward
these zeros.)

    reciprocal rank   1 / rank of the query's best own sample
    recall@10         own samples among the top 10 / min(10, number of own samples)

Queries without an own sample among the candidates are excluded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from lark_store.errors import InputError
from lark_store.stats.bootstrap import Figure
from lark_store.study.groups import columns, figure_frame, in_order, numbers, sql_parameters, with_epoch

if TYPE_CHECKING:
    from lark_store import Store
    from lark_store.study.recipe import Recipe

FIRST = 10
_METRICS = {"mrr": "reciprocal", "recall_at_10": "recall"}
_KEYS = columns(pl.String, "checkpoint method")
TRUTH = (
    columns(pl.String, "checkpoint")
    | columns(pl.Int64, "epoch")
    | columns(pl.String, "method")
    | columns(pl.Float64, "mrr mrr_low mrr_high recall_at_10 recall_low recall_high")
    | columns(pl.Int64, "n_queries n_samples")
)
GAPS = (
    columns(pl.String, "checkpoint")
    | columns(pl.Int64, "epoch")
    | columns(pl.String, "method metric")
    | columns(pl.Float64, "difference low high p_value")
    | columns(pl.Int64, "n_queries")
)
_RANKS = """
    WITH facts AS (
        SELECT source, sample_id, json_extract_string(meta, $key) AS fact FROM samples
        WHERE source = $queries OR list_contains($sources, source)
    ), own AS (
        SELECT q.sample_id AS query_id, s.source, s.sample_id FROM facts q JOIN facts s USING (fact)
        WHERE q.source = $queries AND s.source <> $queries AND fact <> ''
    ), ranked AS (
        SELECT i.query_id, o.sample_id IS NOT NULL AS is_own, count(*) OVER (PARTITION BY i.query_id) AS n_samples,
               row_number() OVER (PARTITION BY i.query_id ORDER BY i.score DESC, o.sample_id IS NOT NULL) AS place
        FROM influence i LEFT JOIN own o USING (query_id, source, sample_id)
        WHERE i.sketcher = $sketcher AND i.queries = $queries AND i.query_variant = $query_variant
          AND i.checkpoint = $checkpoint AND i.query_checkpoint = $checkpoint AND i.method = $method
          AND list_contains($groups, i.source || '/' || i.variant)
    )
    SELECT query_id, any_value(n_samples) AS n_samples,
           1.0::DOUBLE / min(place) FILTER (is_own) AS reciprocal,
           count(*) FILTER (is_own AND place <= $first)::DOUBLE / least($first, count(*) FILTER (is_own)) AS recall
    FROM ranked GROUP BY query_id ORDER BY query_id"""


def truth_tables(store: Store, recipe: Recipe, phi: pl.DataFrame, sketcher: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the frames `truth` and `truth_gaps` (see `Results`), both empty if the recipe has no `[truth]`.

    `phi` from `read_phi` gives the expected number of candidates.

    Raises
    ------
    InputError
        Some samples are not ranked, or no query has an own sample.
    """
    if recipe.truth is None:
        return pl.DataFrame(schema=TRUTH), pl.DataFrame(schema=GAPS)
    ranks = pl.concat(
        _per_query(store, recipe, phi, sketcher, checkpoint, method)
        for checkpoint, method in phi.select("checkpoint", "method").unique(maintain_order=True).iter_rows()
    )
    if ranks["reciprocal"].is_null().all():
        raise InputError(
            f"no query of `{recipe.queries.name}` has the same value of `{recipe.truth.column}` as a sample",
            "set `column` of `[truth]` to a column of both",
        )
    ranks = ranks.drop_nulls("reciprocal")
    return _table(ranks, recipe), _gaps(ranks, recipe)


def _per_query(
    store: Store, recipe: Recipe, phi: pl.DataFrame, sketcher: str, checkpoint: str, method: str
) -> pl.DataFrame:
    """Return one method's ranks at one checkpoint: a row per query, with nulls if it has no own sample."""
    assert recipe.truth is not None
    variants = {source.name: source.variant for source in (recipe.tuning, *recipe.pretraining)}
    parameters = sql_parameters(recipe, sketcher) | {
        "key": "/" + recipe.truth.column.replace("~", "~0").replace("/", "~1"),  # a JSON pointer
        "sources": list(variants),
        "groups": [f"{source}/{variant}" for source, variant in variants.items()],
        "checkpoint": checkpoint,
        "method": method,
        "first": FIRST,
    }
    del parameters["checkpoints"]
    ranks = store.sql(_RANKS, parameters)
    phi_here = phi.filter(
        pl.col("checkpoint") == checkpoint,
        pl.col("method") == method,
        pl.col("variant") == pl.col("source").replace_strict(variants),
    )
    due = phi_here.group_by("query_id").agg(due=pl.col("n").sum()).join(ranks, on="query_id", how="left")
    short = due.filter(pl.col("n_samples").fill_null(0) < pl.col("due"))
    if len(short):
        most = max(phi_here["n"])
        raise InputError(
            f"{short['n_samples'][0] or 0} of {short['due'][0]} samples are ranked by `{method}` at `{checkpoint}`",
            f"score again with a hit for each sample of the largest group: `attribute` with `hits={most}`",
        )
    return ranks.select(pl.lit(checkpoint).alias("checkpoint"), pl.lit(method).alias("method"), pl.all())


def _table(ranks: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Average over queries, with intervals, per checkpoint and method."""
    groups = list(ranks.group_by("checkpoint", "method", maintain_order=True))
    table = pl.DataFrame(
        [(*key, group["n_samples"].max()) for key, group in groups], _KEYS | {"n_samples": pl.Int64}, orient="row"
    )
    for metric, column in _METRICS.items():
        figures = [Figure(dict(zip(_KEYS, key, strict=True)), numbers(group[column])) for key, group in groups]
        bounds = {"low": f"{metric.removesuffix('_at_10')}_low", "high": f"{metric.removesuffix('_at_10')}_high"}
        part = figure_frame(figures, _KEYS).rename({"value": metric} | bounds).drop("p_value")
        table = table.join(part.drop("n_queries") if "n_queries" in table.columns else part, on=[*_KEYS])
    return in_order(with_epoch(table, recipe), recipe, "checkpoint", "method").select(list(TRUTH))


def _gaps(ranks: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Subtract every other method's figures from the cosine's, query by query."""
    cosine, baselines = (ranks.filter(test) for test in (pl.col("method") == "cosine", pl.col("method") != "cosine"))
    joined = baselines.join(cosine.drop("method", "n_samples"), on=["checkpoint", "query_id"], maintain_order="left")
    figures = []
    for key, group in joined.group_by(*_KEYS, maintain_order=True):
        for metric, column in _METRICS.items():
            gap = numbers(group[f"{column}_right"]) - numbers(group[column])
            figures.append(Figure(dict(zip(_KEYS, key, strict=True)) | {"metric": metric}, gap, difference=gap))
    table = figure_frame(figures, _KEYS | {"metric": pl.String}).rename({"value": "difference"})
    return in_order(with_epoch(table, recipe), recipe, "checkpoint", "method").select(list(GAPS))
