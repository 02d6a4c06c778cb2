"""Commands of measured influence (EIF)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from lark_store.cli.options import CheckpointOption, ReadOptions, StoreOptions
from lark_store.cli.output import ProgressBar, emit_frames, say
from lark_store.cli.spec_options import takes
from lark_store.specs import Compute, EifOptions, EifReportOptions, EifReportSpec, EifSpec

if TYPE_CHECKING:
    from lark_store.results import EifReport


@takes(EifSpec, Compute)
def eif(
    common: StoreOptions,
    checkpoint: CheckpointOption,
    source: Annotated[str, typer.Option("--source", "-s", metavar="NAME", help="The source of the samples.")],
    **options: Unpack[EifOptions],
) -> None:
    """Measure influence: train on each sample alone and see how each query's loss changes.

    The rows are in the SQL views `eif` and `eif_pairs`. Run it again to resume, or to measure more samples. `--sweep`
    compares learning rates and names the one to use. `eif-report` says what the influence of a domain shows.

    Example: `lark-store eif -c base -s finetune -q test --max-samples 50 --plan`

    Example: `lark-store eif -c base -s transitivity -q transitivity -v text --by-draw --sweep 1e-5:1e-1`
    """
    with common.open() as opened, ProgressBar() as bar:
        report = opened.eif(checkpoint, source, on_progress=bar, **options)
    frames = {"runs": report.runs} | ({} if report.sweep.is_empty() else {"sweep": report.sweep})
    emit_frames(frames, common.form, wide=common.wide)
    _say(report, is_plan=bool(options.get("plan")))
    if len(report.failures):
        raise typer.Exit(1)


def _say(report: EifReport, *, is_plan: bool) -> None:
    runs = report.runs
    verb = "to measure" if is_plan else "measured"
    passes = f"{runs['forward'].sum():,} forward and {runs['backward'].sum():,} backward passes"
    say(f"{runs['n_measured'].sum():,} pairs {verb}: {passes} of one sample each")
    for note in report.notes:
        say(f"note: {note}")
    if len(report.failures):
        say(f"{len(report.failures)} samples can't be used. The first:")
        for row in report.failures.head(5).iter_rows(named=True):
            say(f"  {row['source']} {row['sample_id']}: {row['reason']}")
    if report.sweep.is_empty():
        return
    plateau = report.sweep.filter("is_plateau")["learning_rate"].to_list()
    if not plateau:
        say("no plateau: no two neighbouring learning rates agree in ranks above the rounding error")
        return
    (best,) = report.sweep.filter("is_chosen")["learning_rate"]
    say(f"the plateau is {plateau[0]:g} to {plateau[-1]:g}; chosen: `--learning-rate {best:g}`")


@takes(EifReportSpec)
def eif_report(common: ReadOptions, checkpoint: CheckpointOption, **options: Unpack[EifReportOptions]) -> None:
    """Say what measured influence in synthetic domains shows: contrasts over draws, fine-tuning beside context.

    Above 0, a contrast holds: the statement helps itself over others, the conclusion gains more than its reversal.
    `relative` is in units of the influence's mean size, and `share` the draws in which it holds.

    Example: `lark-store eif-report -c base -s transitivity --learning-rate 1e-4`
    """
    with common.open() as opened:
        frame = opened.eif_report(checkpoint, **options)
    common.emit(frame, by="desideratum")


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    app.command()(eif)
    app.command("eif-report")(eif_report)
