"""Rows of a CSV or TSV file with a header."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from lark_store.errors import InputError
from lark_store.readers.base import Row, check_columns, decoded_lines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def read_csv(path: Path) -> Iterator[Row]:
    """Read rows separated by commas."""
    return _read(path, ",")


def read_tsv(path: Path) -> Iterator[Row]:
    """Read rows separated by tabs."""
    return _read(path, "\t")


def _read(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    # strict: an unclosed quote would swallow all later rows
    rows = csv.DictReader(decoded_lines(path), delimiter=delimiter, strict=True)
    check_columns(path, list(rows.fieldnames or []))
    for row in rows:
        if None in row:
            raise InputError(
                f"`{path}`: the row that ends at line {rows.line_num} has more cells than the header has columns",
                'quote cells that contain the delimiter: "…"',
            )
        yield row
