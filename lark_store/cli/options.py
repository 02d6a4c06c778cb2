"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lark_store.store import Store


class Format(StrEnum):
    """How a command prints its rows."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    md = "md"


ENVIRONMENT = "LARK_STORE"
StoreOption = Annotated[
    str | None, typer.Option("--store", metavar="PATH", envvar=ENVIRONMENT, help="The store (default: ./lark.store).")
]
FormatOption = Annotated[Format, typer.Option("--format", "-f", help="How to print the rows.")]
CheckpointOption = Annotated[str, typer.Option("--checkpoint", "-c", metavar="NAME", help="The checkpoint.")]
CheckpointsOption = Annotated[
    list[str], typer.Option("--checkpoint", "-c", metavar="NAME", help="A checkpoint; may be given several times.")
]
SourcesOption = Annotated[
    list[str] | None,
    typer.Option("--source", "-s", metavar="NAME", help="Only this source; may be given several times (default: all)."),
]
VariantsOption = Annotated[
    list[str] | None,
    typer.Option("--variant", metavar="NAME", help="Only this format variant; may be given several times."),
]
SketcherOption = Annotated[str, typer.Option("--sketcher", metavar="NAME", help="The sketcher.")]
MethodOption = Annotated[
    str | None,
    typer.Option("--method", help="`cosine` (default) or `dot` (default with another `--query-checkpoint`)."),
]
QueryCheckpointOption = Annotated[
    str | None,
    typer.Option("--query-checkpoint", metavar="NAME", help="Take the queries' sketches from this checkpoint."),
]
QueryVariantOption = Annotated[
    str | None,
    typer.Option("--query-variant", metavar="NAME", help="The queries' format variant, if several are sketched."),
]
DEFAULT_SKETCHER = "lark"


def open_store(path: str | None) -> Store:
    """Open the store that the option names."""
    from lark_store.store import Store

    return Store.open(path)
