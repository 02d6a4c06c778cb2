"""Output formats: their names, and how each prints a frame on stdout."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from lark_store.cli.tables import print_markdown, print_table
from lark_store.core.tabular import writable

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl


class Format(StrEnum):
    """Output formats."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    md = "md"


def _json(frame: pl.DataFrame) -> None:
    print(writable(frame, nested=True).write_json())  # noqa: T201


def _jsonl(frame: pl.DataFrame) -> None:
    print(writable(frame, nested=True).write_ndjson(), end="")  # noqa: T201


def _csv(frame: pl.DataFrame) -> None:
    print(writable(frame, nested=False).write_csv(), end="")  # noqa: T201


# Only a table rounds and shortens; the other formats are data, complete and exact.
FORMATS: dict[Format, Callable[[pl.DataFrame], None]] = {
    Format.table: print_table,
    Format.json: _json,
    Format.jsonl: _jsonl,
    Format.csv: _csv,
    Format.md: print_markdown,
}
