"""Runs of which nothing is left: scores that were superseded, ingests whose sketches have all been removed.

They would make the catalog, and all that reads it whole (SQL, `show`, removal), larger with each day of work. A run is
forgotten only when no row of a table has its number and it is not the newest: SQLite gives the number of the newest
row, when that was deleted, to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import delete, func, select

from lark_store.schema.catalog import IngestRun, ScoreRun, now
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    import datetime as dt

    from lark_store.schema.database import Database

_AT_ONCE = 1_000


def forget_runs(db: Database, age: dt.timedelta) -> None:
    """Delete what ended longer than `age` ago and left nothing. Behind `maintenance`.

    Such a run stays without rows: a superseded one gets none, and a done ingest is never continued.
    """
    superseded = [ScoreRun.status == "superseded"]
    emptied = [IngestRun.status == "done", IngestRun.n_sketched == 0, IngestRun.n_failed == 0]
    sketches = [*db.vectors.sketch_tables(), "failures"]
    for kind, conditions, tables in (
        (ScoreRun, superseded, ["influence", "source_influence"]),
        (IngestRun, emptied, sketches),
    ):
        with db.session() as session:
            newest = session.scalar(select(func.max(kind.id)))
            ended = select(kind.id).where(*conditions, kind.finished_at < now() - age, kind.id != newest)
            old = list(session.scalars(ended))
        for start in range(0, len(old), _AT_ONCE):
            some = old[start : start + _AT_ONCE]
            gone = set(some) - _with_rows(db, tables, kind.__tablename__, some)
            with db.session() as session:
                session.execute(delete(kind).where(kind.id.in_(gone)))


def _with_rows(db: Database, tables: list[str], column: str, runs: list[int]) -> set[int]:
    """Return those of the runs that a row of the tables names."""
    found: set[int] = set()
    for table in tables:
        for batch in db.vectors.scan(table, [column], where(**{column: runs})):
            found.update(batch.column(column).to_pylist())
    return found
