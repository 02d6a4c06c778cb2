"""Rows of an Arrow IPC file (Feather) or stream, as `datasets` caches them, and of Arrow data in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.core.arrow import skip_pandas
from lark_store.readers.base import Row, check_columns, rows_of_batch, seekable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import pyarrow as pa

_ROWS = 1024
_FILE = b"ARROW1"


def read_arrow(path: Path) -> Iterator[Row]:
    """Read rows of an Arrow IPC file or stream."""
    skip_pandas()
    import pyarrow as pa

    with seekable(path) as plain, pa.memory_map(str(plain)) as file:
        if file.read(len(_FILE)) == _FILE:
            batches = pa.ipc.open_file(file)
            check_columns(path, batches.schema.names)
            yield from rows_of_batches(_checked(batches.get_batch(i) for i in range(batches.num_record_batches)))
        else:
            file.seek(0)
            stream = pa.ipc.open_stream(file)
            check_columns(path, stream.schema.names)
            yield from rows_of_batches(_checked(stream))


def _checked(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Check each batch of a file: Python would crash on a damaged one."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def rows_of_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[Row]:
    """Yield the rows of record batches, converted a thousand at a time."""
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            yield from rows_of_batch(batch.slice(start, _ROWS))
