"""Delete runs without data: superseded score and EIF runs, and ingest runs whose sketches were removed.

They would slow down everything that reads the whole catalog (SQL, `show`, removal). A run is deleted only if no table
row has its id and it is not the newest run, since SQLite reuses the id of a deleted newest row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import delete, func, select

from lark_store.schema.catalog import EifRun, IngestRun, ScoreRun
from lark_store.schema.catalog_base import now
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    import datetime as dt

    from lark_store.schema.database import Database

_RUNS_PER_BATCH = 1_000


def forget_runs(db: Database, age: dt.timedelta) -> None:
    """Delete runs without data that ended longer than `age` ago. Call it under `maintenance`.

    Such runs never get rows again: superseded runs are not written to, and a done ingest is never resumed.
    """
    emptied = [IngestRun.status == "done", IngestRun.n_sketched == 0, IngestRun.n_failed == 0]
    sketches = [*db.vectors.sketch_tables(), "failures"]
    for kind, conditions, tables in (
        (ScoreRun, [ScoreRun.status == "superseded"], ["influence", "source_influence"]),
        (EifRun, [EifRun.status == "superseded"], ["eif"]),
        (IngestRun, emptied, sketches),
    ):
        with db.session() as session:
            newest = session.scalar(select(func.max(kind.id)))
            ended = select(kind.id).where(*conditions, kind.finished_at < now() - age, kind.id != newest)
            old = list(session.scalars(ended))
        for start in range(0, len(old), _RUNS_PER_BATCH):
            run_ids = old[start : start + _RUNS_PER_BATCH]
            empty = set(run_ids) - _with_rows(db, tables, kind.__tablename__, run_ids)
            with db.session() as session:
                session.execute(delete(kind).where(kind.id.in_(empty), *conditions))


def _with_rows(db: Database, tables: list[str], column: str, runs: list[int]) -> set[int]:
    """Return the runs with rows in the tables."""
    run_ids: set[int] = set()
    for table in tables:
        for batch in db.vectors.scan(table, [column], where(**{column: runs})):
            run_ids.update(batch.column(column).to_pylist())
    return run_ids
