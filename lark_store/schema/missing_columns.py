"""Add missing tables to an older store, and missing columns to its tables, filled where the rows allow it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lark_store.core.retry import retry
from lark_store.schema.checksums import CHECKSUM, row_checksums, score_checksums, set_checksums
from lark_store.schema.faults import FAULTS
from lark_store.schema.sign_codes import code_bytes, codes_of
from lark_store.schema.table_schemas import ANSWERS, EMBEDDING_PREFIX, SKETCH_PREFIX, kind_of
from lark_store.schema.vectors import ROWS_PER_BATCH, ROWS_PER_TEXT_BATCH, where

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from lark_store.schema.vectors import VectorStore

_NARROW_TABLES = {"samples", "failures", "source_influence"}
_KEYS = {
    "samples": ["source", "sample_id"],
    "embeddings": ["source", "sample_id"],
    "sketches": ["row_key"],
    "source_influence": ["score_run", "query_id"],
    "failures": ["ingest_run", "checkpoint", "source", "variant", "sample_id", "reason"],
}
_NEW_TABLES = ("probes", "eif")
_SCORE_KEYS = ["score_run", "query_id", "source", "variant"]


def complete(vectors: VectorStore) -> dict[str, str]:
    """Add missing tables; to each other, add missing codes, `n_cut`, predicted answers, checksums and chats' columns.

    Unreadable tables are left unchanged and returned, with the reason.
    """
    unreadable: dict[str, str] = {}
    vectors.create_missing(_NEW_TABLES)
    for name in vectors.table_names():
        if name.startswith((SKETCH_PREFIX, EMBEDDING_PREFIX)) or name in _NARROW_TABLES:
            try:
                _complete(vectors, name)
            except FAULTS as error:
                unreadable[name] = str(error).splitlines()[0]
    return unreadable


def fill_checksums(vectors: VectorStore, name: str) -> None:
    """Set the checksum of rows without one to match their current values."""
    table = vectors.table(name)
    if CHECKSUM not in table.schema.names:
        _complete(vectors, name)
        return
    if table.count_rows(f"{CHECKSUM} IS NOT NULL") == 0:
        table.to_lance().drop_columns([CHECKSUM])
        _complete(vectors, name)
        return
    keys, score_lookup = _KEYS[kind_of(name)], {}
    columns = [column for column in table.schema.names if column != CHECKSUM]
    if name == "source_influence":
        score_lookup = _score_checksums(vectors, columns)
    for rows in list(vectors.scan(name, keys, f"{CHECKSUM} IS NULL", ROWS_PER_BATCH)):
        filters = " OR ".join(f"({where(**row)})" for row in rows.to_pylist())
        full_rows = vectors.read_table(name, columns, filters)
        if name == "failures":  # one sample may have failed twice in one run
            full_rows = full_rows.group_by(columns).aggregate([]).select(columns)
        values = _look_up(score_lookup, full_rows) if score_lookup else row_checksums(full_rows)
        vectors.put(vectors.table(name), set_checksums(full_rows, values).select(table.schema.names), keys)


def _complete(vectors: VectorStore, name: str) -> None:
    if name.startswith(SKETCH_PREFIX):
        kind = vectors.table(name).schema.field("vector").type
        codes = pa.list_(pa.uint8(), code_bytes(kind.list_size))
        _add(vectors, name, pa.field("code", codes), ["vector"], _codes)
        _add(vectors, name, pa.field("n_cut", pa.int32()))
        for column in ANSWERS:
            _add(vectors, name, pa.field(column, pa.string()))
    for column in ("completion", "messages", "tools") if name == "samples" else ():
        _add(vectors, name, pa.field(column, pa.string()))
    columns = vectors.table(name).schema.names
    field = pa.field("checksum", pa.int64())
    if name == "source_influence" and field.name not in columns:
        lookup = _score_checksums(vectors, columns)  # Lance can't read another table while it adds a column
        _add(vectors, name, field, _SCORE_KEYS, lambda rows: _look_up(lookup, rows))
    else:
        _add(vectors, name, field, columns, row_checksums)


def _codes(rows: pa.RecordBatch) -> NDArray[Any]:
    column = rows.column("vector")
    return codes_of(column.flatten().to_numpy().reshape(len(column), -1))


def _score_checksums(vectors: VectorStore, columns: list[str]) -> dict[tuple[int, str, str, str], int]:
    """Return the checksum of each `source_influence` row by its keys, reading one score run at a time."""
    checksums: dict[tuple[int, str, str, str], int] = {}
    runs = vectors.read("source_influence", ["score_run"])["score_run"].unique().sort()
    hit_columns = vectors.table("influence").schema.names
    for run in runs:
        sums = vectors.read("source_influence", columns, where(score_run=run)).to_arrow()
        hits = vectors.read("influence", hit_columns, where(score_run=run)).to_arrow()
        checksums |= dict(zip(_keys(sums), score_checksums(sums, hits).tolist(), strict=True))
    return checksums


def _look_up(lookup: dict[tuple[int, str, str, str], int], rows: pa.RecordBatch) -> NDArray[np.int64]:
    return np.array([lookup[key] for key in _keys(rows)], np.int64)


def _keys(rows: pa.Table | pa.RecordBatch) -> list[tuple[int, str, str, str]]:
    return list(zip(*(rows.column(name).to_pylist() for name in _SCORE_KEYS), strict=True))


def _add(
    vectors: VectorStore,
    name: str,
    field: pa.Field,
    reads: list[str] | None = None,
    values: Callable[[pa.RecordBatch], NDArray[Any]] | None = None,
) -> None:
    """Add a column in one commit: null, or computed by `values` from batches of rows."""
    table = vectors.table(name)
    if field.name in table.schema.names:
        return

    def column_of(batch: pa.RecordBatch) -> pa.RecordBatch:
        assert values is not None
        column = pa.array(values(batch).reshape(-1), getattr(field.type, "value_type", field.type))
        if pa.types.is_fixed_size_list(field.type):
            column = pa.FixedSizeListArray.from_arrays(column, type=field.type)
        return pa.RecordBatch.from_arrays([column], schema=pa.schema([field]))

    def add() -> None:
        table.checkout_latest()
        if field.name in table.schema.names:  # another process added it
            return
        if values is None:
            table.to_lance().add_columns(field)
        else:
            size = ROWS_PER_BATCH if name.startswith(SKETCH_PREFIX) else ROWS_PER_TEXT_BATCH
            table.to_lance().add_columns(column_of, read_columns=reads, batch_size=size)

    retry(add, f"the column `{field.name}` can't be added to `{name}`")
    table.checkout_latest()
