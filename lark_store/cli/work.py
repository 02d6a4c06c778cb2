"""Commands that compute: ingest and attribute."""

from __future__ import annotations

from typing import Annotated

import typer

from lark_store.cli.options import (
    DEFAULT_SKETCHER,
    CheckpointsOption,
    Format,
    FormatOption,
    MethodOption,
    QueryCheckpointOption,
    QueryVariantOption,
    SketcherOption,
    SourcesOption,
    StoreOption,
    open_store,
)
from lark_store.cli.output import ProgressBar, emit, say


def ingest(
    checkpoint: CheckpointsOption,
    source: Annotated[
        list[str], typer.Option("--source", "-s", metavar="NAME", help="A source; may be given several times.")
    ],
    variant: Annotated[
        list[str], typer.Option("--variant", metavar="NAME", help="A format variant; may be given several times.")
    ],
    sketcher: SketcherOption = DEFAULT_SKETCHER,
    limit: Annotated[int | None, typer.Option(help="Only the first samples of each source.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many sketches, bytes and roughly how long.")
    ] = False,
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `mps`.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="The model's: `float32`, `bfloat16`, or `auto` (as saved on CUDA, else float32).")
    ] = "auto",
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Sketch the loss gradient of every sample that has no sketch yet, at each checkpoint and in each variant.

    Safe to stop at any moment: run it again and it does what is missing.

    Example: `lark-store ingest --checkpoint epoch-2 --source finetune --source pubmed --variant chatml`
    """
    with open_store(store) as opened, ProgressBar() as bar:
        report = opened.ingest(
            checkpoint,
            source,
            variant,
            sketcher=sketcher,
            limit=limit,
            dry_run=dry_run,
            device=device,
            precision=precision,
            on_progress=bar,
        )
    emit(report.units, form)
    if dry_run:
        todo = sum(report.units["n_samples"]) - sum(report.units["n_existing"])
        size, seconds = sum(report.units["bytes"]), sum(report.units["seconds"])
        say(f"would make {todo} sketches, {size / 2**20:,.1f} MiB, in roughly {_duration(seconds)}")
    if report.n_failed:
        say(f"{report.n_failed} samples failed; the SQL view `failures` has the reasons. The first:")
        for row in report.failures.head(5).iter_rows(named=True):
            say(f"  {row['source']} {row['sample_id']}: {row['reason']}")
        raise typer.Exit(1)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def attribute(
    checkpoint: CheckpointsOption,
    queries: Annotated[
        str | None, typer.Option("--queries", "-q", metavar="NAME", help="A source of stage `query` (default: all).")
    ] = None,
    source: SourcesOption = None,
    query_checkpoint: QueryCheckpointOption = None,
    query_variant: QueryVariantOption = None,
    sketcher: SketcherOption = DEFAULT_SKETCHER,
    method: MethodOption = None,
    hits: Annotated[int, typer.Option(help="Rows of `influence` kept per query and group.")] = 100,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Score queries against sources, where sketches were added since the last time.

    Fills the tables `influence` and `source_influence`, which `metrics` and `sql` read.

    Example: `lark-store attribute --checkpoint epoch-2 --queries test`
    """
    with open_store(store) as opened, ProgressBar() as bar:
        report = opened.attribute(
            checkpoint,
            queries=queries,
            sources=source or (),
            query_checkpoint=query_checkpoint,
            query_variant=query_variant,
            sketcher=sketcher,
            method=method,
            hits=hits,
            on_progress=bar,
        )
    emit(report, form)


def register(app: typer.Typer) -> None:
    """Put these commands into the tree."""
    app.command()(ingest)
    app.command()(attribute)
