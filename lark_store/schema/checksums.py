"""Checksums of stored rows: they detect a changed byte in any column, even if the value looks valid.

A row's checksum covers its columns by name, except `checksum` itself and nulls, so a nullable column added by a later
schema leaves it valid. The checksum of a `source_influence` row also covers its `influence` rows.

Shape letters: N rows.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    Rows = Any  # pa.Table or pa.RecordBatch: pyarrow has no types

CHECKSUM = "checksum"


def checksum(values: dict[str, Any], *parts: bytes | memoryview) -> int:
    """Return a row's checksum, a signed 64-bit integer: BLAKE2b of its values as JSON and its binary parts.

    >>> checksum({"a": 1, "b": None}) == checksum({"a": 1})
    True
    """
    present = {name: value for name, value in values.items() if value is not None and name != CHECKSUM}
    digest = blake2b(json.dumps(present, sort_keys=True, default=str).encode(), digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little", signed=True)


def row_checksums(rows: Rows) -> NDArray[np.int64]:
    """Return the checksum of each row, (N,). Fixed-size lists enter as bytes."""
    names = [name for name in rows.schema.names if name != CHECKSUM]
    wide = [name for name in names if pa.types.is_fixed_size_list(rows.schema.field(name).type)]
    narrow = rows.select([name for name in names if name not in wide]).to_pylist()
    arrays = [_binary(rows.column(name)) for name in sorted(wide)]
    checksums = (
        checksum(values, *(memoryview(array[row]).cast("B") for array in arrays)) for row, values in enumerate(narrow)
    )
    return np.fromiter(checksums, np.int64, len(narrow))


def _binary(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """Return a column of lists of length K as an array (N, K)."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values: NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values).reshape(len(array), array.type.list_size)


def with_checksums(rows: Rows) -> Rows:
    """Return rows with the column `checksum` filled, at its position in the schema or at the end."""
    return set_checksums(rows, row_checksums(rows))


def score_checksums(sums: Rows, hits: Rows) -> NDArray[np.int64]:
    """Return the checksum of each `source_influence` row, (N,); it covers the matching `influence` rows too.

    `hits` must hold all `influence` rows of the runs and queries in `sums`, in any order.
    """
    hits_by_query: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for hit in hits.to_pylist():
        hits_by_query.setdefault((hit["score_run"], hit["query_id"]), []).append(hit)
    checksums = []
    for row in sums.to_pylist():
        query_hits = sorted(hits_by_query.get((row["score_run"], row["query_id"]), ()), key=lambda hit: hit["rank"])
        checksums.append(checksum(row, json.dumps(query_hits, sort_keys=True).encode()))
    return np.array(checksums, np.int64)


def with_score_checksums(sums: pa.Table, hits: pa.Table) -> pa.Table:
    """Return `source_influence` rows with checksums; see `score_checksums`."""
    return set_checksums(sums, score_checksums(sums, hits))


def set_checksums(rows: Rows, values: Iterable[int]) -> Rows:
    """Return rows with the given checksums."""
    field, column = pa.field(CHECKSUM, pa.int64()), pa.array(values, pa.int64())
    if CHECKSUM in rows.schema.names:
        return rows.set_column(rows.schema.get_field_index(CHECKSUM), field, column)
    return rows.append_column(field, column)
