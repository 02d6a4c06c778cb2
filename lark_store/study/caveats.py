"""Warnings for a study's readers, beyond the tables."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import polars as pl

from lark_store.query.methods import Method
from lark_store.specs import PREDICTED_ANSWER
from lark_store.study.groups import searched_groups, sql_parameters

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
    """Return warnings: overfitting, failed samples, undefined ratios, unequal sizes, queries without truth."""
    return [
        *overfitted(results),
        *_predicted_targets(store, results),
        *_failed(store, results, sketcher),
        *_undefined(results),
        *_sizes(phi),
        *_missing(results, phi),
        *_without_truth(results),
        *_missing_checkpoints(results),
        *_lexical_agreement(results, phi),
    ]


def _lexical_agreement(results: Results, phi: pl.DataFrame) -> list[str]:
    """Tell how far two BM25 engines agree on the source with the most influence, at the epoch of Table IV."""
    checkpoint = results.recipe.checkpoints[results.recipe.epoch]
    engines = [name for name in results.recipe.compare.methods if Method.of(name).engine == name]
    at = phi.filter(pl.col("checkpoint") == checkpoint, pl.col("method").is_in(engines))
    key = ["method", "query_id"]
    best = at.sort(*key, "phi", descending=True, maintain_order=True).unique(key, keep="first", maintain_order=True)
    by_engine = {name: best.filter(method=name).select("query_id", "source") for name in engines}
    notes = []
    for one, other in combinations(engines, 2):
        pairs = by_engine[one].join(by_engine[other], on="query_id")
        if len(pairs):
            same = (pairs["source"] == pairs["source_right"]).sum()
            notes.append(
                f"`{one}` and `{other}` give the same source the most influence on {same} of {len(pairs)} queries."
            )
    return notes


def overfitted(results: Results) -> list[str]:
    """Name the epochs at which the mean query loss rose."""
    measured = results.checkpoints.drop_nulls("query_loss").select("checkpoint", "query_loss").rows()
    return [
        f"The mean loss on the queries rose from {before:.3f} at `{earlier}` to {after:.3f} nats at `{later}`: the "
        f"model overfits there. Exclude `{later}` from sums over checkpoints, and trust its own scores less."
        for (earlier, before), (later, after) in pairwise(measured)
        if after > before
    ]


def _predicted_targets(store: Store, results: Results) -> list[str]:
    """Warn of queries without a response: their targets are the model's own predictions."""
    queries = results.recipe.queries
    n = store.sql("SELECT count(*) AS n FROM samples WHERE source = ? AND response IS NULL", [queries.name])["n"][0]
    rule = next((variant.targets for variant in results.recipe.variant if variant.name == queries.variant), "auto")
    if rule not in {"predicted", PREDICTED_ANSWER} and (rule != "auto" or not n):
        return []
    return [
        f"{_samples(n)} of `{queries.name}` have no response: their targets are the model's most likely tokens, which "
        "differ between checkpoints, and their loss measures how sure the model is, not how right."
        if rule == "auto"
        else f"The targets of `{queries.name}` are the model's most likely tokens, which differ between checkpoints."
    ]


def _failed(store: Store, results: Results, sketcher: str) -> list[str]:
    recipe = results.recipe
    parameters = sql_parameters(recipe, sketcher)
    queries = f"{parameters.pop('queries')}/{parameters.pop('query_variant')}"
    groups = [queries, *(f"{source}/{variant}" for source, variant in searched_groups(recipe))]
    rows = store.sql(_FAILED, parameters | {"groups": groups}).rows(named=True)
    return [
        f"{_samples(row['n'])} of `{row['source']}` as `{row['variant']}` could not be sketched at "
        f"{_listed(sorted(row['checkpoints'], key=recipe.checkpoints.index))} and were excluded; most "
        f"often: {row['reason']}."
        for row in rows
    ]


def _samples(n: int) -> str:
    return "1 sample" if n == 1 else f"{n} samples"


def _listed(names: list[str]) -> str:
    *first, last = [f"`{name}`" for name in names]
    return f"{', '.join(first)} and {last}" if first else last


def _undefined(results: Results) -> list[str]:
    """Warn where R(q) is undefined, with the largest number of queries."""
    lost = results.dominance.with_columns(lost=pl.col("n_queries") - pl.col("n_ratio")).filter(pl.col("lost") > 0)
    worst = lost.sort("lost", descending=True, maintain_order=True).unique(
        ["source", "variant"], keep="first", maintain_order=True
    )
    return [
        f"The ratio of fine-tuning to `{row['source']}` as `{row['variant']}` is undefined for {row['lost']} of "
        f"{row['n_queries']} queries at `{row['checkpoint']}`, where Φ of pretraining is not above 0; they are "
        "excluded from the median and quartiles of the queries' ratios only."
        for row in worst.rows(named=True)
    ]


def _sizes(phi: pl.DataFrame) -> list[str]:
    """Warn of sources of different sizes: Φ is a maximum."""
    sizes = phi.group_by("source", maintain_order=True).agg(pl.col("n").max())
    if sizes["n"].n_unique() < 2:
        return []
    sizes_text = ", ".join(f"`{source}` {n}" for source, n in sizes.rows())
    fact = f"The sources have different numbers of samples ({sizes_text})."
    return [f"{fact} Φ is a maximum and grows with size: of two sources with similar samples, the larger is ahead."]


def _missing(results: Results, phi: pl.DataFrame) -> list[str]:
    """Name the groups without scores at a checkpoint."""
    scored = set(phi.select("method", "checkpoint", "source", "variant").unique().rows())
    recipe = results.recipe
    return [
        f"`{source}` as `{variant}` has no scores by `{method}` at `{checkpoint}`."
        for method in dict.fromkeys(recipe.compare.methods)
        for checkpoint in recipe.checkpoints
        for source, variant in searched_groups(recipe)
        if (method, checkpoint, source, variant) not in scored
    ]


def _without_truth(results: Results) -> list[str]:
    if results.truth.is_empty():
        return []
    n, used = results.queries["query_id"].n_unique(), min(results.truth["n_queries"].to_list())
    if used == n:
        return []
    return [f"Of {n} queries {used} have samples stating their answer; the truth tables cover only these."]


def _missing_checkpoints(results: Results) -> list[str]:
    if results.storage["parameters"].null_count() == 0:
        return []
    return ["The files of all checkpoints are gone, so the size of the model's gradients is unknown."]
