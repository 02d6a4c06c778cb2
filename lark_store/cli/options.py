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
        "--vectors", metavar="PLACE", help="Where the vectors go: a folder, or `s3://…` (default: beside the catalog)."
    ),
]
SnapshotOption = Annotated[
    str | None, typer.Option("--snapshot", metavar="NAME", help="Read the store as it was in this snapshot.")
]
FormatOption = Annotated[Format, typer.Option("--format", "-f", help="How to print the rows.")]
CheckpointOption = Annotated[str, typer.Option("--checkpoint", "-c", metavar="NAME", help="The checkpoint.")]
CheckpointsOption = Annotated[
    list[str], typer.Option("--checkpoint", "-c", metavar="NAME", help="A checkpoint; may be given several times.")
]
WantedSourcesOption = Annotated[
    list[str], typer.Option("--source", "-s", metavar="NAME", help="A source; may be given several times.")
]
WantedVariantsOption = Annotated[
    list[str], typer.Option("--variant", metavar="NAME", help="A format variant; may be given several times.")
]
SourcesOption = Annotated[
    list[str] | None,
    typer.Option("--source", "-s", metavar="NAME", help="Only this source; may be given several times (default: all)."),
]
VariantsOption = Annotated[
    list[str] | None,
    typer.Option("--variant", metavar="NAME", help="Only this format variant; may be given several times."),
]
SketcherOption = Annotated[
    str | None, typer.Option("--sketcher", metavar="NAME", help="The sketcher (default: the store's).")
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="`cosine` (default), `dot` (default with another `--query-checkpoint`), `whitened`, `centred`, `tracin`, "
        "`bm25`, `bm25-okapi`, `bm25plus` or `hybrid`.",
    ),
]
OverOption = Annotated[
    str | None,
    typer.Option(
        "--over-checkpoints",
        metavar="HOW",
        help="Sum the scores of several checkpoints: `sum`, or `lr-weighted` by learning rate.",
    ),
]
QueriesOption = Annotated[
    str | None, typer.Option("--queries", "-q", metavar="NAME", help="The query's source, if several have the id.")
]
QueryCheckpointOption = Annotated[
    str | None,
    typer.Option("--query-checkpoint", metavar="NAME", help="Take the queries' sketches from this checkpoint."),
]
QueryVariantOption = Annotated[
    str | None,
    typer.Option("--query-variant", metavar="NAME", help="The queries' format variant, if several are sketched."),
]
LimitOption = Annotated[int | None, typer.Option(help="Only the first samples of each source.")]
DeviceOption = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `mps`.")]
PrecisionOption = Annotated[
    str, typer.Option(help="The model's: `float32`, `bfloat16`, or `auto` (as saved on CUDA, else float32).")
]
BatchTokensOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Tokens of a batch, padding included (default: 1,024 on a CPU, 8,192 on CUDA)."),
]
CandidatesOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Only candidates: of each source the N samples nearest to each query."),
]
ByOption = Annotated[
    str | None, typer.Option(help="How candidates are near: `bm25` (default) or `embedding`, with `--encoder`.")
]
CandidateQueriesOption = Annotated[
    str | None,
    typer.Option("--queries", "-q", metavar="NAME", help="The queries that candidates are near to, if several."),
]
EncoderOption = Annotated[
    str | None, typer.Option(metavar="PLACE", help="A sentence encoder: a folder or a hub name like `org/model`.")
]
CheckpointingOption = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")]


def open_store(path: str | None, snapshot: str | None = None) -> Store:
    """Open the store that the option names, or a snapshot of it."""
    from lark_store.store import Store

    return Store.open(path, snapshot=snapshot)
