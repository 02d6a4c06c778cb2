"""The rows searched by a question, at one version of their table, and the stream of their vectors.

Reads the small columns of all rows first and applies the condition, then streams the vectors of the remaining rows. A
row's number is its position in the frame, from 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.schema.vectors import ROWS_PER_BATCH, where

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    import pyarrow as pa
    from numpy.typing import NDArray

    from lark_store.query.select.resolve import Group
    from lark_store.schema.database import Database

_SCALARS = ("ingest_run", "sample_id", "n_tokens", "n_loss_tokens", "loss", "grad_norm")
# Below this share of the table, rows are fetched one by one; above it, all are read and some discarded.
_FETCH_BELOW = 0.25
_BATCHES_AHEAD = 4
_BATCH_BYTES, _MOST_ROWS = 1 << 20, 512  # narrow vectors are read in larger batches, which cost less each
_CACHED_BYTES = 256 << 20  # of the small columns of rows, of several checkpoints; those used last are always kept
_KEPT = ["row_id", "group", "source", "variant", "sample_id", "loss", "grad_norm", "chosen"]


@dataclass(frozen=True)
class Rows:
    """Rows of groups.

    `frame` has row_id, group (the index in `groups`), source, variant, sample_id, loss, grad_norm and chosen (whether
    the condition holds; exempt rows are kept without it). `n_there` rows satisfy `filter`; the frame has the chosen
    ones. `check` is called for each batch and raises to end the search.
    """

    groups: Sequence[Group]
    table: Any
    filter: str
    frame: pl.DataFrame
    n_there: int
    check: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self.frame)

    def only(self, numbers: NDArray[np.int64]) -> Rows:
        """Return a subset of the rows, by number."""
        return replace(self, frame=self.frame[numbers])

    def stream(
        self, column: str = "vector", batch_rows: int | None = None
    ) -> Iterator[tuple[NDArray[np.int64], pa.Array]]:
        """Yield row numbers (B) and their values of a column (B), batch by batch in table order."""
        if self.frame.is_empty():
            return
        if batch_rows is None:
            batch_rows = _rows_per_batch(self.table.schema.field(column).type)
        ids = self.frame["row_id"].to_numpy()
        order = np.argsort(ids, kind="stable")
        in_order = ids[order]
        few = len(ids) < _FETCH_BELOW * self.n_there
        batches = self._fetched(in_order, column, batch_rows) if few else self._scanned(column, batch_rows)
        for batch in batches:
            if self.check:
                self.check()
            row_ids = batch.column("_rowid").to_numpy()
            places = np.searchsorted(in_order, row_ids)
            places[places == len(ids)] = 0
            is_selected = in_order[places] == row_ids
            values = batch.column(column)
            if not is_selected.all():
                values, places = values.filter(is_selected), places[is_selected]
            if len(places):
                yield order[places], values

    def _scanned(self, column: str, batch_rows: int) -> Iterator[pa.RecordBatch]:
        scanner = self.table.to_lance().scanner(
            columns=[column],
            filter=self.filter,
            with_row_id=True,
            batch_size=batch_rows,
            batch_readahead=_BATCHES_AHEAD,
        )
        yield from scanner.to_batches()

    def _fetched(self, row_ids: NDArray[np.uint64], column: str, batch_rows: int) -> Iterator[pa.RecordBatch]:
        for start in range(0, len(row_ids), batch_rows):
            rows = where(_rowid=row_ids[start : start + batch_rows].tolist())
            yield from self.table.to_lance().scanner(columns=[column], filter=rows, with_row_id=True).to_batches()


def find_rows(
    db: Database,
    groups: Sequence[Group],
    condition: str | None = None,
    *,
    exempt: Collection[str] = (),
    check: Callable[[], None] | None = None,
) -> Rows:
    """Find the committed rows of groups (of one checkpoint and sketcher) that satisfy an SQL condition.

    Rows of the sources `exempt` are always included; `chosen` marks the rows that satisfy the condition.

    Raises
    ------
    QueryError
        The condition is invalid SQL, names an unknown column, or is more than a condition.
    """
    table = db.vectors.table(groups[0].table)
    filter_ = where(checkpoint=groups[0].checkpoint.name, ingest_run=[run for group in groups for run in group.runs])
    frame = _cached(db, table, filter_, groups)
    satisfied: pl.Expr | pl.Series = pl.lit(value=True)
    if condition is not None:
        from lark_store.query.select.where import satisfying

        satisfied = satisfying(db, frame, condition, check)
    selected = frame.with_columns(chosen=satisfied).filter(pl.col("chosen") | pl.col("source").is_in(list(exempt)))
    return Rows(groups, table, filter_, selected.select(_KEPT), len(frame), check)


def _rows_per_batch(vector: Any) -> int:
    """Return the number of vectors of an Arrow type to read at once."""
    n_bytes = int(vector.list_size) * int(vector.value_type.bit_width) // 8
    return max(ROWS_PER_BATCH, min(_MOST_ROWS, _BATCH_BYTES // n_bytes))


def _cached(db: Database, table: Any, filter_: str, groups: Sequence[Group]) -> pl.DataFrame:
    """Return `_frame`, of an open store cached for several filters, as of several checkpoints, at one version."""
    frames: dict[str, pl.DataFrame] = db.remember("rows", (table.name, table.version), dict)
    frame = frames.pop(filter_, None)
    frames[filter_] = frame = _frame(table, filter_, groups) if frame is None else frame  # the last one
    while len(frames) > 1 and sum(kept.estimated_size() for kept in list(frames.values())) > _CACHED_BYTES:
        frames.pop(next(iter(frames)), None)  # other threads use them, too
    return frame


def _frame(table: Any, filter_: str, groups: Sequence[Group]) -> pl.DataFrame:
    """Read the small columns of all rows matched by a filter, with the names of their groups."""
    runs = {run: number for number, group in enumerate(groups) for run in group.runs}
    scalars = table.to_lance().scanner(columns=list(_SCALARS), filter=filter_, with_row_id=True).to_table()
    frame = pl.DataFrame(pl.from_arrow(scalars)).select(
        pl.col("_rowid").alias("row_id"),
        pl.col("ingest_run").replace_strict(runs, return_dtype=pl.Int32).alias("group"),
        *_SCALARS,
    )
    names = {"group": pl.Int32} | dict.fromkeys(("source", "stage", "domain", "variant"), pl.String)
    of_groups = [(n, g.source.name, g.source.stage, g.source.domain, g.variant.name) for n, g in enumerate(groups)]
    return frame.join(pl.DataFrame(of_groups, schema=names, orient="row"), on="group", maintain_order="left")
