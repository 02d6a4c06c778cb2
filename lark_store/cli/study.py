"""Commands for a study: the reference experiment from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lark_store.cli.output import ProgressBar, print_table, say

_Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a .toml file.")]


def init(recipe: _Recipe = Path("study.toml")) -> None:
    """Write a commented recipe, that of the reference experiment, to be changed to your model and texts.

    Example: `lark-store study init pubmedqa.toml`
    """
    from lark_store.study.recipe import init as write_recipe

    made = write_recipe(recipe)
    say(f"wrote `{made}`\n\nhint: change it, then `lark-store study run {made}`")


def run(recipe: _Recipe) -> None:
    """Fine-tune, evaluate, build pools, ingest, score; write tables, figures and a report. Goes on where it stopped.

    Everything lies in the study's folder, beside the recipe: `lark.store`, `checkpoints`, `pools`, `tables`,
    `figures`, `report.html`. Prints Table I (influence per source) and Table II (fine-tuning against pretraining).

    Example: `lark-store study run pubmedqa.toml`
    """
    from lark_store.study import run as run_study

    with ProgressBar() as bar:
        results = run_study(recipe, on_progress=bar, say=say)
    at = results.recipe.checkpoints[results.recipe.epoch]
    print_table(results.influence.filter(checkpoint=at).drop("checkpoint", "epoch"), f"Influence per source at {at}")
    print_table(results.dominance.drop("epoch"), "Fine-tuning (ft) against pretraining (pt), per epoch")
    for note in results.notes:
        say(f"note: {note}")
    say(f"the report is `{results.recipe.root / 'report.html'}`")


def report(
    recipe: _Recipe,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to (default: the study's folder).")
    ] = None,
) -> None:
    """Write the report of a study that has run: one HTML file that needs nothing else.

    Example: `lark-store study report pubmedqa.toml -o report.html`
    """
    from lark_store.study import report as write_report

    say(f"wrote `{write_report(recipe, output)}`")


def register(app: typer.Typer) -> None:
    """Put these commands into the tree."""
    group = typer.Typer(
        name="study",
        no_args_is_help=True,
        help="The reference experiment in one command: which samples drive a model's answers, epoch by epoch.",
    )
    for command in (init, run, report):
        group.command()(command)
    app.add_typer(group)
