"""Checks of row checksums; see `lark_store.schema.checksums`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from lark_store.maintenance.check.findings import Finding, Repair
from lark_store.maintenance.delete_rows import deletion
from lark_store.schema.checksums import CHECKSUM, row_checksums
from lark_store.schema.missing_columns import fill_checksums
from lark_store.schema.vectors import ROWS_PER_TEXT_BATCH

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    from numpy.typing import NDArray

    from lark_store.maintenance.check.frozen_store import FrozenStore

SAME, CHANGED, MISSING = 0, 1, 2
_NOT_COVERED = ("_rowid", CHECKSUM)


def checked_rows(rows: pl.DataFrame | pa.RecordBatch) -> NDArray[np.int8]:
    """Compare all columns of rows with their checksums: SAME, CHANGED or MISSING, (N,) int8."""
    table = rows.to_arrow() if isinstance(rows, pl.DataFrame) else rows
    names = [name for name in table.schema.names if name not in _NOT_COVERED]
    stored = pl.Series(table.column(CHECKSUM), dtype=pl.Int64)
    same = stored == pl.Series(row_checksums(table.select(names)), dtype=pl.Int64)
    states = pl.select(pl.when(stored.is_null()).then(MISSING).when(same).then(SAME).otherwise(CHANGED))
    return states.to_series().cast(pl.Int8).to_numpy()


def check_checksums(store: FrozenStore, table: str, rows: str, repair: str) -> Iterator[Finding]:
    """Yield changed rows, which the described repair deletes, and rows without a checksum."""
    dataset = store.vectors.table(table).to_lance()
    if CHECKSUM not in dataset.schema.names:
        yield from without_checksum(table, int(dataset.count_rows()))
        return
    changed: list[NDArray[np.uint64]] = []
    n_missing = 0
    for batch in dataset.scanner(with_row_id=True, batch_size=ROWS_PER_TEXT_BATCH).to_batches():
        states = checked_rows(batch)
        changed.append(batch.column("_rowid").to_numpy()[states == CHANGED])
        n_missing += int((states == MISSING).sum())
    ids = np.concatenate([np.empty(0, np.uint64), *changed])
    if len(ids):
        detail = f"{rows} that changed after they were written"
        yield Finding("error", "checksum", table, len(ids), detail, deletion(table, ids, repair))
    yield from without_checksum(table, n_missing)


def without_checksum(table: str, n: int) -> Iterator[Finding]:
    """Yield a finding if rows have no checksum."""
    if n:
        description = "set their checksums to match the current values"
        repair = Repair(description, lambda db: fill_checksums(db.vectors, table))
        detail = "rows without a checksum: changes can't be detected"
        yield Finding("note", "checksum", table, n, detail, repair)
