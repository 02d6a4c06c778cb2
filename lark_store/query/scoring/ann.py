"""Approximate search: select candidates by the codes stored with the sketches, then score them exactly.

A code holds the signs of the folded sketch; the query is folded too but stays float32. Their product, the sum of the
query's folded bins with the code's signs, ranks the rows; the first `candidates` of them are scored exactly.
`lark_store.query.scoring.ann_index` measures how many candidates are needed.

Shape letters: N rows, B bytes of a code, F = 8 B folded bins.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from lark_store.core.jit import compiled
from lark_store.schema.sign_codes import code_bins, fold

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lark_store.query.select.rows import Rows
    from lark_store.schema.database import Database

_ROWS_PER_BATCH = 4_096
_REMEMBERED = 256 << 20  # bytes of codes cached by an open store


def estimates(db: Database, rows: Rows, query_K: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the ranking estimate of each row for one query, (N): its cosine up to a common factor."""
    folded = fold(query_K[None], code_bins(len(query_K)))[0]
    signs = (np.arange(256)[:, None] >> np.arange(8) & 1) * 2 - 1  # (256, 8): the signs in each byte
    table = (folded.reshape(-1, 8) @ signs.T).astype(np.float32)  # (B, 256): each byte's share of the sum
    out = np.empty(len(rows), np.float32)
    if len(rows) * len(table) <= _REMEMBERED:
        codes, numbers = _all_codes(db, rows), np.arange(len(rows))
        parts = [slice(start, start + _ROWS_PER_BATCH) for start in range(0, len(rows), _ROWS_PER_BATCH)]
        list(_pool().map(lambda part: _sum_shares(codes[part], table, numbers[part], out), parts))
    else:
        for numbers, column in rows.stream("code", _ROWS_PER_BATCH):
            _sum_shares(_codes(column), table, numbers, out)
    return out


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="codes")


def _codes(column: object) -> NDArray[np.uint8]:
    flat: NDArray[np.uint8] = column.flatten().to_numpy()  # type: ignore[attr-defined]
    return flat.reshape(len(column), -1)  # type: ignore[arg-type]


def _all_codes(db: Database, rows: Rows) -> NDArray[np.uint8]:
    """Return the codes of all rows, (N, B), cached by an open store while the rows stay the same."""
    ids = rows.frame["row_id"].to_numpy()

    def read() -> NDArray[np.uint8]:
        out: NDArray[np.uint8] | None = None
        for numbers, column in rows.stream("code", _ROWS_PER_BATCH):
            codes = _codes(column)
            if out is None:
                out = np.empty((len(rows), codes.shape[1]), np.uint8)
            out[numbers] = codes
        assert out is not None
        return out

    return db.remember("codes", (rows.table.name, rows.table.version, ids.tobytes()), read)


@compiled
def _sum_shares(
    codes: NDArray[np.uint8], table: NDArray[np.float32], numbers: NDArray[np.int64], out: NDArray[np.float32]
) -> None:
    """Write each code's sum of table entries over its bytes to `out` at its number."""
    for i in range(codes.shape[0]):
        a = b = np.float32(0)
        for j in range(0, codes.shape[1] - 1, 2):
            a += table[j, codes[i, j]]
            b += table[j + 1, codes[i, j + 1]]
        if codes.shape[1] % 2:
            a += table[codes.shape[1] - 1, codes[i, codes.shape[1] - 1]]
        out[numbers[i]] = a + b
