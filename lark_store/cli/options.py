"""Options shared by several commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from lark_store.cli.formats import Format
from lark_store.cli.spec_options import declared
from lark_store.specs import Compute, RankSpec, SearchSpec

if TYPE_CHECKING:
    import polars as pl

    from lark_store.display.table import About
    from lark_store.store import Store


ENVIRONMENT = "LARK_STORE"
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="PATH",
        envvar=ENVIRONMENT,
        help="The store: a folder (default: ./lark.store) or `postgresql://…`.",
    ),
]
VectorsOption = Annotated[
    str | None,
    typer.Option(
        "--vectors", metavar="PLACE", help="Where to store vectors: a folder or `s3://…` (default: with the catalog)."
    ),
]
SnapshotOption = Annotated[
    str | None, typer.Option("--snapshot", metavar="NAME", help="Read this snapshot of the store.")
]
FormatOption = Annotated[Format, typer.Option("--format", "-f", help="Output format.")]
WideOption = Annotated[
    bool, typer.Option("--wide", help="Print tables in full: all columns, digits and texts, of any width.")
]
CheckpointOption = Annotated[str, typer.Option("--checkpoint", "-c", metavar="NAME", help="The checkpoint.")]
CheckpointsOption = Annotated[
    list[str], typer.Option("--checkpoint", "-c", metavar="NAME", help="A checkpoint; repeatable.")
]
# An ingest: without a name, all of them.
EveryCheckpointOption = Annotated[
    list[str] | None,
    typer.Option("--checkpoint", "-c", metavar="NAME", help="A checkpoint; repeatable (default: all)."),
]
EverySourceOption = Annotated[
    list[str] | None, typer.Option("--source", "-s", metavar="NAME", help="A source; repeatable (default: all).")
]
UsualVariantsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        "-v",
        metavar="NAME",
        help="A format variant; repeatable (default: those a source has sketches in, else `chatml`).",
    ),
]
SourcesOption = Annotated[list[str] | None, declared(SearchSpec, "sources")]
SketcherOption = Annotated[str | None, declared(SearchSpec, "sketcher")]
OverOption = Annotated[str | None, declared(SearchSpec, "over_checkpoints")]
QueryVariantOption = Annotated[str | None, declared(SearchSpec, "query_variant")]
KOption = Annotated[int, declared(RankSpec, "k")]
DeviceOption = Annotated[str, declared(Compute, "device")]
AttentionOption = Annotated[str, declared(Compute, "attention")]


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """The store and the output of a command."""

    store: StoreOption = None
    form: FormatOption = Format.table
    wide: WideOption = False

    def open(self) -> Store:
        """Open the store."""
        return open_store(self.store)

    def emit(self, frame: pl.DataFrame, about: About | None = None, by: str | None = None) -> None:
        """Print a frame on stdout; in tables, its column `by` divides it into several."""
        from lark_store.cli.output import emit
        from lark_store.display.table import NOTHING

        emit(frame, self.form, about or NOTHING, wide=self.wide, by=by)


@dataclass(frozen=True, kw_only=True)
class ReadOptions(StoreOptions):
    """The same of a command that can read a snapshot."""

    snapshot: SnapshotOption = None

    def open(self) -> Store:
        """Open the store, or the snapshot."""
        return open_store(self.store, self.snapshot)


def open_store(path: str | None, snapshot: str | None = None) -> Store:
    """Open the store at `path`, or one of its snapshots."""
    from lark_store.store import Store

    return Store.open(path, snapshot=snapshot)
