"""Baselines for finding a query's nearest rows, on the same vectors: one method and one process per call.

    PYTHON benchmarks/rivals_query.py '{"way": "faiss-flat", "flat": FOLDER, "home": FOLDER, "queries": 64}'

`flat` contains rows.npy (N, K) and queries.npy (Q, K), float16 of norm √K, as query.py exports them; `home` contains
the method's files. Methods:

- `gemm`: bare float32 products with the rows in memory; also returns all rows possibly in the top 10
- `bytes`: reads the files in `home` in order
- `lancedb-make`, `lancedb-flat`, `lancedb-batch`, `lancedb-rq-build`, `lancedb-rq`: a LanceDB table, searched one query
  per call, or (`batch`) all `calls` queries in one call
- `faiss-make`, `faiss-flat`, `faiss-sq16`: FAISS, float32 or float16 codes in memory; in an environment with faiss-cpu

README.md explains the timings. It needs NumPy and the method's library.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from probe import Probe, read_all, size_of

if TYPE_CHECKING:
    from collections.abc import Iterator

HITS = 10
ROUNDING = 1e-4  # of cosines: float16 shifts norms by 5e-5, and some methods do not renormalise
Spec = dict[str, Any]
Matrix = np.ndarray[Any, Any]


def rows_of(spec: Spec) -> Matrix:
    """Map the rows (N, K) float16."""
    mapped: Matrix = np.load(Path(spec["flat"]) / "rows.npy", mmap_mode="r")
    return mapped


def queries_of(spec: Spec) -> Matrix:
    """Read the requested queries, (Q, K) float16."""
    queries: Matrix = np.load(Path(spec["flat"]) / "queries.npy")[: spec["queries"]]
    return queries


def unit(vectors: Matrix) -> Matrix:
    """Return vectors as float32 of norm 1."""
    wide = vectors.astype(np.float32)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    return wide


def blocks(rows: Matrix, size: int = 1024) -> Iterator[tuple[int, Matrix]]:
    """Yield blocks of rows as float32 of norm 1, each with its start."""
    for start in range(0, len(rows), size):
        yield start, unit(rows[start : start + size])


def gemm(spec: Spec) -> None:
    """Time the float32 products of the queries and all rows, both in memory."""
    probe = Probe()
    with probe.step("imports"):
        import torch
    with probe.step("open"):
        queries = torch.from_numpy(unit(queries_of(spec)))
        row_blocks = [torch.from_numpy(block) for _, block in blocks(rows_of(spec))]
        out = torch.empty(len(queries), sum(len(block) for block in row_blocks))

    def products() -> None:
        start = 0
        for block in row_blocks:
            torch.mm(queries, block.T, out=out[:, start : start + len(block)])
            start += len(block)

    with probe.step("first"):
        torch.mm(queries[:1], row_blocks[0].T)
    for _ in range(spec.get("repeats", 1)):
        with probe.step("answer"):
            products()
    tenth = out.topk(min(HITS, out.shape[1]), dim=1).values[:, -1:]
    near = [row.nonzero().flatten().tolist() for row in out >= tenth - ROUNDING]
    probe.report(per_call=len(queries), top=near)


def read_bytes(spec: Spec) -> None:
    """Time plain reads of all files in `home`."""
    probe = Probe()
    with probe.step("answer"):
        total = read_all(Path(spec["home"]))
    probe.report(bytes=total)


# --- LanceDB -------------------------------------------------------------------------------------------------------


def lancedb_make(spec: Spec) -> None:
    """Write the rows into a LanceDB table, 64 at a time like lark-store, in files of 4,096 rows."""
    probe = Probe()
    with probe.step("imports"):
        import lancedb
        import pyarrow as pa
    rows = rows_of(spec)
    k = rows.shape[1]
    kind = pa.list_(pa.float16(), k)
    schema = pa.schema([pa.field("row", pa.int32()), pa.field("vector", kind)])

    def batches() -> Iterator[Any]:
        for start in range(0, len(rows), 64):
            chunk = np.ascontiguousarray(rows[start : start + 64])
            numbers = pa.array(range(start, start + len(chunk)), pa.int32())
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(chunk.reshape(-1)), type=kind)
            yield pa.record_batch([numbers, vectors], schema=schema)

    with probe.step("build"):
        import lance

        lance.write_dataset(batches(), str(Path(spec["home"]) / "rows.lance"), schema=schema, max_rows_per_file=4096)
    lancedb.connect(spec["home"]).open_table("rows")
    probe.report(bytes=size_of(Path(spec["home"])))


def lancedb_rq_build(spec: Spec) -> None:
    """Build IVF_RQ over the full dimension with its defaults; LANCE_DEFAULT_BATCH_SIZE lowers its memory."""
    probe = Probe()
    with probe.step("imports"):
        import lancedb
        from lancedb.index import IvfRq
    before = size_of(Path(spec["home"]))
    table = lancedb.connect(spec["home"]).open_table("rows")
    with probe.step("build"):
        table.create_index("vector", config=IvfRq(distance_type="cosine"))
    indices = [str(index) for index in table.list_indices()]
    batch = os.environ.get("LANCE_DEFAULT_BATCH_SIZE")
    probe.report(bytes=size_of(Path(spec["home"])) - before, index=indices, batch=batch)


def lancedb_search(spec: Spec) -> None:
    """Search flat (`lancedb-flat`, `lancedb-batch`), or with the index and `refine_factor=5`."""
    way = spec["way"]
    probe = Probe()
    with probe.step("imports"):
        import lancedb
    queries = queries_of(spec)[: spec.get("calls")]
    with probe.step("open"):
        table = lancedb.connect(spec["home"]).open_table("rows")

    def answer(query: Any) -> list[list[int]]:
        search = table.search(query).distance_type("cosine").select(["row", "_distance"]).limit(HITS)
        search = search.refine_factor(5) if way == "lancedb-rq" else search.bypass_vector_index()
        row_numbers: list[int] = search.to_arrow()["row"].to_pylist()
        return [row_numbers[start : start + HITS] for start in range(0, len(row_numbers), HITS)]

    with probe.step("first"):
        answer(queries[0])
    top = []
    for query in [[list(map(float, q)) for q in queries]] if way == "lancedb-batch" else queries:
        with probe.step("answer"):
            top += answer(query)
    probe.report(per_call=len(queries) if way == "lancedb-batch" else 1, top=top)


# --- FAISS ---------------------------------------------------------------------------------------------------------


def faiss_make(spec: Spec) -> None:
    """Write both kinds of index; the rows have norm 1, so inner products are cosines."""
    probe = Probe()
    with probe.step("imports"):
        import faiss
    rows = rows_of(spec)
    home = Path(spec["home"])
    home.mkdir(parents=True, exist_ok=True)
    kinds = {
        "faiss-flat": faiss.IndexFlatIP(rows.shape[1]),
        "faiss-sq16": faiss.IndexScalarQuantizer(
            rows.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        ),
    }
    for name, index in kinds.items():
        with probe.step(name):
            for _, block in blocks(rows):
                if not index.is_trained:
                    index.train(block)
                index.add(block)
            (home / name).mkdir(exist_ok=True)
            faiss.write_index(index, str(home / name / "index.faiss"))
        index.reset()
    probe.report(bytes=size_of(home))


def faiss_search(spec: Spec) -> None:
    """Search all queries in one call, the fastest mode of FAISS."""
    probe = Probe()
    with probe.step("imports"):
        import faiss
    queries = unit(queries_of(spec))
    with probe.step("open"):
        index = faiss.read_index(str(Path(spec["home"]) / "index.faiss"))
    with probe.step("first"):
        index.search(queries[:1], HITS)
    for _ in range(spec.get("repeats", 1)):
        with probe.step("answer"):
            _, row_numbers = index.search(queries, HITS)
    probe.report(per_call=len(queries), top=row_numbers.tolist())


WAYS = {
    "gemm": gemm,
    "bytes": read_bytes,
    "lancedb-make": lancedb_make,
    "lancedb-flat": lancedb_search,
    "lancedb-batch": lancedb_search,
    "lancedb-rq-build": lancedb_rq_build,
    "lancedb-rq": lancedb_search,
    "faiss-make": faiss_make,
    "faiss-flat": faiss_search,
    "faiss-sq16": faiss_search,
}


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    WAYS[spec["way"]](spec)
