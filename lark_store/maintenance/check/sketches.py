"""Checks of the sketch tables: each row's run, names, key, numbers and vector, and each ingest run's count.

Shape letters: B rows of a batch, K bins.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.core.names import IMPORTED
from lark_store.maintenance.check.checksums import CHANGED, MISSING, checked_rows, without_checksum
from lark_store.maintenance.check.findings import Finding, Repair, name_list
from lark_store.maintenance.check.frozen_store import FrozenStore, duplicates, hashes, stream
from lark_store.maintenance.delete_rows import deletion
from lark_store.schema.catalog import IngestRun
from lark_store.schema.catalog_base import now
from lark_store.schema.checksums import CHECKSUM
from lark_store.schema.faults import FAULTS, first_line
from lark_store.schema.sign_codes import codes_of
from lark_store.schema.table_schemas import ADDED, sketch_schema, sketch_table
from lark_store.schema.vectors import ROWS_PER_BATCH

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    from numpy.typing import NDArray

    from lark_store.schema.database import Database

_KEYS = ["checkpoint", "source", "variant", "sample_id"]
_SCALARS = ["row_key", *_KEYS, "ingest_run", "loss", "grad_norm"]
_TOLERANCE = {"float16": 1e-3, "float32": 1e-4}  # relative to the norm; float16 rounds a bin by up to 5e-4
_BATCHES_AHEAD = 4
_CODES_PER_BATCH = 4  # of 64 rows; a deep check tests all
_MAX_DIFFERING_BITS = 0.02  # share of a code's bits: sums near 0 can have either sign
# Faults of a row, the most severe first: code, severity and meaning.
_FAULTS = (
    ("orphan rows", "error", "their ingest run does not exist: readers skip them, and `ingest` treats them as done"),
    ("unfinished removal", "warning", "rows of a superseded ingest run, left by a removal"),
    ("fingerprint", "error", "their ingest run uses another table"),
    ("names", "error", "checkpoint, source or variant differ from their ingest run"),
    ("row key", "error", "the key does not match their names"),
    ("norm", "error", "the gradient's norm is not a positive number"),
    ("nan", "error", "the loss is not a number"),
    ("sample", "error", "their sample is not in the store"),
)


def check_sketches(store: FrozenStore) -> Iterator[Finding]:
    """Yield problems of the sketch tables, and fill `store.counts`."""
    for table in store.sketch_tables():
        try:
            yield from _check_layout(store, table)
            yield from _check_rows(store, table)
            yield from _check_keys(store, table)
            yield from _check_vectors(store, table)
        except FAULTS as error:
            store.unreadable.add(table)
            yield Finding("error", "unreadable", table, 1, f"{first_line(error)}; restore it from a backup")


def _runs_of(store: FrozenStore, table: str) -> list[IngestRun]:
    return [run for run in store.ingest_runs.values() if sketch_table(run.fingerprint) == table]


def _check_layout(store: FrozenStore, table: str) -> Iterator[Finding]:
    """Compare a table with its runs: the sketcher's width and type, and a single fingerprint."""
    runs = _runs_of(store, table)
    schema = store.vectors.table(table).schema
    kinds = {(store.sketchers[run.sketcher_id].k, store.sketchers[run.sketcher_id].dtype) for run in runs}
    for k, dtype in sorted(kinds):
        expected = sketch_schema(k, dtype)
        wrong = [name for name in schema.names if name in expected.names and not _has_same_type(schema, expected, name)]
        missing = set(expected.names) - set(schema.names) - {"code", *ADDED}
        if wrong or missing:
            columns = name_list([*wrong, *sorted(missing)])
            detail = f"the columns {columns} do not match sketches of k = {k} in {dtype}"
            yield Finding("error", "fingerprint", table, 1, detail)
    if len({run.fingerprint for run in runs}) > 1:
        yield Finding("error", "fingerprint", table, len(runs), "sketches of several fingerprints share the table")


def _has_same_type(schema: pa.Schema, expected: pa.Schema, name: str) -> bool:
    return bool(schema.field(name).type == expected.field(name).type)


def _check_rows(store: FrozenStore, table: str) -> Iterator[Finding]:
    """Yield rows without a run or sample, contradicting their run, or with invalid numbers."""
    runs = _run_frame(store, table)
    faulty: dict[int, list[pl.DataFrame]] = defaultdict(list)
    for frame in stream(store.vectors, table, _SCALARS):
        joined = frame.join(runs, on="ingest_run", how="left", maintain_order="left")
        for run, n in joined.group_by("ingest_run").len().rows():
            store.counts[run] += n
        sample: pl.Series | pl.Expr = pl.lit(value=True)
        if store.samples is not None:
            sample = pl.Series(np.isin(hashes(frame, ["source", "sample_id"]), store.samples), dtype=pl.Boolean)
        judged = joined.with_columns(fault=_fault(sample)).filter(pl.col("fault") >= 0)
        for fault in judged["fault"].unique():
            faulty[fault].append(judged.filter(fault=fault).select("_rowid", "row_key"))
    for fault, parts in sorted(faulty.items()):
        code, severity, meaning = _FAULTS[fault]
        rows = pl.concat(parts)
        detail = f"{meaning}: {name_list(rows['row_key'])}"
        yield Finding(severity, code, table, len(rows), detail, deletion(table, rows["_rowid"].to_numpy()))


def _run_frame(store: FrozenStore, table: str) -> pl.DataFrame:
    rows = [
        (
            *(run.id, run.status == "superseded", sketch_table(run.fingerprint) == table, store.is_at_work(run)),
            store.sketchers[run.sketcher_id].correction == IMPORTED,
            *store.names_of(run).values(),
        )
        for run in store.ingest_runs.values()
    ]
    schema: dict[str, Any] = {"ingest_run": pl.Int64} | dict.fromkeys(("gone", "here", "busy", "imported"), pl.Boolean)
    schema |= dict.fromkeys(("of_checkpoint", "of_source", "of_variant"), pl.String)
    return pl.DataFrame(rows, schema=schema, orient="row")


def _fault(sample: pl.Series | pl.Expr) -> pl.Expr:
    """Return the index of a row's fault in `_FAULTS`, or −1; rows being written have none."""
    names = ("checkpoint", "source", "variant")
    key = pl.concat_str([*names, "sample_id"], separator="/")
    tests = (
        pl.col("here").is_null(),
        pl.col("gone"),
        ~pl.col("here"),
        pl.any_horizontal([pl.col(name) != pl.col(f"of_{name}") for name in names]),
        pl.col("row_key") != key,
        ~(pl.col("grad_norm").is_finite() & (pl.col("grad_norm") > 0)),
        ~pl.col("imported") & ~pl.col("loss").is_finite(),
        ~sample,
    )
    fault = pl.lit(-1)
    for number, test in reversed(list(enumerate(tests))):
        fault = pl.when(test).then(number).otherwise(fault)
    return pl.when(pl.col("busy")).then(-1).otherwise(fault)


def _check_keys(store: FrozenStore, table: str) -> Iterator[Finding]:
    """Yield duplicate sketches. A repair keeps the oldest committed one."""
    rows = duplicates(store.vectors, table, _KEYS, ["ingest_run"])
    if rows.is_empty():
        return
    done = [run.id for run in store.ingest_runs.values() if run.status == "done"]
    ordered = rows.sort(~pl.col("ingest_run").is_in(done), "ingest_run", "_rowid")
    extra = ordered.filter(~pl.struct(_KEYS).is_first_distinct())
    keys = extra.select(pl.concat_str(_KEYS, separator="/")).to_series()
    repair = deletion(table, extra["_rowid"].to_numpy(), "delete all but the committed one")
    yield Finding("error", "duplicate key", table, len(extra), f"duplicate sketches: {name_list(keys)}", repair)


# --- vectors -------------------------------------------------------------------------------------------------------


def _check_vectors(store: FrozenStore, table: str) -> Iterator[Finding]:
    """Yield vectors with non-finite values, a norm other than √k or a wrong code, and changed rows."""
    dataset = store.vectors.table(table).to_lance()
    k, dtype = _shape(dataset.schema)
    columns = dataset.schema.names
    scanner = dataset.scanner(
        columns=columns, with_row_id=True, batch_size=ROWS_PER_BATCH, batch_readahead=_BATCHES_AHEAD
    )
    bad: dict[str, list[tuple[int, str]]] = defaultdict(list)
    n_missing = 0
    for batch in scanner.to_batches():
        vectors_BK = batch.column("vector").flatten().to_numpy(zero_copy_only=True).reshape(-1, k)
        wide_BK = vectors_BK.astype(np.float32)
        with np.errstate(all="ignore"):  # stored values may be NaN
            norm_B = np.sqrt(np.einsum("bk,bk->b", wide_BK, wide_BK) / k)
        finite_B = np.isfinite(norm_B)
        wrong = {"nan": ~finite_B, "norm": finite_B & ~(np.abs(norm_B - 1) < _TOLERANCE[dtype])}
        if "code" in columns:
            part = slice(None if store.deep else _CODES_PER_BATCH)
            wrong["code"] = finite_B[part] & ~_codes_agree(batch.column("code")[part], vectors_BK[part])
        if CHECKSUM in columns:
            state_B = checked_rows(batch)
            wrong["checksum"] = (state_B == CHANGED) & ~wrong["nan"] & ~wrong["norm"]
            n_missing += int((state_B == MISSING).sum())
        else:
            n_missing += batch.num_rows
        ids, keys = batch.column("_rowid").to_pylist(), batch.column("row_key").to_pylist()
        for kind, wrong_B in wrong.items():
            bad[kind] += [(ids[i], keys[i]) for i in np.flatnonzero(wrong_B)]
    details = {
        "nan": "vectors with NaN or infinite values",
        "norm": f"vectors whose norm is not √{k}",
        "code": "codes that do not match their vectors; approximate search may miss them",
        "checksum": "sketches that changed after they were written",
    }
    yield from without_checksum(table, n_missing)
    for kind, rows in bad.items():
        if rows:
            ids_N = np.array([row_id for row_id, _ in rows], np.uint64)
            detail = f"{details[kind]}: {name_list(key for _, key in rows)}"
            severity = "warning" if kind == "code" else "error"
            yield Finding(severity, kind, table, len(rows), detail, deletion(table, ids_N))


def _shape(schema: pa.Schema) -> tuple[int, str]:
    kind = schema.field("vector").type
    return int(kind.list_size), "float16" if str(kind.value_type) in {"halffloat", "float16"} else "float32"


def _codes_agree(column: Any, vectors_BK: NDArray[Any]) -> NDArray[np.bool_]:
    stored = column.flatten().to_numpy().reshape(len(vectors_BK), -1)
    with np.errstate(all="ignore"):
        n_differing = np.bitwise_count(stored ^ codes_of(vectors_BK)).sum(axis=1)
    agree: NDArray[np.bool_] = n_differing <= _MAX_DIFFERING_BITS * 8 * stored.shape[1]
    return agree


# --- runs ----------------------------------------------------------------------------------------------------------


def check_ingest_runs(store: FrozenStore) -> Iterator[Finding]:
    """Yield ingest runs with a wrong count, or ended without a commit."""
    tables = set(store.sketch_tables())
    for run in store.ingest_runs.values():
        table, n = sketch_table(run.fingerprint), store.counts.get(run.id, 0)
        if table in store.unreadable or table in store.broken:
            continue
        if run.status == "done" and run.n_sketched != n:
            detail = f"the run counts {run.n_sketched} sketches, its table has {n}"
            kind = "count" if table in tables else "missing table"
            repair = _recount(run.id, n, "count again")
            yield Finding("error", kind, store.label(run), abs(run.n_sketched - n), detail, repair)
        elif run.status in {"running", "interrupted", "failed"} and not store.is_at_work(run):
            detail = f"{run.status}, without a running process: its rows are not read until `ingest` resumes it"
            yield Finding("note", "stale run", store.label(run), n, detail, _recount(run.id, n, "commit its rows"))


def _recount(run_id: int, n: int, description: str) -> Repair:
    def recount(db: Database) -> None:
        with db.session() as session:
            run = session.get_one(IngestRun, run_id)
            run.n_sketched = n
            if run.status != "done":
                run.error = f"{run.status}; its rows are kept"
                run.status, run.finished_at = "done", run.finished_at or now()

    return Repair(description, recount)
