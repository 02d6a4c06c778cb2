"""Commands that draw: plot, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Unpack

import typer

from lark_store.cli.options import EveryCheckpointOption, SnapshotOption, StoreOption, open_store
from lark_store.cli.output import ProgressBar, say
from lark_store.cli.spec_options import takes
from lark_store.query.plots import plots_help
from lark_store.specs import Compute, GroupsSpec, PlotOptions, PlotSpec, RankSpec, ReportOptions, ReportSpec, SearchSpec


@takes(PlotSpec, SearchSpec, RankSpec, GroupsSpec, Compute)
def plot(
    kind: Annotated[str, typer.Argument(help=plots_help())],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="An .svg, .png or .html file.")],
    query: Annotated[list[str] | None, typer.Argument(help="Ids of queries, where the plot takes some.")] = None,
    checkpoint: EveryCheckpointOption = None,
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    **options: Unpack[PlotOptions],
) -> None:
    """Draw a plot of the store's answers into a file.

    `hits`, `histogram`, `dominance`, `eif` and `eif-sweep` need a checkpoint. An option that the plot does not use is
    refused.

    Example: `lark-store plot hits 21645374 --checkpoint epoch-2 -o hits.svg`

    Example: `lark-store plot trajectory 21645374 19504993 -o trajectory.png`

    Example: `lark-store plot heatmap --by topic -o topics.html`
    """
    with open_store(store, snapshot) as opened:
        path = opened.plot(kind, query, checkpoint=checkpoint, output=output, **options)
    say(f"wrote `{path}`")


@takes(ReportSpec, SearchSpec, Compute, queries="The queries' source, if there are several.")
def report(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page, an .html file.")],
    query: Annotated[list[str] | None, typer.Argument(help="Ids of queries (default: all of one source).")] = None,
    checkpoint: EveryCheckpointOption = None,
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    **options: Unpack[ReportOptions],
) -> None:
    """Write a report of the store: one page with tables, charts and a picker of queries, which loads nothing.

    The scores are exact and computed on the spot. `--limit` bounds the queries in the picker, and so the page's size.

    Example: `lark-store report --queries test --limit 50 -o report.html`
    """
    with open_store(store, snapshot) as opened, ProgressBar() as bar:
        path = opened.report(output, query=query, checkpoints=checkpoint or (), on_progress=bar, **options)
    say(f"wrote `{path}`")


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    app.command()(plot)
    app.command()(report)
