"""Commands that compute: plan, ingest, verify and attribute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lark_store.cli.options import (
    BatchTokensOption,
    ByOption,
    CandidateQueriesOption,
    CandidatesOption,
    CheckpointingOption,
    CheckpointsOption,
    DeviceOption,
    EncoderOption,
    Format,
    FormatOption,
    LimitOption,
    MethodOption,
    OverOption,
    PrecisionOption,
    QueryCheckpointOption,
    QueryVariantOption,
    SketcherOption,
    SourcesOption,
    StoreOption,
    WantedSourcesOption,
    WantedVariantsOption,
    open_store,
)
from lark_store.cli.output import ProgressBar, emit, emit_frames, emit_noted, is_first_rank, say

if TYPE_CHECKING:
    from lark_store.schema.records import IngestReport, PlanReport


def ingest(
    checkpoint: CheckpointsOption,
    source: WantedSourcesOption,
    variant: WantedVariantsOption,
    sketcher: SketcherOption = None,
    limit: LimitOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan: the same as `lark-store plan`.")] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    batch_tokens: BatchTokensOption = None,
    gradient_checkpointing: CheckpointingOption = False,
    candidates: CandidatesOption = None,
    by: ByOption = None,
    queries: CandidateQueriesOption = None,
    encoder: EncoderOption = None,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Sketch the loss gradient of every sample that has no sketch yet, at each checkpoint and in each variant.

    Safe to stop at any moment: run it again and it does what is missing. On several GPUs:
    `torchrun --nproc-per-node 8 --no-python lark-store ingest …`.

    Of a source too large to sketch, `--candidates` takes what is nearest to some queries; `coverage` tells the rest.

    Example: `lark-store ingest --checkpoint epoch-2 --source finetune --source pubmed --variant chatml`

    Example: `lark-store ingest --checkpoint epoch-2 --source pubmed --variant raw --candidates 2000 --queries test`
    """
    if dry_run:
        plan(
            checkpoint,
            source,
            variant,
            sketcher,
            limit,
            device,
            precision,
            batch_tokens,
            gradient_checkpointing,
            candidates,
            by,
            queries,
            encoder,
            store,
            form,
        )
        return
    with open_store(store) as opened, ProgressBar() as bar:
        report = opened.ingest(
            checkpoint,
            source,
            variant,
            sketcher=sketcher,
            limit=limit,
            device=device,
            precision=precision,
            batch_tokens=batch_tokens,
            gradient_checkpointing=gradient_checkpointing,
            candidates=candidates,
            by=by,
            queries=queries,
            encoder=encoder,
            on_progress=bar,
        )
    if not is_first_rank():
        return  # the first tells, with its exit status too
    emit_ingested(report, form)


def emit_ingested(report: IngestReport, form: str) -> None:
    """Print what an ingest or an import did; samples that failed are named, and the exit status is 1."""
    emit(report.units, form)
    for note in report.notes:
        say(f"note: {note}")
    if report.n_failed:
        say(f"{report.n_failed} samples failed; the SQL view `failures` has the reasons. The first:")
        for row in report.failures.head(5).iter_rows(named=True):
            say(f"  {row['source']} {row['sample_id']}: {row['reason']}")
        raise typer.Exit(1)


def plan(
    checkpoint: CheckpointsOption,
    source: WantedSourcesOption,
    variant: WantedVariantsOption,
    sketcher: SketcherOption = None,
    limit: LimitOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    batch_tokens: BatchTokensOption = None,
    gradient_checkpointing: CheckpointingOption = False,
    candidates: CandidatesOption = None,
    by: ByOption = None,
    queries: CandidateQueriesOption = None,
    encoder: EncoderOption = None,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Say what an ingest would take before it runs: what is sketched, bytes, time and peak memory.

    No weights are loaded and nothing is written: a few batches go through a model of the checkpoint's config.

    Example: `lark-store plan --checkpoint epoch-2 --source finetune --variant chatml`
    """
    with open_store(store) as opened, ProgressBar() as bar:
        report = opened.plan(
            checkpoint,
            source,
            variant,
            sketcher=sketcher,
            limit=limit,
            device=device,
            precision=precision,
            batch_tokens=batch_tokens,
            gradient_checkpointing=gradient_checkpointing,
            candidates=candidates,
            by=by,
            queries=queries,
            encoder=encoder,
            on_progress=bar,
        )
    _print_plan(report, form)


def _print_plan(report: PlanReport, form: str) -> None:
    if not is_first_rank():
        return
    emit_frames({"checkpoints": report.checkpoints, "units": report.units}, form)
    todo = sum(report.units["n_samples"]) - sum(report.units["n_existing"])
    size, seconds = sum(report.units["bytes"]), sum(report.units["seconds"])
    memory = max(report.checkpoints["peak_bytes"].drop_nulls(), default=0)
    cost = f"{size / 2**20:,.1f} MiB, about {_duration(seconds)}, {memory / 2**30:.1f} GiB of memory"
    say(f"{todo} sketches to make: {cost}")
    for note in report.notes:
        say(f"note: {note}")


def verify(
    sketches: Annotated[int, typer.Option(help="How many stored sketches to compute again, drawn at random.")] = 20,
    sketcher: Annotated[str | None, typer.Option(metavar="NAME", help="Of this sketcher (default: all).")] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", metavar="NAME", help="Of this checkpoint (default: all).")
    ] = None,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="The model's (`auto`: as the sketches were made).")] = "auto",
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Compute stored sketches again, each sample alone, and compare: exit status 1 if one is not the same.

    The same is a cosine of at least 0.9999 (model in float32) or 0.999 (half precision).
    """
    with open_store(store) as opened, ProgressBar() as bar:
        report = opened.verify(
            sketches=sketches,
            sketcher=sketcher,
            checkpoint=checkpoint,
            device=device,
            precision=precision,
            on_progress=bar,
        )
    emit(report, form)
    bad = len(report) - sum(report["ok"])
    lowest = min(report["cosine"].drop_nulls(), default=0.0)
    say(f"{len(report)} sketches computed again, {bad} differ; lowest cosine {lowest:.7f}")
    if bad:
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
    sketcher: SketcherOption = None,
    method: MethodOption = None,
    over_checkpoints: OverOption = None,
    hits: Annotated[int, typer.Option(help="Rows of `influence` kept per query and group.")] = 100,
    memory: Annotated[int, typer.Option(metavar="MIB", help="Memory for queries and for `whitened`, in MiB.")] = 1024,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Score queries against sources, where sketches were added since the last time.

    Fills the tables `influence` and `source_influence`, which `metrics` and `sql` read. Each sketch is read once, for
    all queries that fit into `--memory`. With `--over-checkpoints` the checkpoints' scores are summed and kept under
    the last; without it each is scored by itself.

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
            over_checkpoints=over_checkpoints,
            hits=hits,
            memory=memory << 20,
            device=device,
            on_progress=bar,
        )
    emit_noted(report, form)


def register(app: typer.Typer) -> None:
    """Put these commands into the tree."""
    app.command()(plan)
    app.command()(ingest)
    app.command()(verify)
    app.command()(attribute)
