"""Rows of a Parquet file, in batches of limited memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.readers.base import Row, check_columns, rows_of_batch, seekable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BATCH_BYTES = 64 << 20


def read_parquet(path: Path) -> Iterator[Row]:
    """Read rows of a Parquet file."""
    import pyarrow.parquet as pq

    from lark_store.schema.vectors import ROWS_PER_TEXT_BATCH

    with seekable(path) as plain, pq.ParquetFile(plain) as file:
        check_columns(path, file.schema_arrow.names)
        n = file.metadata.num_rows
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        rows = min(ROWS_PER_TEXT_BATCH, max(1, _BATCH_BYTES * n // max(1, size)))
        for batch in file.iter_batches(batch_size=rows):
            yield from rows_of_batch(batch)
