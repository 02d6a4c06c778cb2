"""Sketches to rows: collect, commit to Lance, then commit the counts to the catalog.

Of several processes each writes its own data files; rank 0 commits them all together.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lark_store.schema.catalog import IngestRun, Sketcher, now
from lark_store.schema.faults import reason_of
from lark_store.schema.vectors import FAILURES, ROWS_PER_BATCH, row_key, sketch_rows, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.ingest.gradients import Sketch
    from lark_store.ingest.ranks import Ranks
    from lark_store.ingest.variants import Tokens
    from lark_store.schema.database import Database

UNIT_KEYS = ("checkpoint", "source", "variant")
_SECONDS_BETWEEN_COMMITS = 30.0
_BYTES_PER_COMMIT = 1 << 28  # no fewer rows than 64 up to k = 1,048,576 in float32


class SketchWriter:
    """Writes one run's sketches: a commit every 64 rows (fewer of very long ones) or 30 seconds.

    Where there are several ranks, `commit` is a meeting of them all, and only the caller calls it.
    """

    def __init__(
        self,
        db: Database,
        run: IngestRun,
        fingerprint: str,
        sketcher: Sketcher,
        names: dict[str, str],
        ranks: Ranks,
    ) -> None:
        self.db, self.run, self.names, self.ranks = db, run, names, ranks
        self.numpy_dtype = np.dtype(sketcher.dtype)
        self.batch_rows = min(ROWS_PER_BATCH, max(1, _BYTES_PER_COMMIT // (sketcher.k * self.numpy_dtype.itemsize)))
        ranks.once(lambda: db.vectors.sketches(fingerprint, k=sketcher.k, dtype=sketcher.dtype).name)  # made here alone
        self.table = db.vectors.sketches(fingerprint, k=sketcher.k, dtype=sketcher.dtype)
        self.failures = db.vectors.table("failures")
        self.n_before = int(self.table.count_rows(where(ingest_run=run.id)))
        self.n_sketched = 0
        self.n_failed = 0
        self.seconds = 0.0
        self._rows: list[dict[str, Any]] = []
        self._vectors: list[np.ndarray[Any, Any]] = []
        self._failed: list[dict[str, Any]] = []
        self._last_commit = time.monotonic()
        if ranks.is_first and self.failures.count_rows(where(ingest_run=run.id)):
            self.failures.delete(where(ingest_run=run.id))  # they are tried again now

    def add(self, sample_id: str, tokens: Tokens, sketch: Sketch) -> None:
        """Take one sketch."""
        facts = {"n_tokens": len(tokens.input_ids), "n_loss_tokens": tokens.n_targets}
        self.put(sample_id, sketch.vector.numpy(), facts | {"loss": sketch.loss, "grad_norm": sketch.grad_norm})

    def put(self, sample_id: str, vector: np.ndarray[Any, Any], facts: dict[str, float]) -> None:
        """Take one row: `vector` (k,) with norm √k, and its n_tokens, n_loss_tokens, loss and grad_norm."""
        key = row_key(**self.names, sample_id=sample_id)
        self._rows.append({"row_key": key, **self.names, "sample_id": sample_id, "ingest_run": self.run.id, **facts})
        self._vectors.append(vector.astype(self.numpy_dtype))
        late = time.monotonic() - self._last_commit > _SECONDS_BETWEEN_COMMITS
        if self.ranks.size == 1 and (len(self._rows) >= self.batch_rows or late):
            self.commit()

    def fail(self, sample_id: str, reason: str) -> None:
        """Take one sample that could not be sketched."""
        self._failed.append({"ingest_run": self.run.id, **self.names, "sample_id": sample_id, "reason": reason})
        if self.ranks.size == 1 and len(self._failed) >= ROWS_PER_BATCH:
            self.commit()

    def commit(self) -> None:
        """Write what was taken to Lance, then the counts to the catalog.

        What is being written is let go of first: a write that breaks off may still land, so it is never tried again
        here. The next ingest finds what is missing.
        """
        self.db.location.locks.ensure()
        rows, vectors, failed = self._rows, self._vectors, self._failed
        self._rows, self._vectors, self._failed = [], [], []
        self._last_commit = time.monotonic()
        if self.ranks.size == 1:
            if rows:
                self.run.lance_version = self.db.vectors.append(self.table, self._arrow(rows, vectors))
            self._count(len(rows), failed)
            return
        written = self.db.vectors.write_files(self.table, self._arrow(rows, vectors)) if rows else []
        everybody = self.ranks.gather((written, len(rows), failed))
        files = [file for theirs, _, _ in everybody for file in theirs]
        if files:
            self.run.lance_version = self.db.vectors.append_files(self.table, files)
        if self.ranks.is_first:
            self._count(sum(n for _, n, _ in everybody), [row for _, _, theirs in everybody for row in theirs])

    def _count(self, n_rows: int, failed: list[dict[str, Any]]) -> None:
        self.n_sketched += n_rows
        self.n_failed += len(failed)
        if failed:
            self.db.vectors.append(self.failures, pa.Table.from_pylist(failed, schema=FAILURES))
        self._record()

    def _arrow(self, rows: list[dict[str, Any]], vectors: list[np.ndarray[Any, Any]]) -> pa.Table:
        return sketch_rows(rows, np.stack(vectors), self.table.schema)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Close the run when the work ends, with the status that says how."""
        started = time.perf_counter()
        try:
            yield
        except KeyboardInterrupt:
            self.finish("interrupted", time.perf_counter() - started)
            raise
        except Exception as error:
            self.finish("failed", time.perf_counter() - started, reason_of(error))
            raise
        self.seconds = time.perf_counter() - started
        self.finish("done", self.seconds)

    def finish(self, status: str, seconds: float, error: str | None = None) -> None:
        """Commit what is left and close the run; one rank that fails or is interrupted does not wait for others."""
        if status == "done" or self.ranks.size == 1:
            self.commit()
        if not self.ranks.is_first:
            return
        self.n_before = int(self.table.count_rows(where(ingest_run=self.run.id))) - self.n_sketched
        self.run.status, self.run.error = status, error
        self.run.seconds = (self.run.seconds or 0.0) + seconds
        self.run.finished_at = now()
        self._record()
        self.db.vectors.refresh_indices(self.table)

    def _record(self) -> None:
        self.run.n_sketched, self.run.n_failed = self.n_before + self.n_sketched, self.n_failed
        with self.db.session() as session:
            session.merge(self.run)
