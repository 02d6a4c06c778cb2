"""Checks of the scalar indices: each must list every row under the row's value."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.core.retry import retry
from lark_store.maintenance.check.findings import Finding, Repair, name_list
from lark_store.maintenance.check.frozen_store import FrozenStore, stream
from lark_store.schema.faults import FAULTS, first_line, is_panic
from lark_store.schema.table_schemas import INDICES, kind_of
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from lark_store.schema.database import Database

_VALUES_PER_FILTER = 4096


class _UnreadableIndexError(Exception):
    """An index can't be read."""


@contextmanager
def _reading_index() -> Iterator[None]:
    """Raise `_UnreadableIndexError` for errors of Lance, and for its panics on damaged pages."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, FAULTS) or is_panic(error):
            raise _UnreadableIndexError(first_line(error)) from error
        raise


def check_indices(store: FrozenStore) -> Iterator[Finding]:
    """Yield tables with damaged, missing or outdated indices; skipped while another process writes."""
    if not store.is_idle:
        return
    for name in store.vectors.table_names():
        kind = kind_of(name)
        if kind in INDICES and kind != "failures":  # failures are few, and their index is not maintained
            yield from _check_indices(store, name, INDICES[kind])


def _check_indices(store: FrozenStore, name: str, kinds: dict[str, str]) -> Iterator[Finding]:
    try:
        with _reading_index():
            table = store.vectors.table(name)
            if table.count_rows() == 0:
                return
            dataset = table.to_lance()
            indices = {column: index for index in dataset.describe_indices() for column in index.field_names}
            missing = [column for column in kinds if column not in indices]
            behind = {c: dataset.stats.index_stats(i.name)["num_unindexed_rows"] for c, i in indices.items()}
        wrong = {column: n for column in indices if (n := _misfiled(store, name, column, kinds.get(column)))}
    except _UnreadableIndexError as error:
        yield Finding("error", "index", name, 1, f"it can't be read: {error}", _rebuild(name))
        return
    except FAULTS:
        return  # the rows themselves can't be read, as another check says
    if wrong:
        detail = f"the index of {name_list(wrong)} lists wrong rows for a value: results may lack rows"
        yield Finding("error", "index", name, sum(wrong.values()), detail, _rebuild(name))
    outdated = [column for column, n in behind.items() if n]
    if missing or outdated:
        details = [f"no index on {name_list(missing)}"] if missing else []
        details += [f"{max(behind.values())} rows are not in the index of {name_list(outdated)}"] if outdated else []
        yield Finding("warning", "index", name, len(missing) + len(outdated), "; ".join(details), _refresh(name))


# --- rows under their values -------------------------------------------------------------------------------------


def _misfiled(store: FrozenStore, name: str, column: str, kind: str | None) -> int:
    """Count the rows that an index misses under their value, or lists under another."""
    if kind == "btree":  # many values: a batch of rows at a time
        frames: Iterator[pl.DataFrame] = stream(store.vectors, name, [column])
    else:
        batches = list(stream(store.vectors, name, [column]))
        frames = iter([pl.concat(batches)] if batches else [])
    return sum(_misfiled_rows(store, name, column, frame) for frame in frames)


def _misfiled_rows(store: FrozenStore, name: str, column: str, frame: pl.DataFrame) -> int:
    """Count misfiled rows with few queries: any two values differ in at least one queried set.

    Values are numbered from 1; set `bit` has the values with that bit. The index must return exactly its rows.
    """
    values = frame[column].unique(maintain_order=True).drop_nulls()
    numbers = frame[column].replace_strict(values, np.arange(1, len(values) + 1), default=0, return_dtype=pl.Int64)
    number_N, ids_N = numbers.to_numpy(), frame["_rowid"].to_numpy()
    wrong_N = np.zeros(len(ids_N), bool)
    for bit in range(len(values).bit_length()):
        subset = [value for i, value in enumerate(values.to_list(), 1) if i >> bit & 1]
        indexed_N = np.isin(ids_N, _ids(store, name, column, subset))
        wrong_N |= indexed_N != (number_N >> bit & 1).astype(bool)
    return int(wrong_N.sum())


def _ids(store: FrozenStore, name: str, column: str, values: list[Any]) -> NDArray[np.uint64]:
    """Return the row ids that the index lists for the values."""
    dataset = store.vectors.table(name).to_lance()
    parts = [np.empty(0, np.uint64)]
    for start in range(0, len(values), _VALUES_PER_FILTER):
        filter_ = where(**{column: values[start : start + _VALUES_PER_FILTER]})
        with _reading_index():
            rows = dataset.scanner(columns=[], filter=filter_, with_row_id=True, use_scalar_index=True).to_table()
        parts.append(rows.column("_rowid").to_numpy())
    return np.concatenate(parts)


# --- repair --------------------------------------------------------------------------------------------------------


def _refresh(name: str) -> Repair:
    return Repair("update the indices", lambda db: db.vectors.refresh_indices(db.vectors.table(name)))


def _rebuild(name: str) -> Repair:
    def run(db: Database) -> None:
        for index in db.vectors.table(name).list_indices():
            retry(lambda i=index: db.vectors.table(name).drop_index(i.name), f"an index of `{name}` can't be dropped")  # type: ignore[misc]
        db.vectors.refresh_indices(db.vectors.table(name))

    return Repair("rebuild the indices", run, is_first=True)
