"""EIF runs: find or begin the run of a matrix, write its rows sample by sample, close it.

A run is identified by what determines its values: checkpoint, source, queries, variants, mode, optimizer, learning
rate, draw and recipe. Measuring again adds the missing pairs to the same run, so no pair is stored twice; a run that is
`done` has every pair of its samples and queries. An interrupted run keeps its rows, and the next command completes it.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from sqlalchemy import select

from lark_store.core.versions import versions
from lark_store.schema.catalog import EifRun
from lark_store.schema.catalog_base import now
from lark_store.schema.checksums import with_checksums
from lark_store.schema.faults import failure_reason
from lark_store.schema.table_schemas import EIF
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from lark_store.eif.material import Part, Rows
    from lark_store.schema.database import Database

    Floats = NDArray[np.float64]

NOISE = "noise"  # in a recipe: the rounding error of a loss, which identifies nothing


@dataclass(frozen=True)
class Job:
    """One matrix to measure: its part of the material, and how."""

    rows: Rows
    part: Part
    optimizer: str | None
    learning_rate: float | None
    recipe: dict[str, Any]

    @property
    def ids(self) -> dict[str, Any]:
        """The columns that identify the run, with the recipe."""
        rows = self.rows
        return {
            "checkpoint_id": rows.checkpoint.id,
            "source_id": rows.source.id,
            "variant_id": rows.variant.id,
            "queries_id": rows.queries.id,
            "query_variant_id": rows.query_variant.id,
            "mode": "context" if self.learning_rate is None else "finetune",
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "draw": self.part.draw,
        }


@dataclass(frozen=True)
class Todo:
    """The missing queries of each sample of a matrix, which includes the samples and queries measured before."""

    run: EifRun | None
    samples: list[str]
    queries: list[str]
    missing: dict[str, tuple[str, ...]]

    @property
    def n_missing(self) -> int:
        """The number of missing pairs."""
        return sum(map(len, self.missing.values()))


def find_run(db: Database, job: Job) -> EifRun | None:
    """Return the run of a matrix, if there is one."""
    with db.session() as session:
        runs = session.scalars(select(EifRun).filter_by(**job.ids).order_by(EifRun.id))
        usable = (run for run in runs if run.status != "superseded")
        return next((run for run in usable if _identity(run.recipe) == _identity(job.recipe)), None)


def _identity(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key != NOISE}


def todo(db: Database, job: Job) -> Todo:
    """Return what is missing of a matrix."""
    run = find_run(db, job)
    stored: dict[str, set[str]] = {}
    if run is not None:
        for sample, query in db.vectors.read("eif", ["sample_id", "query_id"], where(eif_run=run.id)).iter_rows():
            stored.setdefault(sample, set()).add(query)
    samples = sorted({*job.part.samples, *stored})
    queries = sorted({*job.part.queries, *(query for measured in stored.values() for query in measured)})
    missing = {s: tuple(q for q in queries if q not in stored.get(s, ())) for s in samples}
    return Todo(run, samples, queries, {sample: absent for sample, absent in missing.items() if absent})


class RunWriter:
    """Writes the rows of a run: begins or reopens it, and commits sample by sample."""

    def __init__(self, db: Database, job: Job, work: Todo, device: str) -> None:
        self._db, self._job, self._work = db, job, work
        self._table = db.vectors.table("eif")
        self.run = self._begin(device)

    def _begin(self, device: str) -> EifRun:
        with self._db.session() as session:
            if self._work.run is None:
                run = EifRun(**self._job.ids, recipe=self._job.recipe, versions=versions(), device=device)
                session.add(run)
            else:
                run = session.get_one(EifRun, self._work.run.id)
                run.recipe = run.recipe | self._job.recipe
            run.status, run.error, run.finished_at = "running", None, None
            session.flush()
            return run

    def add(self, sample: str, queries: Sequence[str], before_Q: Floats, after_Q: Floats) -> None:
        """Commit the rows of one sample."""
        self._db.location.locks.ensure()
        rows = self._job.rows
        names = {"checkpoint": rows.checkpoint.name, "source": rows.source.name, "queries": rows.queries.name}
        table = [
            {"eif_run": self.run.id, **names, "sample_id": sample, "query_id": query, "checksum": 0}
            | {"loss_before": before, "loss_after": after, "value": before - after}
            for query, before, after in zip(queries, before_Q.tolist(), after_Q.tolist(), strict=True)
        ]
        written = with_checksums(pa.Table.from_pylist(table, schema=EIF))
        self.run.lance_version = self._db.vectors.append(self._table, written)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Close the run as done, failed or interrupted."""
        try:
            yield
        except KeyboardInterrupt:
            self._finish("interrupted")
            raise
        except Exception as error:
            self._finish("failed", failure_reason(error))
            raise
        self.run.n_samples, self.run.n_queries = len(self._work.samples), len(self._work.queries)
        self._finish("done")
        self._db.vectors.refresh_indices(self._table)

    def _finish(self, status: str, error: str | None = None) -> None:
        self.run.status, self.run.error, self.run.finished_at = status, error, now()
        with self._db.session() as session:
            session.merge(self.run)
