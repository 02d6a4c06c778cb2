"""What a study's reader must be warned of, and the tables can't show."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import polars as pl

from lark_store.study.groups import asked, searched

if TYPE_CHECKING:
    from lark_store import Store
    from lark_store.study.results import Results

_FAILED = """
    SELECT f.source, f.variant, count(DISTINCT f.sample_id) AS n, list(DISTINCT f.checkpoint) AS checkpoints,
           mode(f.reason) AS reason
    FROM failures f JOIN ingest_runs r USING (ingest_run)
    WHERE r.sketcher = $sketcher AND list_contains($checkpoints, f.checkpoint)
      AND list_contains($groups, f.source || '/' || f.variant)
      AND NOT EXISTS (
          SELECT 1 FROM sketches x WHERE x.sketcher = r.sketcher AND x.checkpoint = f.checkpoint
          AND x.source = f.source AND x.variant = f.variant AND x.sample_id = f.sample_id)
    GROUP BY ALL ORDER BY f.source, f.variant"""


def notes_of(store: Store, results: Results, phi: pl.DataFrame, sketcher: str) -> list[str]:
    """Return warnings: overfitting, failed samples, undefined ratios, sizes that differ, queries without truth."""
    return [
        *overfitted(results),
        *_guessed(store, results),
        *_failed(store, results, sketcher),
        *_undefined(results),
        *_sizes(phi),
        *_missing(results, phi),
        *_without_truth(results),
        *_gone(results),
    ]


def overfitted(results: Results) -> list[str]:
    """Name the epochs at which the mean query loss rose."""
    measured = results.checkpoints.drop_nulls("query_loss").select("checkpoint", "query_loss").rows()
    return [
        f"The mean loss on the queries rose from {before:.3f} at `{earlier}` to {after:.3f} nats at `{later}`: the "
        f"model overfits there. Leave `{later}` out of sums over checkpoints, and trust what it says alone less."
        for (earlier, before), (later, after) in pairwise(measured)
        if after > before
    ]


def _guessed(store: Store, results: Results) -> list[str]:
    """Say that queries without a response are held to what the model itself finds most likely."""
    queries = results.recipe.queries
    n = store.sql("SELECT count(*) AS n FROM samples WHERE source = ? AND response IS NULL", [queries.name])["n"][0]
    rule = next((own.targets for own in results.recipe.variant if own.name == queries.variant), "auto")
    if rule != "predicted" and (rule != "auto" or not n):
        return []
    return [
        f"{_samples(n)} of `{queries.name}` have no response: their targets are the model's own most likely tokens, "
        "other ones at each checkpoint, and their loss says how sure the model is, not how right."
        if rule == "auto"
        else f"The targets of `{queries.name}` are the model's own most likely tokens, other ones at each checkpoint."
    ]


def _failed(store: Store, results: Results, sketcher: str) -> list[str]:
    recipe = results.recipe
    parameters = asked(recipe, sketcher)
    queries = f"{parameters.pop('queries')}/{parameters.pop('query_variant')}"
    groups = [queries, *(f"{source}/{variant}" for source, variant in searched(recipe))]
    rows = store.sql(_FAILED, parameters | {"groups": groups}).rows(named=True)
    return [
        f"{_samples(row['n'])} of `{row['source']}` as `{row['variant']}` could not be sketched at "
        f"{_listed(sorted(row['checkpoints'], key=recipe.checkpoints.index))} and left out; most "
        f"often: {row['reason']}."
        for row in rows
    ]


def _samples(n: int) -> str:
    return "1 sample" if n == 1 else f"{n} samples"


def _listed(names: list[str]) -> str:
    *first, last = [f"`{name}`" for name in names]
    return f"{', '.join(first)} and {last}" if first else last


def _undefined(results: Results) -> list[str]:
    """Say where FT/PT is undefined, and for how many queries at most."""
    lost = results.dominance.with_columns(lost=pl.col("n_queries") - pl.col("n_ratio")).filter(pl.col("lost") > 0)
    worst = lost.sort("lost", descending=True, maintain_order=True).unique(
        ["source", "variant"], keep="first", maintain_order=True
    )
    return [
        f"The ratio of fine-tuning to `{row['source']}` as `{row['variant']}` is undefined for {row['lost']} of "
        f"{row['n_queries']} queries at `{row['checkpoint']}`, where Φ of pretraining is not above 0; they are left "
        "out of the mean ratio, and of nothing else."
        for row in worst.rows(named=True)
    ]


def _sizes(phi: pl.DataFrame) -> list[str]:
    """Say that sources of different sizes are compared: Φ is a maximum."""
    sizes = phi.group_by("source", maintain_order=True).agg(pl.col("n").max())
    if sizes["n"].n_unique() < 2:
        return []
    named = ", ".join(f"`{source}` {n}" for source, n in sizes.rows())
    fact = f"The sources have different numbers of samples ({named})."
    return [f"{fact} Φ is a maximum and grows with their number: of two sources with like samples the larger is ahead."]


def _missing(results: Results, phi: pl.DataFrame) -> list[str]:
    """Name the groups that have no scores at a checkpoint."""
    there = set(phi.select("method", "checkpoint", "source", "variant").unique().rows())
    recipe = results.recipe
    return [
        f"`{source}` as `{variant}` has no scores by `{method}` at `{checkpoint}`."
        for method in dict.fromkeys(recipe.compare.methods)
        for checkpoint in recipe.checkpoints
        for source, variant in searched(recipe)
        if (method, checkpoint, source, variant) not in there
    ]


def _without_truth(results: Results) -> list[str]:
    if results.truth.is_empty():
        return []
    n, used = results.queries["query_id"].n_unique(), min(results.truth["n_queries"].to_list())
    if used == n:
        return []
    return [f"Of {n} queries {used} have samples that state their answer; the truth is asked of these alone."]


def _gone(results: Results) -> list[str]:
    if results.storage["parameters"].null_count() == 0:
        return []
    return ["No checkpoint's files are where they were: how large the model's gradients would be is not known."]
