"""Products of sketches: stream them from the table and multiply them with the queries'. Memory does not grow with N.

Lance reads and decodes in its own threads, some batches ahead, while this thread multiplies. A batch is widened to
float32 just before multiplication, and all sums are float32.

numpy multiplies a few queries with a small store, at the speed of memory. torch takes seconds to import: of all modules
that answer, only this one imports it, for many queries, a large store or a named device. Cosines of the two differ by
less than 1e-6.

Shape letters: Q queries, B rows of a batch, K sketch bins, N rows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_store.core.device import pick_device
from lark_store.schema.vectors import ROWS_PER_BATCH, row_key, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    import torch
    from numpy.typing import NDArray

    from lark_store.query.select.resolve import Group
    from lark_store.query.select.rows import Rows
    from lark_store.schema.vectors import VectorStore

_BLOCK = 512  # rows per product with many queries
_FEW = 8  # up to this many queries are multiplied by numpy: one thread saturates the memory bandwidth
_SMALL = 1 << 31  # numbers of all rows up to which numpy multiplies: beyond, torch saves more than its import costs
_STRETCH = 1 << 16  # numbers widened at once: they fit a core's cache
_PIECE = 1 << 13  # numbers summed at once: for more, BLAS wakes other threads, which takes longer than the work
_HALF_BITS = np.int32(-0x70002000)  # a float16's sign, exponent and mantissa, moved to their places in a float32
_HALF_SCALE = np.float32(2.0**112)  # a float32's exponent counts from 127, a float16's from 15


@dataclass(frozen=True)
class Queries:
    """Query sketches in memory: `ids` (Q), `unit_QK` float32 with norm 1, `norm_Q` the gradients' norms."""

    ids: list[str]
    unit_QK: NDArray[np.float32]
    norm_Q: NDArray[np.float32]


@dataclass(frozen=True)
class QueryBatch:
    """A block of queries: their sketches at each term (none for a lexical method), texts and format variant."""

    ids: list[str]
    sketches: list[Queries]
    texts: list[str]
    variant: str


@dataclass(frozen=True)
class Scores:
    """Scores (Q, N); `noise` (Q, N) is their standard deviation from sketching, None without sketches.

    `parts` has a hybrid's scores by name; for `scale` see `Products`.
    """

    score: NDArray[np.float32]
    noise: NDArray[np.float32] | None = None
    scale: NDArray[np.float32] | None = None
    parts: dict[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class Products:
    """One batch: the rows' `numbers` (B), cosines with the queries (Q, B), and the scales of the sign null or None.

    `scale_QB` is √Σ (q_i z_i)² over the bins, the standard deviation of a cosine under random signs.
    """

    numbers: NDArray[np.int64]
    cosine_QB: NDArray[np.float32]
    scale_QB: NDArray[np.float32] | None = None


def stored_of(column: pa.Array) -> NDArray[Any]:
    """View a column of sketches as stored, (B, K) float16 or float32 with norm √K, without a copy."""
    flat: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(-1, column.type.list_size)


def widened(stored_BK: NDArray[Any]) -> NDArray[np.float32]:
    """Convert stored sketches to float32."""
    out = np.empty(stored_BK.shape, np.float32)
    for rows in _stretches(*stored_BK.shape):
        _widen(stored_BK[rows], out[rows])
    return out


def normalized(vectors_BK: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale vectors to norm 1; zeros stay zeros."""
    norm_B1 = np.maximum(np.linalg.norm(vectors_BK, axis=1, keepdims=True), np.float32(1e-12))
    unit_BK: NDArray[np.float32] = vectors_BK / norm_B1
    return unit_BK


def _stretches(n_rows: int, k: int) -> Iterator[slice]:
    """Yield slices of rows that are widened at once."""
    step = max(1, _STRETCH // k)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _widen(stored_BK: NDArray[Any], out_BK: NDArray[np.float32]) -> None:
    """Write stored sketches, which are finite, to `out_BK`: exact, and five times faster than numpy's conversion."""
    if stored_BK.dtype != np.float16:
        np.copyto(out_BK, stored_BK)
        return
    bits_BK = out_BK.view(np.int32)
    np.copyto(bits_BK, stored_BK.view(np.int16))  # extends the sign
    np.left_shift(bits_BK, 13, out=bits_BK)
    np.bitwise_and(bits_BK, _HALF_BITS, out=bits_BK)
    np.multiply(out_BK, _HALF_SCALE, out=out_BK)


def _dots(rows_BK: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the dot products (B) of rows with one vector (K) or with rows (B, K), independent of a row's place."""
    k = rows_BK.shape[1]
    size = _PIECE if k % _PIECE == 0 else k
    pieces = np.vecdot(rows_BK.reshape(-1, k // size, size), other.reshape(*other.shape[:-1], k // size, size))
    dots_B: NDArray[np.float32] = pieces.sum(axis=-1)
    return dots_B


def load_queries(vectors: VectorStore, group: Group, ids: list[str] | None = None) -> Queries:
    """Read the sketches of a group's queries, or of the given ids, in order of id."""
    row_filter = group.filter
    if ids is not None:  # the key is indexed
        group_names = (group.checkpoint.name, group.source.name, group.variant.name)
        row_filter = where(row_key=[row_key(*group_names, name) for name in ids], ingest_run=group.runs)
    names: list[str] = []
    parts: list[NDArray[np.float32]] = []
    norms: list[float] = []
    for batch in vectors.scan(group.table, ["sample_id", "grad_norm", "vector"], row_filter, ROWS_PER_BATCH):
        names += batch.column("sample_id").to_pylist()
        parts.append(widened(stored_of(batch.column("vector"))))
        norms += batch.column("grad_norm").to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)
    if not order:
        return Queries([], np.empty((0, 0), np.float32), np.empty(0, np.float32))
    unit = normalized(np.concatenate(parts)[order])
    return Queries([names[i] for i in order], unit, np.array(norms, np.float32)[order])


def products(rows: Rows, queries: Queries, *, device: str = "auto", scales: bool = False) -> Iterator[Products]:
    """Stream the rows' sketches and multiply them with the queries'."""
    is_small = len(queries.ids) <= _FEW and len(rows) * queries.unit_QK.shape[1] <= _SMALL
    if is_small and device in {"auto", "cpu"}:
        yield from _few(rows, queries, scales=scales)
    else:
        yield from _many(rows, queries, pick_device(device), scales=scales)


def _few(rows: Rows, queries: Queries, *, scales: bool) -> Iterator[Products]:
    unit = queries.unit_QK
    squared = np.square(unit) if scales else None
    wide = np.empty((max(1, _STRETCH // unit.shape[1]), unit.shape[1]), np.float32)  # new memory costs as much as a sum
    for numbers, column in rows.stream():
        stored = stored_of(column)
        cosine, norm = np.empty((len(unit), len(stored)), np.float32), np.empty(len(stored), np.float32)
        scale = None if squared is None else np.empty_like(cosine)
        for columns in _stretches(*stored.shape):
            part = wide[: columns.stop - columns.start]
            _widen(stored[columns], part)
            norm[columns] = np.sqrt(_dots(part, part))
            for number, query in enumerate(unit):
                cosine[number, columns] = _dots(part, query)
            if scale is not None and squared is not None:
                np.square(part, out=part)
                for number, query in enumerate(squared):
                    scale[number, columns] = _dots(part, query)
        np.divide(cosine, norm, out=cosine)
        if scale is not None:
            np.divide(np.sqrt(scale), norm, out=scale)
        yield Products(numbers, cosine, scale)


def _many(rows: Rows, queries: Queries, device: torch.device, *, scales: bool) -> Iterator[Products]:
    import torch

    unit = torch.from_numpy(queries.unit_QK).to(device)
    k = unit.shape[1]
    wide = torch.empty(_BLOCK, k, device=device)
    pending: list[NDArray[np.int64]] = []
    filled = 0

    def multiply() -> Products:
        part = wide[:filled]
        norm = torch.linalg.vector_norm(part, dim=1)  # float16 rounding moves it up to 5e-5 from √k
        cosine = (unit @ part.T).div_(norm).cpu().numpy()
        scale = (unit.square() @ part.square_().T).sqrt_().div_(norm).cpu().numpy() if scales else None
        return Products(np.concatenate(pending), cosine, scale)

    for numbers, column in rows.stream():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # read only
            stored = torch.from_numpy(stored_of(column)).to(device, non_blocking=True)
        start = 0
        while start < len(numbers):
            stop = min(len(numbers), start + _BLOCK - filled)
            wide[filled : filled + stop - start] = stored[start:stop]
            pending.append(numbers[start:stop])
            filled += stop - start
            start = stop
            if filled == _BLOCK:
                yield multiply()
                pending, filled = [], 0
    if filled:
        yield multiply()


def units(rows: Rows) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Stream row numbers (B) and unit sketches (B, K) float32."""
    for numbers, column in rows.stream():
        yield numbers, normalized(widened(stored_of(column)))


def matrix(rows: Rows, queries: Queries, **options: Any) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Return all cosines, (Q, N), and the scales if `scales` is set."""
    cosine = np.empty((len(queries.ids), len(rows)), np.float32)
    scale = np.empty_like(cosine) if options.get("scales") else None
    for batch in products(rows, queries, **options):
        cosine[:, batch.numbers] = batch.cosine_QB
        if scale is not None and batch.scale_QB is not None:
            scale[:, batch.numbers] = batch.scale_QB
    return cosine, scale
