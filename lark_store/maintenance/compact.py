"""Compaction: merge small files, drop removed rows, update indices and delete old versions.

Other processes may read and ingest meanwhile. Versions tagged by snapshots stay, and so do uncommitted files, which may
belong to a writer.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.core.retry import retry
from lark_store.errors import InputError
from lark_store.maintenance.disk_usage import files_in, n_files
from lark_store.maintenance.prune_runs import forget_runs
from lark_store.results import OnProgress, Progress
from lark_store.schema.locks import maintenance
from lark_store.schema.table_schemas import SKETCH_PREFIX
from lark_store.schema.vectors import ROWS_PER_BATCH

if TYPE_CHECKING:
    from lark_store.schema.database import Database

REPORT = {
    "table": pl.String,
    "rows": pl.Int64,
    "files_before": pl.Int64,
    "files_after": pl.Int64,
    "bytes_before": pl.Int64,
    "bytes_after": pl.Int64,
    "seconds": pl.Float64,
}
SKETCHES_PER_FILE = 4096  # 512 MiB at k = 65,536 in float16
_SKETCHES_PER_PASS = 4 * SKETCHES_PER_FILE  # per commit: a conflict loses at most this work
_ROWS_PER_FILE = 1 << 20


def optimize(db: Database, keep_versions_days: float, on_progress: OnProgress | None) -> pl.DataFrame:
    """Compact each table in turn; see `Store.db_optimize`."""
    if not 0 <= keep_versions_days < 1e5:
        fact = f"`--keep-versions-days` must be at least 0 and below 100,000, not {keep_versions_days:g}"
        raise InputError(fact, "the default is 7; 0 keeps only the newest version")
    age = timedelta(days=keep_versions_days)
    rows = []
    with maintenance(db.location):
        names = sorted(name for name in db.vectors.table_names() if db.vectors.has(name))
        for number, name in enumerate(names):
            if on_progress:
                on_progress(Progress("optimizing", number, len(names)))
            rows.append(_optimize(db, name, age))
        forget_runs(db, age)
        if on_progress:
            on_progress(Progress("optimizing", len(names), len(names)))
    return pl.DataFrame(rows, schema=REPORT, orient="row")


def _optimize(db: Database, name: str, age: timedelta) -> tuple[Any, ...]:
    started = time.perf_counter()
    files_before, bytes_before = n_files(db.vectors.table(name)), sum(files_in(db.vectors, name).values())
    _compact(db, name)
    db.vectors.refresh_indices(db.vectors.table(name))
    clean(db, name, age, unverified=False)  # uncommitted files stay
    table, bytes_after = db.vectors.table(name), sum(files_in(db.vectors, name).values())
    after = (n_files(table), bytes_before, bytes_after, time.perf_counter() - started)
    return (name, int(table.count_rows()), files_before, *after)


def clean(db: Database, name: str, age: timedelta, *, unverified: bool) -> None:
    """Remove versions older than `age` and, if `unverified`, files of no version; snapshots' versions stay."""
    options = {"older_than": age, "delete_unverified": unverified, "error_if_tagged_old_versions": False}
    retry(
        lambda: db.vectors.table(name).to_lance().cleanup_old_versions(**options),
        f"old versions and files of `{name}` can't be removed",
    )


def _compact(db: Database, name: str) -> None:
    """Merge small files in several commits, without removed rows.

    Files are rewritten one at a time, or copied if no row was removed, so memory stays at a few hundred MB.
    """
    options: dict[str, Any] = {"num_threads": 1, "materialize_deletions_threshold": 0.0}
    if name.startswith(SKETCH_PREFIX):
        options |= {"target_rows_per_fragment": SKETCHES_PER_FILE, "batch_size": ROWS_PER_BATCH}
        options |= {"compaction_mode": "try_binary_copy", "max_source_rows": _SKETCHES_PER_PASS}
    else:
        options |= {"target_rows_per_fragment": _ROWS_PER_FILE, "batch_size": 1024}
    n_rows = int(db.vectors.table(name).count_rows())
    for _ in range(2 + n_rows // SKETCHES_PER_FILE):
        result = retry(
            lambda: db.vectors.table(name).to_lance().optimize.compact_files(**options), f"`{name}` can't be compacted"
        )
        if result.fragments_removed == 0:
            break
