"""The ingest: sketch and commit the missing samples of each checkpoint, source and variant.

A unit of work is one checkpoint × source × variant, with one row in `ingest_run`. Rows are committed to Lance in small
batches, then counts to the catalog, so an interruption loses at most the uncommitted rows. The next ingest with the
same recipe resumes the run; stored samples are never sketched twice.

    units       a plan per checkpoint, its units, their missing samples
    pipeline    load the model, fit a missing correction, build the path
    worker      per unit: render, sketch, commit
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.core.device import pick_device
from lark_store.ingest.distributed import joined_ranks
from lark_store.ingest.pipeline import IngestContext
from lark_store.ingest.units import checked, prepare
from lark_store.ingest.worker import DONE, CheckpointWorker
from lark_store.ingest.writer import UNIT_KEYS
from lark_store.results import IngestReport
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.results import Chosen, OnProgress
    from lark_store.schema.database import Database
    from lark_store.specs import IngestSpec

_COUNTS = ("n_samples", "n_existing", *DONE, "run")
_UNITS = (
    dict.fromkeys(UNIT_KEYS, pl.String) | dict.fromkeys(_COUNTS, pl.Int64) | {"seconds": pl.Float64, "bytes": pl.Int64}
)


def ingest(
    db: Database,
    spec: IngestSpec,
    choose: Callable[[IngestSpec], dict[str, Chosen]] | None = None,
    on_progress: OnProgress | None = None,
) -> IngestReport:
    """Sketch the missing samples, only candidates with `choose`; see `Store.ingest`."""
    with joined_ranks() as ranks:
        work = ranks.once(partial(checked, db, spec))  # reports a wrong name once
        spec = work.spec
        candidates = ranks.once(partial(choose, spec)) if choose else {}
        sketcher, plans = prepare(db, work, candidates)
        device = pick_device(spec.compute.device)
        context = IngestContext(db, sketcher, spec, device, ranks, on_progress if ranks.is_first else None)
        report: list[dict[str, Any]] = []
        notes: list[str] = []
        for plan in plans:
            worker = CheckpointWorker(context, plan())
            report += worker.run()
            notes += worker.notes
    return make_report(db, report, notes)


def make_report(db: Database, rows: list[dict[str, Any]], notes: list[str]) -> IngestReport:
    """Build the report from units' rows, with the reasons of failed samples."""
    units = pl.DataFrame(rows, schema=_UNITS)
    runs = [r["run"] for r in rows if r["run"] is not None and r["n_failed"]]
    columns = [*UNIT_KEYS, "sample_id", "reason"]
    failures = db.vectors.read("failures", columns, where(ingest_run=runs))
    return IngestReport(units, failures, notes)
