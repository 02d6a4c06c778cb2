"""Commands for exchange with other programs: export, sketcher import."""

from __future__ import annotations

from typing import Annotated, Unpack

import typer

from lark_store.cli.compute import emit_ingested
from lark_store.cli.options import CheckpointOption, SnapshotOption, StoreOption, StoreOptions, open_store
from lark_store.cli.output import ProgressBar, say
from lark_store.cli.spec_options import takes
from lark_store.specs import ExportOptions, ExportSpec, ImportOptions, ImportSpec


@takes(ExportSpec)
def export(
    what: Annotated[str, typer.Argument(metavar="VIEW|SELECT", help="A view, for example `influence`, or one SELECT.")],
    out: Annotated[str, typer.Argument(help="A .parquet, .csv, .json or .jsonl file.")],
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    **options: Unpack[ExportOptions],
) -> None:
    """Write the rows of a view, or of one SELECT, to a file.

    Views are the same as in `sql`. `--vectors` writes the sketches themselves, each with norm √k.

    Example: `lark-store export "select * from influence where rank = 1" best.parquet`
    """
    with open_store(store, snapshot) as opened:
        n = opened.export(what, out, **options)
    say(f"{n:,} rows in `{out}`")


@takes(ImportSpec)
def sketcher_import(
    common: StoreOptions,
    name: Annotated[str, typer.Argument(help="Name of the sketcher, for example `trak`; created if new.")],
    file: Annotated[str, typer.Argument(help="A .npy file, a .parquet file or an output folder of `bergson build`.")],
    checkpoint: CheckpointOption,
    source: Annotated[str, typer.Option("--source", "-s", metavar="NAME", help="The source of the samples.")],
    variant: Annotated[str, typer.Option("--variant", "-v", metavar="NAME", help="The format variant of the samples.")],
    **options: Unpack[ImportOptions],
) -> None:
    """Import vectors computed by another program, one per sample, as sketches of a new sketcher.

    `top`, `attribute`, `metrics` and `sql` then use them with `--sketcher NAME`. Parquet needs the columns `sample_id`
    and `vector`. Safe to stop at any time: run it again to resume.

    Example: `lark-store sketcher import trak features.npy --ids ids.txt -c epoch-2 -s pubmed --variant raw`
    """
    with common.open() as opened, ProgressBar() as bar:
        report = opened.sketcher_import(
            name, file, checkpoint=checkpoint, source=source, variant=variant, on_progress=bar, **options
        )
    emit_ingested(report, common)


def register(app: typer.Typer) -> None:
    """Add `export` to the app; `sketcher import` belongs to the sketcher group."""
    app.command()(export)
