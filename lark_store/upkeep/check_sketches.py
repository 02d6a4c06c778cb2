"""Checks of the sketch tables: each row's run, names, key, figures and vector, and each ingest run's count.

Shape letters: B rows of a batch, K bins.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.schema.catalog import IngestRun, now
from lark_store.schema.codes import codes_of
from lark_store.schema.retry import retried
from lark_store.schema.vectors import ROWS_PER_BATCH, sketch_schema, sketch_table
from lark_store.upkeep.findings import Finding, Mend, shown
from lark_store.upkeep.moment import FAULTS, IMPORTED, Moment, duplicates, first_line, hashes, stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    from numpy.typing import NDArray

    from lark_store.schema.database import Database

_KEYS = ["checkpoint", "source", "variant", "sample_id"]
_SCALARS = ["row_key", *_KEYS, "ingest_run", "loss", "grad_norm"]
_TOLERANCE = {"float16": 1e-3, "float32": 1e-4}  # of a norm; rounding to float16 takes a bin up to 5e-4 off
_BATCHES_AHEAD = 4
_CODES_PER_BATCH = 4  # of 64; all with `deep`
_SIGNS_APART = 0.02  # of a code's bits: a sum of bins near 0 may have either sign
_ROWS_PER_DELETE = 1000
_AGAIN = "delete the rows; `ingest` makes them again"
# What is wrong with a row, the gravest first: a code, a severity and what it means.
_FAULTS = (
    ("orphan rows", "error", "no ingest run has their number: readers don't see them, and `ingest` takes them as done"),
    ("unfinished removal", "warning", "rows of a superseded ingest run, which a removal left"),
    ("fingerprint", "error", "their ingest run writes to another table"),
    ("names", "error", "checkpoint, source or variant are not those of their ingest run"),
    ("row key", "error", "the key is not made of their names"),
    ("norm", "error", "the gradient's norm is not a positive number"),
    ("nan", "error", "the loss is not a number"),
    ("sample", "error", "their sample is not in the store"),
)


def delete_rows(db: Database, table: str, row_ids: NDArray[np.uint64]) -> None:
    """Delete rows by id, some at a time."""
    for start in range(0, len(row_ids), _ROWS_PER_DELETE):
        some = ", ".join(str(i) for i in row_ids[start : start + _ROWS_PER_DELETE])
        retried(lambda s=some: db.vectors.table(table).delete(f"_rowid IN ({s})"), f"rows of `{table}` can't go")  # type: ignore[misc]


def deletion(table: str, row_ids: NDArray[np.uint64], words: str = _AGAIN) -> Mend:
    """Return what deletes rows of a table."""
    return Mend(words, lambda db: delete_rows(db, table, row_ids))


def check_sketches(at: Moment, samples: NDArray[np.uint64] | None, *, deep: bool) -> Iterator[Finding]:
    """Yield what is wrong with the sketch tables; fills `at.counts`. `samples`: sorted hashes of all, if known."""
    for table in at.sketch_tables():
        try:
            yield from _check_layout(at, table)
            yield from _check_rows(at, table, samples)
            yield from _check_keys(at, table)
            yield from _check_vectors(at, table, deep=deep)
        except FAULTS as error:
            at.unread.add(table)
            yield Finding("error", "unreadable", table, 1, f"{first_line(error)}; restore it from a backup")


def _runs_of(at: Moment, table: str) -> list[IngestRun]:
    return [run for run in at.ingest_runs.values() if sketch_table(run.fingerprint) == table]


def _check_layout(at: Moment, table: str) -> Iterator[Finding]:
    """Compare a table with its runs: their sketcher's width and type, and one fingerprint."""
    runs = _runs_of(at, table)
    schema = at.vectors.table(table).schema
    kinds = {(at.sketchers[run.sketcher_id].k, at.sketchers[run.sketcher_id].dtype) for run in runs}
    for k, dtype in sorted(kinds):
        expected = sketch_schema(k, dtype)
        wrong = [name for name in schema.names if name in expected.names and not _same(schema, expected, name)]
        missing = set(expected.names) - set(schema.names) - {"code"}
        if wrong or missing:
            what = f"the columns {shown([*wrong, *sorted(missing)])} are not those of sketches of k = {k} in {dtype}"
            yield Finding("error", "fingerprint", table, 1, what)
    if len({run.fingerprint for run in runs}) > 1:
        yield Finding("error", "fingerprint", table, len(runs), "sketches of several fingerprints share the table")


def _same(schema: pa.Schema, expected: pa.Schema, name: str) -> bool:
    return bool(schema.field(name).type == expected.field(name).type)


def _check_rows(at: Moment, table: str, samples: NDArray[np.uint64] | None) -> Iterator[Finding]:
    """Look for rows that belong to no run, say other things than it, or have no figures or no sample."""
    runs = _run_frame(at, table)
    found: dict[int, list[pl.DataFrame]] = defaultdict(list)
    for frame in stream(at.vectors, table, _SCALARS):
        joined = frame.join(runs, on="ingest_run", how="left", maintain_order="left")
        for run, n in joined.group_by("ingest_run").len().rows():
            at.counts[run] += n
        sample: pl.Series | pl.Expr = pl.lit(value=True)
        if samples is not None:
            sample = pl.Series(np.isin(hashes(frame, ["source", "sample_id"]), samples), dtype=pl.Boolean)
        judged = joined.with_columns(fault=_fault(sample)).filter(pl.col("fault") >= 0)
        for fault in judged["fault"].unique():
            found[fault].append(judged.filter(fault=fault).select("_rowid", "row_key"))
    for fault, parts in sorted(found.items()):
        what, severity, detail = _FAULTS[fault]
        rows = pl.concat(parts)
        yield Finding(
            severity,
            what,
            table,
            len(rows),
            f"{detail}: {shown(rows['row_key'])}",
            deletion(table, rows["_rowid"].to_numpy()),
        )


def _run_frame(at: Moment, table: str) -> pl.DataFrame:
    rows = [
        (
            *(run.id, run.status == "superseded", sketch_table(run.fingerprint) == table, at.is_at_work(run)),
            at.sketchers[run.sketcher_id].correction == IMPORTED,
            *at.names_of(run).values(),
        )
        for run in at.ingest_runs.values()
    ]
    schema: dict[str, Any] = {"ingest_run": pl.Int64} | dict.fromkeys(("gone", "here", "busy", "imported"), pl.Boolean)
    schema |= dict.fromkeys(("of_checkpoint", "of_source", "of_variant"), pl.String)
    return pl.DataFrame(rows, schema=schema, orient="row")


def _fault(sample: pl.Series | pl.Expr) -> pl.Expr:
    """Return the number of a row's fault in `_FAULTS`, −1 for none; rows that are being written have none."""
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


def _check_keys(at: Moment, table: str) -> Iterator[Finding]:
    """Look for sketches that are there twice. The committed one is kept, of several of these the oldest."""
    rows = duplicates(at.vectors, table, _KEYS, ["ingest_run"])
    if rows.is_empty():
        return
    done = [run.id for run in at.ingest_runs.values() if run.status == "done"]
    ordered = rows.sort(~pl.col("ingest_run").is_in(done), "ingest_run", "_rowid")
    extra = ordered.filter(~pl.struct(_KEYS).is_first_distinct())
    keys = extra.select(pl.concat_str(_KEYS, separator="/")).to_series()
    mend = deletion(table, extra["_rowid"].to_numpy(), "delete all but the committed one")
    yield Finding("error", "duplicate key", table, len(extra), f"sketches that are there twice: {shown(keys)}", mend)


# --- vectors -------------------------------------------------------------------------------------------------------


def _check_vectors(at: Moment, table: str, *, deep: bool) -> Iterator[Finding]:
    """Look for vectors that are not finite, have not norm √k, or another's code."""
    dataset = at.vectors.table(table).to_lance()
    k, dtype = _shape(dataset.schema)
    columns = [name for name in ("row_key", "code", "vector") if name in dataset.schema.names]
    scanner = dataset.scanner(
        columns=columns, with_row_id=True, batch_size=ROWS_PER_BATCH, batch_readahead=_BATCHES_AHEAD
    )
    bad: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for batch in scanner.to_batches():
        vectors_BK = batch.column("vector").flatten().to_numpy(zero_copy_only=True).reshape(-1, k)
        wide_BK = vectors_BK.astype(np.float32)
        with np.errstate(all="ignore"):  # what is stored may be no number
            norm_B = np.sqrt(np.einsum("bk,bk->b", wide_BK, wide_BK) / k)
        finite_B = np.isfinite(norm_B)
        wrong = {"nan": ~finite_B, "norm": finite_B & ~(np.abs(norm_B - 1) < _TOLERANCE[dtype])}
        if "code" in columns:
            some = slice(None if deep else _CODES_PER_BATCH)
            wrong["code"] = finite_B[some] & ~_codes_agree(batch.column("code")[some], vectors_BK[some])
        ids, keys = batch.column("_rowid").to_pylist(), batch.column("row_key").to_pylist()
        for what, wrong_B in wrong.items():
            bad[what] += [(ids[i], keys[i]) for i in np.flatnonzero(wrong_B)]
    details = {
        "nan": "vectors that hold NaN or infinite numbers",
        "norm": f"vectors whose norm is not √{k}",
        "code": "codes that are not those of their vectors; an approximate search may miss them",
    }
    for what, rows in bad.items():
        if rows:
            ids_N = np.array([row_id for row_id, _ in rows], np.uint64)
            detail = f"{details[what]}: {shown(key for _, key in rows)}"
            severity = "warning" if what == "code" else "error"
            yield Finding(severity, what, table, len(rows), detail, deletion(table, ids_N))


def _shape(schema: pa.Schema) -> tuple[int, str]:
    kind = schema.field("vector").type
    return int(kind.list_size), "float16" if str(kind.value_type) in {"halffloat", "float16"} else "float32"


def _codes_agree(column: Any, vectors_BK: NDArray[Any]) -> NDArray[np.bool_]:
    stored = column.flatten().to_numpy().reshape(len(vectors_BK), -1)
    with np.errstate(all="ignore"):
        apart = np.bitwise_count(stored ^ codes_of(vectors_BK)).sum(axis=1)
    agree: NDArray[np.bool_] = apart <= _SIGNS_APART * 8 * stored.shape[1]
    return agree


# --- runs ----------------------------------------------------------------------------------------------------------


def check_ingest_runs(at: Moment) -> Iterator[Finding]:
    """Yield the ingest runs that count other rows than they have, or that ended without a commit."""
    there = set(at.sketch_tables())
    for run in at.ingest_runs.values():
        table, n = sketch_table(run.fingerprint), at.counts.get(run.id, 0)
        if table in at.unread or table in at.broken:
            continue
        if run.status == "done" and run.n_sketched != n:
            lost = f"the run counts {run.n_sketched} sketches, its table has {n}"
            what = "count" if table in there else "missing table"
            yield Finding(
                "error", what, at.label(run), abs(run.n_sketched - n), lost, _recount(run.id, n, "count again")
            )
        elif run.status in {"running", "interrupted", "failed"} and not at.is_at_work(run):
            detail = f"{run.status}, and nobody is at work on it: nobody reads its rows until `ingest` goes on"
            yield Finding("note", "stale run", at.label(run), n, detail, _recount(run.id, n, "commit the rows it has"))


def _recount(run_id: int, n: int, words: str) -> Mend:
    def act(db: Database) -> None:
        with db.session() as session:
            run = session.get_one(IngestRun, run_id)
            run.n_sketched = n
            if run.status != "done":
                run.error = f"{run.status}; its rows are kept"
                run.status, run.finished_at = "done", run.finished_at or now()

    return Mend(words, act)
