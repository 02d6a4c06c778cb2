"""Convert frames for text formats."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


def writable(frame: pl.DataFrame, *, nested: bool) -> pl.DataFrame:
    """Convert bytes to hexadecimal text and, unless `nested`, nested values to JSON."""
    import polars as pl

    def text(value: object) -> str | None:
        return None if value is None else json.dumps(value, ensure_ascii=False, default=_hex)

    columns = []
    for column in frame:
        if column.dtype == pl.Binary:
            columns.append(column.bin.encode("hex"))
        elif column.dtype.is_nested() and (not nested or "Binary" in str(column.dtype)):
            columns.append(pl.Series(column.name, [text(value) for value in column.to_list()], dtype=pl.String))
        else:
            columns.append(column)
    return pl.DataFrame(columns)


def _hex(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
