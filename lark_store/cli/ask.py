"""Commands that answer: top, metrics and sql."""

from __future__ import annotations

from typing import Annotated

import typer

from lark_store.cli.options import (
    DEFAULT_SKETCHER,
    CheckpointOption,
    Format,
    FormatOption,
    MethodOption,
    QueryCheckpointOption,
    QueryVariantOption,
    SketcherOption,
    SnapshotOption,
    SourcesOption,
    StoreOption,
    VariantsOption,
    open_store,
)
from lark_store.cli.output import emit, say


def top(
    query: Annotated[str, typer.Argument(help="The id of a query.")],
    checkpoint: CheckpointOption,
    k: Annotated[int, typer.Option("-k", help="How many samples.")] = 10,
    source: SourcesOption = None,
    variant: VariantsOption = None,
    opponents: Annotated[
        bool, typer.Option("--opponents", help="The most negative influence instead of the most positive.")
    ] = False,
    queries: Annotated[
        str | None, typer.Option("--queries", "-q", metavar="NAME", help="The query's source, if several have the id.")
    ] = None,
    query_checkpoint: QueryCheckpointOption = None,
    query_variant: QueryVariantOption = None,
    sketcher: SketcherOption = DEFAULT_SKETCHER,
    method: MethodOption = None,
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Print the samples with the most influence on one query, exact, with their text.

    Example: `lark-store top 21645374 --checkpoint epoch-2 -k 10 --source pubmed --variant raw`
    """
    with open_store(store, snapshot) as opened:
        hits = opened.top(
            query,
            checkpoint=checkpoint,
            k=k,
            sources=source or (),
            variants=variant or (),
            opponents=opponents,
            queries=queries,
            query_checkpoint=query_checkpoint,
            query_variant=query_variant,
            sketcher=sketcher,
            method=method,
        )
    emit(hits.frame, form)
    say(hits.how)


def metrics(
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", metavar="NAME", help="Only this checkpoint (default: all).")
    ] = None,
    view: Annotated[
        str, typer.Option(help="`all`, `influence` (the paper's Table I) or `dominance` (Table II).")
    ] = "all",
    method: Annotated[str, typer.Option(help="`cosine` or `dot`.")] = "cosine",
    sketcher: SketcherOption = DEFAULT_SKETCHER,
    query_variant: QueryVariantOption = None,
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Print mean max influence, FT/PT ratio, FT wins, PT dominance and format effect, with 95% intervals.

    Intervals are bootstrapped over queries. `attribute` must have scored before.
    """
    with open_store(store, snapshot) as opened:
        frame = opened.metrics(
            checkpoint=checkpoint, view=view, method=method, sketcher=sketcher, query_variant=query_variant
        )
    emit(frame, form)


def sql(
    query: Annotated[str, typer.Argument(help="One SELECT.")],
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Run one SELECT over the store (DuckDB's SQL, read-only).

    Views: checkpoints, checkpoint_metrics, sources, variants, sketchers, samples, sketches (without vectors),
    ingest_runs, failures, score_runs, influence, source_influence.

    Example: `lark-store sql "select source, variant, avg(max) from source_influence where checkpoint = 'epoch-2' group
    by all"`
    """
    with open_store(store, snapshot) as opened:
        emit(opened.sql(query), form)


def register(app: typer.Typer) -> None:
    """Put these commands into the tree."""
    for command in (top, metrics, sql):
        app.command()(command)
