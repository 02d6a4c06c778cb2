"""Options shared by several commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lark_store.cli.formats import Format
from lark_store.cli.spec_options import declared
from lark_store.specs import Compute

if TYPE_CHECKING:
    import polars as pl

    from lark_store.display.table import About
    from lark_store.results import NewText
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
OneCheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", "-c", metavar="NAME", help="Only this checkpoint (default: all).")
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
NewFileOption = Annotated[
    Path | None,
    typer.Option(
        help="New queries from a file: its text, or each row of a .jsonl, .parquet or .csv. `-` reads stdin: JSON "
        "lines, or one text per line."
    ),
]
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


@dataclass(frozen=True, kw_only=True)
class NewQueryOptions:
    """A query outside the store."""

    prompt: Annotated[str | None, typer.Option(help="A new query's prompt, with `--response`.")] = None
    response: Annotated[str | None, typer.Option(help="A new query's response.")] = None
    text: Annotated[str | None, typer.Option(help="A new query without a prompt: one text.")] = None
    file: NewFileOption = None

    @property
    def is_file_alone(self) -> bool:
        """Whether there is a file and nothing else."""
        return self.file is not None and (self.prompt, self.response, self.text) == (None,) * 3

    def new_text(self, attention: str = "auto") -> NewText | None:
        """Return the query; None if no option is given. A contradiction among them is the method's error."""
        from lark_store.results import NewText

        parts = (self.prompt, self.response, self.text, self.file)
        return None if parts == (None,) * 4 else NewText(*parts, attention=attention)


def open_store(path: str | None, snapshot: str | None = None) -> Store:
    """Open the store at `path`, or one of its snapshots."""
    from lark_store.store import Store

    return Store.open(path, snapshot=snapshot)
