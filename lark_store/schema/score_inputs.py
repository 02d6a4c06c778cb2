"""The inputs of score runs: their ingest runs per checkpoint, and the rows of these."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.schema.table_schemas import sketch_table
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import polars as pl

    from lark_store.schema.catalog import IngestRun, ScoreRun
    from lark_store.schema.vectors import VectorStore

GROUP_KEYS = ("ingest_runs", "query_ingest_runs")  # keys of a recipe: the group's runs and its queries' runs
ALL_KEYS = (*GROUP_KEYS, "with")  # also all searched runs, if the scores depend on them


def inputs(run: ScoreRun, keys: tuple[str, ...] = ALL_KEYS) -> frozenset[int]:
    """Return the ids of a score run's ingest runs."""
    return frozenset(number for key in keys for number in run.recipe.get(key, []))


def has_valid_inputs(run: ScoreRun, ingests: Mapping[int, IngestRun], keys: tuple[str, ...] = ALL_KEYS) -> bool:
    """Tell whether all ingest runs of a score run are still committed.

    The catalog may reuse the id of a removed run, but a removal supersedes all score runs that name it.
    """
    runs = [ingests.get(number) for number in inputs(run, keys)]
    return all(ingest is not None and ingest.status == "done" for ingest in runs)


def scored_groups(run: ScoreRun, ingests: Mapping[int, IngestRun]) -> list[list[IngestRun]]:
    """Return the ingest runs of a score run's group, one list per checkpoint; a list is empty without sketches.

    The result is empty for a sum over checkpoints by an older version, whose recipe names only the last checkpoint.
    """
    if run.over_checkpoints is None:
        return _by_checkpoint(ingests[number] for number in run.recipe.get("ingest_runs", []))
    searched = (ingests[number] for number in run.recipe.get("with", []) if number in ingests)
    groups = _by_checkpoint(r for r in searched if (r.source_id, r.variant_id) == (run.source_id, run.variant_id))
    n_checkpoints = len(run.recipe.get("weights", []))
    return groups + [[]] * (n_checkpoints - len(groups)) if groups else groups


def query_groups(run: ScoreRun, ingests: Mapping[int, IngestRun]) -> list[list[IngestRun]]:
    """Return the ingest runs of a score run's queries, one list per checkpoint."""
    return _by_checkpoint(ingests[number] for number in run.recipe.get("query_ingest_runs", []))


def _by_checkpoint(runs: Iterable[IngestRun]) -> list[list[IngestRun]]:
    groups: dict[int, list[IngestRun]] = {}
    for run in runs:
        groups.setdefault(run.checkpoint_id, []).append(run)
    return list(groups.values())


def has_rows(vectors: VectorStore, groups: list[list[IngestRun]], n: int) -> bool:
    """Tell whether n samples have a sketch in each group (a list of committed runs).

    The catalog's counts are tried first; the tables are read only if they disagree.
    """
    counts = [sum(run.n_sketched for run in runs) for runs in groups]
    return min(counts, default=0) == n or n_common(vectors, groups) == n


def n_common(vectors: VectorStore, groups: list[list[IngestRun]]) -> int:
    """Return the number of samples with a sketch in every group."""
    if not all(groups) or not groups:
        return 0
    if len(groups) == 1:
        tables = _by_table(groups[0]).items()
        return sum(int(vectors.table(table).count_rows(where(ingest_run=run_ids))) for table, run_ids in tables)
    first, *rest = groups
    common = _sample_ids(vectors, first)
    for runs in rest:
        common = common.join(_sample_ids(vectors, runs), on="sample_id", how="semi")
    return len(common)


def _sample_ids(vectors: VectorStore, runs: list[IngestRun]) -> pl.DataFrame:
    import polars as pl

    tables = _by_table(runs).items()
    return pl.concat(vectors.read(table, ["sample_id"], where(ingest_run=run_ids)) for table, run_ids in tables)


def _by_table(runs: list[IngestRun]) -> dict[str, list[int]]:
    run_ids: dict[str, list[int]] = {}
    for run in runs:
        run_ids.setdefault(sketch_table(run.fingerprint), []).append(run.id)
    return run_ids
