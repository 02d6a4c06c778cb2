"""Commands on facts: probe them at checkpoints, and analyse when they are learned or lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from lark_store.cli.options import EveryCheckpointOption, ReadOptions, StoreOptions
from lark_store.cli.output import ProgressBar, emit_frames, say
from lark_store.cli.spec_options import takes
from lark_store.display.values import duration
from lark_store.specs import Compute, ProbeOptions, ProbeSpec, SurvivalOptions, SurvivalSpec

if TYPE_CHECKING:
    from lark_store.results import ProbeReport


@takes(ProbeSpec, Compute)
def probe(
    common: StoreOptions,
    source: Annotated[list[str], typer.Option("--source", "-s", metavar="NAME", help="A source of facts; repeatable.")],
    checkpoint: EveryCheckpointOption = None,
    **options: Unpack[ProbeOptions],
) -> None:
    """Ask checkpoints for the answers of facts: greedy, log-probability and, with `--samples`, sampled.

    A fact is a prompt with an exact response. Fills the SQL view `probes`. Safe to stop at any time: run it again to
    resume.

    Example: `lark-store probe --source facts --variant raw --samples 20`

    Example: `lark-store probe --source facts --checkpoint base --plan`
    """
    with common.open() as opened, ProgressBar() as bar:
        report = opened.probe(source, checkpoint or None, on_progress=bar, **options)
    common.emit(report.units)
    if report.is_plan:
        _say_cost(report, options.get("samples", 0))
    if report.n_failed:
        say(f"{report.n_failed} samples are no facts or failed; the SQL view `probes` has the reasons. The first:")
        for row in report.failures.head(5).iter_rows(named=True):
            say(f"  {row['source']} {row['sample_id']}: {row['reason']}")
        raise typer.Exit(1)


def _say_cost(report: ProbeReport, samples: int) -> None:
    todo, seconds = sum(report.units["n_probed"]), sum(report.units["seconds"])
    say(f"{todo} facts to probe, about {duration(seconds)}")
    if samples:
        say("note: sampled answers take additional time for facts that a model half knows")


@takes(SurvivalSpec)
def survival(
    common: ReadOptions,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Draw figures into it.")
    ] = None,
    **options: Unpack[SurvivalOptions],
) -> None:
    """Analyse when probed facts are learned or lost, and what predicts it.

    Prints hazard ratios (Cox, and in discrete time), Kaplan–Meier curves and their log-rank test. Needs the extra
    `survival`: `pip install 'lark-store[survival]'`.

    Example: `lark-store survival --source facts --seen-in finetune --covariate latent --covariate phi_pt`

    Example: `lark-store survival --event degradation --by seen --rule stable`
    """
    with common.open() as opened:
        report = opened.survival(output=output, **options)
    frames = {"effects": report.effects, "curves": report.curves, "tests": report.tests}
    emit_frames(frames, common.form, wide=common.wide)
    n_events = int(report.events["observed"].sum())
    say(f"{len(report.events)} facts at risk from `{report.events['baseline'][0]}` on, {n_events} with the event")
    n_left_out = len(report.events) - max(report.effects["n"], default=len(report.events))
    if n_left_out:
        say(f"note: {n_left_out} facts lack a covariate; `effects` leaves them out")
    if output is not None:
        say(f"wrote the figures to `{output}`")


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    app.command()(probe)
    app.command()(survival)
