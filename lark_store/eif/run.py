"""`Store.eif`: measure the influence of each sample on each query, matrix by matrix, and store it."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.core.device import device_name, pick_device
from lark_store.eif.material import Loaded, Material, find_rows, gather
from lark_store.eif.meter import ContextMeter, TrainingMeter, check_fits, rounding_noise
from lark_store.eif.runs import NOISE, Job, RunWriter, Todo, todo
from lark_store.eif.sweep import read_sweep
from lark_store.errors import InputError
from lark_store.gradients.measured_influence import check_finite
from lark_store.modeling.auto_models import check_attention
from lark_store.modeling.loading import check_precision
from lark_store.results import EifReport, Progress
from lark_store.schema.database import check_unchanged
from lark_store.schema.locks import working
from lark_store.stats.sweep import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.eif.material import Rows
    from lark_store.eif.meter import Meter
    from lark_store.results import OnProgress
    from lark_store.schema.database import Database
    from lark_store.specs import EifSpec

_NAMES = ("checkpoint", "source", "queries", "mode", "optimizer")
_COUNTS = ("n_samples", "n_queries", "n_existing", "n_measured", "forward", "backward")
_RUNS = (
    {"eif_run": pl.Int64}
    | dict.fromkeys(_NAMES, pl.String)
    | {"learning_rate": pl.Float64, "draw": pl.Int64}
    | dict.fromkeys(_COUNTS, pl.Int64)
    | {"seconds": pl.Float64}
)
_FAILURES = dict.fromkeys(("source", "sample_id", "reason"), pl.String)


def measure(db: Database, spec: EifSpec, on_progress: OnProgress | None = None) -> EifReport:
    """Measure the missing pairs of all matrices and store them, or with `spec.plan` only count them.

    See `Store.eif`.
    """
    check_precision(spec.compute.precision)
    check_attention(spec.compute.attention)
    rows = find_rows(db, spec)
    if spec.plan:
        return _Measurement(db, spec, rows, on_progress).planned()
    names = {
        "checkpoint": [rows.checkpoint.name],
        "source": [rows.source.name, rows.queries.name],
        "variant": [rows.variant.name, rows.query_variant.name],
    }
    key = f"eif-{hashlib.sha256(repr(names).encode()).hexdigest()[:16]}"
    with working(db.location, key, f"measuring influence at {rows.label}", names):
        check_unchanged(db, rows.checkpoint, rows.source, rows.variant, rows.queries, rows.query_variant)
        return _Measurement(db, spec, rows, on_progress).measured()


@dataclass
class _Measurement:
    """A measurement under way."""

    db: Database
    spec: EifSpec
    rows: Rows
    on_progress: OnProgress | None
    _n_done: int = 0
    _total: int = 0

    @cached_property
    def _loaded(self) -> Loaded:
        compute = self.spec.compute
        return Loaded(self.rows.checkpoint, pick_device(compute.device), compute.precision, compute.attention)

    @cached_property
    def _material(self) -> Material:
        material = gather(self.db, self.spec, self.rows, self._loaded)
        if self.spec.in_context:
            check_fits(material, self._loaded)
        return material

    @cached_property
    def _jobs(self) -> dict[float | None, list[Job]]:
        """The matrices at each learning rate."""
        optimizer = None if self.spec.in_context else self.spec.optimizer
        return {
            rate: [Job(self.rows, part, optimizer, rate, self._recipe()) for part in self._material.parts]
            for rate in self.spec.rates
        }

    def _recipe(self) -> dict[str, Any]:
        material, compute, checkpoint = self._material, self.spec.compute, self.rows.checkpoint
        recipe: dict[str, Any] = {
            "weights_sha256": checkpoint.weights_sha256,
            "tokenizer_sha256": checkpoint.tokenizer_sha256,
            "template_sha256": material.samples.template_sha256,
            "query_template_sha256": material.queries.template_sha256,
            "precision": compute.precision,
            "device": pick_device(compute.device).type,
        }
        if not self.spec.in_context:
            recipe["steps"] = self.spec.steps
        if compute.attention != "auto":
            recipe["attention"] = compute.attention
        return recipe

    def planned(self) -> EifReport:
        """Count the passes of the missing pairs."""
        jobs = [job for of_rate in self._jobs.values() for job in of_rate]
        return self._report([self._row(job, todo(self.db, job)) for job in jobs], pl.DataFrame(schema=SCHEMA), [])

    def measured(self) -> EifReport:
        """Measure and store the missing pairs."""
        report: list[dict[str, Any]] = []
        notes: list[str] = []
        self._total = sum(todo(self.db, job).n_missing for jobs in self._jobs.values() for job in jobs)
        for rate, jobs in self._jobs.items():
            try:
                for row in self._at_rate(rate, jobs):
                    report.append(row)
                    self._n_done += row["n_measured"]
            except InputError as error:
                if self.spec.sweep is None:
                    raise
                notes.append(f"learning rate {rate:g} is left out: {error.fact}")
        rates = {rate: jobs for rate, jobs in self._jobs.items() if rate is not None}
        sweep = pl.DataFrame(schema=SCHEMA) if self.spec.sweep is None else read_sweep(self.db, rates)
        return self._report(report, sweep, notes)

    def _at_rate(self, rate: float | None, jobs: list[Job]) -> Iterator[dict[str, Any]]:
        """Measure the matrices at one learning rate; yield their rows of the report."""
        meter: Meter | None = None
        for job in jobs:
            work = todo(self.db, job)
            if self._is_complete(work):
                yield self._row(job, work)
                continue
            meter = meter or self._meter(rate)
            yield self._measure(job, work, meter)

    def _is_complete(self, work: Todo) -> bool:
        if work.run is None or work.run.status != "done" or work.n_missing:
            return False
        return self.spec.sweep is None or NOISE in work.run.recipe

    def _meter(self, rate: float | None) -> Meter:
        if rate is None:
            return ContextMeter(self._loaded, self.spec, self.rows.variant.template)
        return TrainingMeter(self._loaded, self.spec, rate)

    def _measure(self, job: Job, work: Todo, meter: Meter) -> dict[str, Any]:
        """Measure the missing pairs of one matrix; return its row of the report."""
        started = time.perf_counter()
        material = self._material
        if self.spec.sweep is not None and (work.run is None or NOISE not in work.run.recipe):
            job.recipe[NOISE] = rounding_noise(meter, material, job.part)
        writer = RunWriter(self.db, job, work, device_name(pick_device(self.spec.compute.device)))
        before: dict[tuple[str, ...], Any] = {}
        n_done = 0
        with writer.running():
            for sample, missing in work.missing.items():
                queries = [material.queries.measured_tokens(query) for query in missing]
                if missing not in before:
                    before[missing] = meter.before(queries)
                after = meter.after(material.samples.tokens(sample), queries)
                check_finite(after, f"`{sample}`")
                writer.add(sample, missing, before[missing], after)
                n_done += len(missing)
                if self.on_progress:
                    self.on_progress(Progress(self.rows.label, self._n_done + n_done, self._total))
        return self._row(job, work) | {"eif_run": writer.run.id, "seconds": time.perf_counter() - started}

    def _row(self, job: Job, work: Todo) -> dict[str, Any]:
        steps = 0 if self.spec.in_context else len(work.missing) * self.spec.steps
        n_before = sum(map(len, set(work.missing.values())))
        n_pairs = len(work.samples) * len(work.queries)
        return {
            "eif_run": None if work.run is None else work.run.id,
            "checkpoint": self.rows.checkpoint.name,
            "source": self.rows.source.name,
            "queries": self.rows.queries.name,
            "mode": job.ids["mode"],
            "optimizer": job.optimizer,
            "learning_rate": job.learning_rate,
            "draw": job.part.draw,
            "n_samples": len(work.samples),
            "n_queries": len(work.queries),
            "n_existing": n_pairs - work.n_missing,
            "n_measured": work.n_missing,
            "forward": steps + work.n_missing + n_before,
            "backward": steps,
            "seconds": None if self.spec.plan else 0.0,
        }

    def _report(self, rows: list[dict[str, Any]], sweep: pl.DataFrame, notes: list[str]) -> EifReport:
        failures = pl.DataFrame(self._material.failures, _FAILURES, orient="row")
        return EifReport(pl.DataFrame(rows, _RUNS), sweep, failures, notes)
