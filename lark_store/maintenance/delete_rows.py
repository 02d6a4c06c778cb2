"""Delete wrong rows of a table by id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.core.retry import retry
from lark_store.maintenance.check.findings import Repair

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lark_store.schema.database import Database

_ROWS_PER_DELETE = 1000
_RECOMPUTE = "delete the rows; `ingest` recomputes them"


def delete_rows(db: Database, table: str, row_ids: NDArray[np.uint64]) -> None:
    """Delete rows by id, in several commits."""
    for start in range(0, len(row_ids), _ROWS_PER_DELETE):
        ids = ", ".join(str(i) for i in row_ids[start : start + _ROWS_PER_DELETE])
        retry(lambda s=ids: db.vectors.table(table).delete(f"_rowid IN ({s})"), f"rows of `{table}` can't be deleted")  # type: ignore[misc]


def deletion(table: str, row_ids: NDArray[np.uint64], description: str = _RECOMPUTE) -> Repair:
    """Return a repair that deletes rows of a table."""
    return Repair(description, lambda db: delete_rows(db, table, row_ids))
