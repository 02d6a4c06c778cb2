"""The products of sketches: streamed from the table, multiplied with the queries'. Memory does not grow with N.

Lance reads and decodes in threads of its own, some batches ahead, while this thread multiplies. A batch is widened to
float32 just before it is multiplied, and every sum is float32.

Shape letters: Q queries, B rows of a batch, K sketch bins, N rows.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lark_store.errors import InputError
from lark_store.schema.vectors import ROWS_PER_BATCH, row_key, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    from numpy.typing import NDArray

    from lark_store.query.groups import Group
    from lark_store.query.rows import Rows
    from lark_store.schema.vectors import VectorStore

_BLOCK = 512  # rows of a product of many queries
_FEW = 8  # so many queries are multiplied row by row, which one thread does as fast as memory gives
_STRETCH = 8  # rows widened at once for few queries: they stay in a core's cache


@dataclass(frozen=True)
class Queries:
    """Query sketches in memory: `ids` (Q), `unit_QK` float32 with norm 1, `norm_Q` the gradients' norms."""

    ids: list[str]
    unit_QK: torch.Tensor
    norm_Q: torch.Tensor


@dataclass(frozen=True)
class Products:
    """Of one batch: the rows' `numbers` (B), cosines with the queries (Q, B), and the sign-null's scales or None.

    `scale_QB` is √Σ (q_i z_i)² over the bins, the standard deviation of a cosine whose signs are drawn at random.
    """

    numbers: NDArray[np.int64]
    cosine_QB: torch.Tensor
    scale_QB: torch.Tensor | None = None


def pick_device(name: str) -> torch.device:
    """Return where products are made: `auto` takes CUDA where there is one, else the CPU.

    Raises
    ------
    InputError
        There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device `{name}` here", "use `--device auto`, `cpu` or `cuda`") from error


def device_name(device: torch.device) -> str:
    """Return a device's name as people know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"


def stored_of(column: pa.Array) -> torch.Tensor:
    """Return a column of sketches as it is stored, (B, K) float16 or float32 with norm √K, in place."""
    flat = column.flatten().to_numpy(zero_copy_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        return torch.from_numpy(flat).view(-1, column.type.list_size)


def load_queries(vectors: VectorStore, group: Group, ids: list[str] | None = None) -> Queries:
    """Read the sketches of a group's queries, or of those with the given ids, in order of id."""
    chosen = group.filter
    if ids is not None:  # the key has an index
        at = (group.checkpoint.name, group.source.name, group.variant.name)
        chosen = where(row_key=[row_key(*at, name) for name in ids], ingest_run=group.runs)
    names: list[str] = []
    parts: list[torch.Tensor] = []
    norms: list[float] = []
    for batch in vectors.scan(group.table, ["sample_id", "grad_norm", "vector"], chosen, ROWS_PER_BATCH):
        names += batch.column("sample_id").to_pylist()
        parts.append(stored_of(batch.column("vector")).float())
        norms += batch.column("grad_norm").to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)
    if not order:
        return Queries([], torch.empty(0, 0), torch.empty(0))
    unit = torch.nn.functional.normalize(torch.cat(parts)[order], dim=1)
    return Queries([names[i] for i in order], unit, torch.tensor(norms)[order])


def products(rows: Rows, queries: Queries, *, device: str = "auto", scales: bool = False) -> Iterator[Products]:
    """Stream the rows' sketches and multiply them with the queries'."""
    where_to = pick_device(device)
    if len(queries.ids) <= _FEW and where_to.type == "cpu":
        with _one_thread():
            yield from _few(rows, queries, scales=scales)
    else:
        yield from _many(rows, queries, where_to, scales=scales)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch on this thread: for products this small, waking others takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _few(rows: Rows, queries: Queries, *, scales: bool) -> Iterator[Products]:
    unit = queries.unit_QK
    k = unit.shape[1]
    wide = torch.empty(_STRETCH, k)
    squared = unit.square() if scales else None
    for numbers, column in rows.stream():
        stored = stored_of(column)
        cosine, norm = torch.empty(len(unit), len(stored)), torch.empty(len(stored))
        scale = torch.empty_like(cosine) if scales else None
        for start in range(0, len(stored), _STRETCH):
            some = stored[start : start + _STRETCH]
            part = wide[: len(some)].copy_(some)
            here = slice(start, start + len(some))
            for number, query in enumerate(unit):
                torch.mv(part, query, out=cosine[number, here])
            norm[here] = torch.linalg.vector_norm(part, dim=1)
            if scale is not None and squared is not None:
                scale[:, here] = squared @ part.square_().T
        yield Products(numbers, cosine.div_(norm), None if scale is None else scale.sqrt_().div_(norm))


def _many(rows: Rows, queries: Queries, device: torch.device, *, scales: bool) -> Iterator[Products]:
    unit = queries.unit_QK.to(device)
    k = unit.shape[1]
    wide = torch.empty(_BLOCK, k, device=device)
    held: list[NDArray[np.int64]] = []
    filled = 0

    def multiply() -> Products:
        part = wide[:filled]
        norm = torch.linalg.vector_norm(part, dim=1)  # rounding to float16 takes it up to 5e-5 off √k
        cosine = (unit @ part.T).div_(norm).cpu()
        scale = (unit.square() @ part.square_().T).sqrt_().div_(norm).cpu() if scales else None
        return Products(np.concatenate(held), cosine, scale)

    for numbers, column in rows.stream():
        if filled + len(numbers) > _BLOCK:
            yield multiply()
            held, filled = [], 0
        wide[filled : filled + len(numbers)] = stored_of(column).to(device, non_blocking=True)
        held.append(numbers)
        filled += len(numbers)
    if filled:
        yield multiply()


def units(rows: Rows) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Stream the rows' numbers (B) and their sketches (B, K) float32 with norm 1."""
    for numbers, column in rows.stream():
        yield numbers, torch.nn.functional.normalize(stored_of(column).float(), dim=1)


def matrix(rows: Rows, queries: Queries, **how: Any) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Return all cosines, (Q, N), and the scales where they are asked for."""
    cosine = np.empty((len(queries.ids), len(rows)), np.float32)
    scale = np.empty_like(cosine) if how.get("scales") else None
    for made in products(rows, queries, **how):
        cosine[:, made.numbers] = made.cosine_QB.numpy()
        if scale is not None and made.scale_QB is not None:
            scale[:, made.numbers] = made.scale_QB.numpy()
    return cosine, scale
