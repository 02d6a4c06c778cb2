"""Commands that compute: plan, ingest, verify and attribute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from lark_store.cli.options import (
    CheckpointsOption,
    EveryCheckpointOption,
    EverySourceOption,
    OneCheckpointOption,
    StoreOptions,
    UsualVariantsOption,
)
from lark_store.cli.output import ProgressBar, emit_frames, emit_noted, is_first_rank, say
from lark_store.cli.spec_options import takes
from lark_store.display.values import duration, size
from lark_store.specs import (
    AttributeOptions,
    AttributeSpec,
    Compute,
    IngestOptions,
    IngestSpec,
    VerifyOptions,
    VerifySpec,
)

if TYPE_CHECKING:
    from lark_store.results import IngestReport, PlanReport


@takes(IngestSpec, Compute)
def ingest(
    common: StoreOptions,
    checkpoint: EveryCheckpointOption = None,
    source: EverySourceOption = None,
    variant: UsualVariantsOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan, like `lark-store plan`.")] = False,
    **options: Unpack[IngestOptions],
) -> None:
    """Sketch the loss gradient of every sample without a sketch, at each checkpoint and in each variant.

    Without options it takes every source at every checkpoint, each source in its usual variants. Safe to stop at any
    time: run it again to resume. On several GPUs: `torchrun --nproc-per-node 8 --no-python lark-store ingest …`.

    If a source is too large, `--candidates` sketches only the samples nearest to the queries; see `coverage`.

    Example: `lark-store ingest --checkpoint epoch-2`

    Example: `lark-store ingest --checkpoint epoch-2 --source finetune --source pubmed --variant chatml`

    Example: `lark-store ingest --checkpoint epoch-2 --source pubmed --variant raw --candidates 2000 --queries test`
    """
    names = (checkpoint or None, source or None, variant or None)
    with common.open() as opened, ProgressBar() as bar:
        if dry_run:
            _print_plan(opened.plan(*names, on_progress=bar, **options), common)
            return
        report = opened.ingest(*names, on_progress=bar, **options)
    if not is_first_rank():
        return  # the first process reports, and sets the exit status
    emit_ingested(report, common)


def emit_ingested(report: IngestReport, common: StoreOptions) -> None:
    """Print the report of an ingest or an import; failed samples are listed and set exit status 1."""
    common.emit(report.units)
    for note in report.notes:
        say(f"note: {note}")
    if report.n_truncated:
        say(
            f"{report.n_truncated:,} samples truncated by {report.n_cut:,} tokens: longer than the variant's "
            "`--max-length` or the model's context; see `n_cut` in the SQL view `sketches`"
        )
    if report.n_failed:
        say(f"{report.n_failed} samples failed; the SQL view `failures` has the reasons. The first:")
        for row in report.failures.head(5).iter_rows(named=True):
            say(f"  {row['source']} {row['sample_id']}: {row['reason']}")
        raise typer.Exit(1)


@takes(IngestSpec, Compute)
def plan(
    common: StoreOptions,
    checkpoint: EveryCheckpointOption = None,
    source: EverySourceOption = None,
    variant: UsualVariantsOption = None,
    **options: Unpack[IngestOptions],
) -> None:
    """Estimate the cost of an ingest: samples to sketch, bytes, time and peak memory.

    Loads no weights and writes nothing: a few batches run through a model built from the checkpoint's config.

    Without options it takes every source at every checkpoint, like `ingest`.

    Example: `lark-store plan --checkpoint epoch-2 --source finetune --variant chatml`
    """
    names = (checkpoint or None, source or None, variant or None)
    with common.open() as opened, ProgressBar() as bar:
        report = opened.plan(*names, on_progress=bar, **options)
    _print_plan(report, common)


def _print_plan(report: PlanReport, common: StoreOptions) -> None:
    if not is_first_rank():
        return
    emit_frames({"checkpoints": report.checkpoints, "units": report.units}, common.form, wide=common.wide)
    todo = sum(report.units["n_samples"]) - sum(report.units["n_existing"])
    n_bytes, seconds = sum(report.units["bytes"]), sum(report.units["seconds"])
    memory = max(report.checkpoints["peak_bytes"].drop_nulls(), default=0)
    cost = f"{size(n_bytes)}, about {duration(seconds)}, {size(memory)} of memory"
    say(f"{todo} sketches to compute: {cost}")
    n_truncated, n_cut = sum(report.units["n_truncated"]), sum(report.units["n_cut"])
    if n_truncated:
        say(
            f"about {n_truncated:,} samples will be truncated by about {n_cut:,} tokens: longer than the variant's "
            "`--max-length` or the model's context"
        )
    for note in report.notes:
        say(f"note: {note}")


@takes(VerifySpec, Compute, precision="Precision of the model (`auto`: as for the stored sketches).")
def verify(common: StoreOptions, checkpoint: OneCheckpointOption = None, **options: Unpack[VerifyOptions]) -> None:
    """Recompute stored sketches, one sample at a time, and compare them; exit status 1 if any differs.

    Sketches agree if their cosine is at least 0.9999 (model in float32) or 0.999 (half precision).
    """
    with common.open() as opened, ProgressBar() as bar:
        report = opened.verify(checkpoint=checkpoint, on_progress=bar, **options)
    common.emit(report)
    n_different = len(report) - sum(report["ok"])
    lowest = min(report["cosine"].drop_nulls(), default=0.0)
    say(f"{len(report)} sketches recomputed, {n_different} differ; lowest cosine {lowest:.7f}")
    if n_different:
        raise typer.Exit(1)


@takes(AttributeSpec, Compute, queries="A source of stage `query` (default: all).")
def attribute(common: StoreOptions, checkpoint: CheckpointsOption, **options: Unpack[AttributeOptions]) -> None:
    """Score queries against sources; groups without new sketches are skipped.

    Fills the tables `influence` and `source_influence`, which `metrics` and `sql` read. Each sketch is read once per
    set of queries that fits into `--memory`. `--over-checkpoints` sums the checkpoints' scores and stores the sum under
    the last one; without it, each checkpoint is scored separately.

    Example: `lark-store attribute --checkpoint epoch-2 --queries test`
    """
    with common.open() as opened, ProgressBar() as bar:
        report = opened.attribute(checkpoint, on_progress=bar, **options)
    emit_noted(report, common.form, wide=common.wide)


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    app.command()(plan)
    app.command()(ingest)
    app.command()(verify)
    app.command()(attribute)
