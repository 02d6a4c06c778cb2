"""Commands for a study: the reference experiment from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lark_store.cli.options import WideOption  # noqa: TC001  # typer reads it
from lark_store.cli.output import ProgressBar, say
from lark_store.cli.tables import print_table

_Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a .toml file.")]


def init(recipe: _Recipe = Path("study.toml")) -> None:
    """Write the commented recipe of the reference experiment, to adapt to your model and texts.

    Example: `lark-store study init pubmedqa.toml`
    """
    from lark_store.study.recipe import init as write_recipe

    path = write_recipe(recipe)
    say(f"wrote `{path}`\n\nhint: edit it, then run `lark-store study run {path}`")


def run(recipe: _Recipe, wide: WideOption = False) -> None:
    """Fine-tune, evaluate, build pools, ingest and score; write tables, figures and a report. Resumes if stopped.

    All output is in the study's folder, next to the recipe: `lark.store`, `checkpoints`, `pools`, `tables`,
    `figures`, `report.html`. Prints Table I (influence per source) and Table II (fine-tuning against pretraining).

    Example: `lark-store study run pubmedqa.toml`
    """
    from lark_store.study import run as run_study

    with ProgressBar() as bar:
        results = run_study(recipe, on_progress=bar, say=say)
    checkpoint = results.recipe.checkpoints[results.recipe.epoch]
    influence = results.influence.filter(checkpoint=checkpoint).drop("checkpoint", "epoch")
    print_table(influence, f"Influence per source at {checkpoint}", wide=wide)
    print_table(results.dominance.drop("epoch"), "Fine-tuning (ft) against pretraining (pt), per epoch", wide=wide)
    for note in results.notes:
        say(f"note: {note}")
    say(f"the report is `{results.recipe.root / 'report.html'}`")


def report(
    recipe: _Recipe,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Output file (default: in the study's folder)."),
    ] = None,
) -> None:
    """Write the report of a finished study: one self-contained HTML file.

    Example: `lark-store study report pubmedqa.toml -o report.html`
    """
    from lark_store.study import report as write_report

    say(f"wrote `{write_report(recipe, output)}`")


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    group = typer.Typer(
        name="study",
        no_args_is_help=True,
        help="The reference experiment in one command: which samples drive a model's answers, epoch by epoch.",
    )
    for command in (init, run, report):
        group.command()(command)
    app.add_typer(group)
