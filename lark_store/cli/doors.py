"""Commands that let data out and in: export, sketcher import."""

from __future__ import annotations

from typing import Annotated

import typer

from lark_store.cli.options import (
    CheckpointOption,
    Format,
    FormatOption,
    SnapshotOption,
    SourcesOption,
    StoreOption,
    VariantsOption,
    open_store,
)
from lark_store.cli.output import ProgressBar, say
from lark_store.cli.work import emit_ingested


def export(
    what: Annotated[str, typer.Argument(help="A view, for example `influence`, or one SELECT.")],
    out: Annotated[str, typer.Argument(help="A .parquet, .csv, .json or .jsonl file.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    vectors: Annotated[
        bool, typer.Option("--vectors", help="With `sketches`: their vectors too (Parquet only).")
    ] = False,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option("--checkpoint", "-c", metavar="NAME", help="Vectors of this checkpoint (default: all)."),
    ] = None,
    source: SourcesOption = None,
    variant: VariantsOption = None,
    sketcher: Annotated[
        str | None, typer.Option("--sketcher", metavar="NAME", help="Vectors of this sketcher (default: the store's).")
    ] = None,
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
) -> None:
    """Write the rows of a view, or of one SELECT, to a file.

    The views are those of `sql`. With `--vectors` the file has the sketches themselves, each with norm √k.

    Example: `lark-store export "select * from influence where rank = 1" best.parquet`
    """
    with open_store(store, snapshot) as opened:
        n = opened.export(
            what,
            out,
            overwrite=overwrite,
            vectors=vectors,
            checkpoints=checkpoint or (),
            sources=source or (),
            variants=variant or (),
            sketcher=sketcher,
        )
    say(f"{n:,} rows in `{out}`")


def sketcher_import(
    name: Annotated[str, typer.Argument(help="The sketcher that they become, for example `trak`; made if it is new.")],
    file: Annotated[str, typer.Argument(help="A .npy file, a .parquet file or a folder made by `bergson build`.")],
    checkpoint: CheckpointOption,
    source: Annotated[str, typer.Option("--source", "-s", metavar="NAME", help="The source of the samples.")],
    variant: Annotated[str, typer.Option("--variant", metavar="NAME", help="The format variant they stand for.")],
    ids: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A text file, one sample_id per line, where FILE itself has none."),
    ] = None,
    kind: Annotated[str, typer.Option(help="`auto`, `numpy`, `parquet` or `bergson`.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="Store as `float16` or `float32` (default: float32 for float64 vectors, else float16)."),
    ] = None,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Import vectors that were made elsewhere, one per sample, as sketches of their own sketcher.

    Then `top`, `attribute`, `metrics` and `sql` work on them with `--sketcher NAME`. Parquet has the columns
    `sample_id` and `vector`. Safe to stop at any moment: run it again and it does what is missing.

    Example: `lark-store sketcher import trak features.npy --ids ids.txt -c epoch-2 -s pubmed --variant raw`
    """
    with open_store(store) as opened, ProgressBar() as bar:
        report = opened.sketcher_import(
            name,
            file,
            checkpoint=checkpoint,
            source=source,
            variant=variant,
            ids=ids,
            kind=kind,
            dtype=dtype,
            on_progress=bar,
        )
    emit_ingested(report, form)


def register(app: typer.Typer) -> None:
    """Put these commands into the tree; `sketcher import` stands with the other commands on sketchers."""
    app.command()(export)
