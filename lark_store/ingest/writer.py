"""Write sketches: collect rows, commit them to Lance, then commit counts to the catalog.

With several processes, each writes its own data files and rank 0 commits them together.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from lark_store.schema.catalog_base import now
from lark_store.schema.checksums import with_checksums
from lark_store.schema.faults import failure_reason
from lark_store.schema.table_schemas import FAILURES, sketch_rows
from lark_store.schema.vectors import ROWS_PER_BATCH, row_key, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.gradients.paths.hooks import Sketch
    from lark_store.ingest.distributed import Ranks
    from lark_store.modeling.tokens import Tokens
    from lark_store.schema.catalog import IngestRun, Sketcher
    from lark_store.schema.database import Database

UNIT_KEYS = ("checkpoint", "source", "variant")
_SECONDS_BETWEEN_COMMITS = 30.0
_BYTES_PER_COMMIT = 1 << 28  # 64 rows at k = 1,048,576 in float32


class _Counts(NamedTuple):
    """Numbers of written rows, of truncated samples, and of tokens cut."""

    n_rows: int
    n_truncated: int
    n_cut: int

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> Self:
        cut = [row.get("n_cut") or 0 for row in rows]
        return cls(len(rows), sum(map(bool, cut)), sum(cut))


class SketchWriter:
    """Writes a run's sketches; commits every 64 rows (fewer for very large ones) or 30 seconds.

    With several ranks, `commit` is collective and only the caller calls it.
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
        ranks.once(lambda: db.vectors.sketches(fingerprint, k=sketcher.k, dtype=sketcher.dtype).name)  # create once
        self.table = db.vectors.sketches(fingerprint, k=sketcher.k, dtype=sketcher.dtype)
        self.failures = db.vectors.table("failures")
        self.n_before = int(self.table.count_rows(where(ingest_run=run.id)))
        self.n_sketched = self.n_truncated = self.n_cut = 0
        self.n_failed = 0
        self.seconds = 0.0
        self._rows: list[dict[str, Any]] = []
        self._vectors: list[np.ndarray[Any, Any]] = []
        self._failed: list[dict[str, Any]] = []
        self._last_commit = time.monotonic()
        if ranks.is_first and self.failures.count_rows(where(ingest_run=run.id)):
            self.failures.delete(where(ingest_run=run.id))  # failed samples are retried

    def add(self, sample_id: str, tokens: Tokens, sketch: Sketch) -> None:
        """Add one sketch."""
        facts: dict[str, Any] = {
            "n_tokens": len(tokens.input_ids),
            "n_loss_tokens": tokens.n_targets,
            "n_cut": tokens.n_cut,
            "loss": sketch.loss,
            "grad_norm": sketch.grad_norm,
        }
        if tokens.answer is not None:
            facts |= {"answer": tokens.answer, "answer_tokens": json.dumps(tokens.targets)}
        self.put(sample_id, sketch.vector.numpy(), facts)

    def put(self, sample_id: str, vector: np.ndarray[Any, Any], facts: dict[str, Any]) -> None:
        """Add a row: `vector` (k,) with norm √k; facts n_tokens, n_loss_tokens, loss, grad_norm and maybe others."""
        key = row_key(**self.names, sample_id=sample_id)
        self._rows.append({"row_key": key, **self.names, "sample_id": sample_id, "ingest_run": self.run.id, **facts})
        self._vectors.append(vector.astype(self.numpy_dtype))
        late = time.monotonic() - self._last_commit > _SECONDS_BETWEEN_COMMITS
        if self.ranks.size == 1 and (len(self._rows) >= self.batch_rows or late):
            self.commit()

    def fail(self, sample_id: str, reason: str) -> None:
        """Record a failed sample."""
        self._failed.append({"ingest_run": self.run.id, **self.names, "sample_id": sample_id, "reason": reason})
        if self.ranks.size == 1 and len(self._failed) >= ROWS_PER_BATCH:
            self.commit()

    def commit(self) -> None:
        """Write the collected rows to Lance, then the counts to the catalog.

        The buffers are cleared first: an interrupted write may still succeed, so it is never repeated here. The next
        ingest finds any missing samples.
        """
        self.db.location.locks.ensure()
        rows, vectors, failed = self._rows, self._vectors, self._failed
        self._rows, self._vectors, self._failed = [], [], []
        self._last_commit = time.monotonic()
        if self.ranks.size == 1:
            if rows:
                self.run.lance_version = self.db.vectors.append(self.table, self._arrow(rows, vectors))
            self._count(_Counts.of(rows), failed)
            return
        written = self.db.vectors.write_files(self.table, self._arrow(rows, vectors)) if rows else []
        gathered = self.ranks.gather((written, _Counts.of(rows), failed))
        files = [file for rank_files, _, _ in gathered for file in rank_files]
        if files:
            self.run.lance_version = self.db.vectors.append_files(self.table, files)
        if self.ranks.is_first:
            total = _Counts(*map(sum, zip(*(counts for _, counts, _ in gathered), strict=True)))
            self._count(total, [row for _, _, rank_failed in gathered for row in rank_failed])

    def _count(self, counts: _Counts, failed: list[dict[str, Any]]) -> None:
        self.n_sketched += counts.n_rows
        self.n_truncated += counts.n_truncated
        self.n_cut += counts.n_cut
        self.n_failed += len(failed)
        if failed:
            self.db.vectors.append(self.failures, with_checksums(pa.Table.from_pylist(failed, schema=FAILURES)))
        self._record()

    def _arrow(self, rows: list[dict[str, Any]], vectors: list[np.ndarray[Any, Any]]) -> pa.Table:
        return sketch_rows(rows, np.stack(vectors), self.table.schema)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context manager that closes the run as done, failed or interrupted."""
        started = time.perf_counter()
        try:
            yield
        except KeyboardInterrupt:
            self.finish("interrupted", time.perf_counter() - started)
            raise
        except Exception as error:
            self.finish("failed", time.perf_counter() - started, failure_reason(error))
            raise
        self.seconds = time.perf_counter() - started
        self.finish("done", self.seconds)

    def finish(self, status: str, seconds: float, error: str | None = None) -> None:
        """Commit the remaining rows and close the run; a failed or interrupted rank does not wait for others."""
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
