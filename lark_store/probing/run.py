"""Probe facts at each checkpoint: one forward pass per batch for the greedy answer, then sampled answers."""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa

from lark_store.core.device import device_name, pick_device
from lark_store.core.versions import versions
from lark_store.modeling.checkpoints import verify
from lark_store.modeling.facts import NORMALISATION, decoded, force
from lark_store.modeling.greedy import end_ids
from lark_store.modeling.loading import context_length, load_model, load_tokenizer, meta_model, resolve_dtype
from lark_store.modeling.rendering import Renderer
from lark_store.modeling.sampled_answers import AnswerSampler
from lark_store.probing import cost, runs
from lark_store.probing.units import Unit, fact_batches, fill, max_tokens, settings, units_of
from lark_store.results import ProbeReport, Progress
from lark_store.schema.checksums import with_checksums
from lark_store.schema.database import check_unchanged
from lark_store.schema.table_schemas import PROBES
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    import torch

    from lark_store.modeling.checkpoints import ModelFolder
    from lark_store.modeling.facts import Fact, Forced
    from lark_store.results import OnProgress
    from lark_store.schema.catalog import Checkpoint
    from lark_store.schema.database import Database
    from lark_store.specs import ProbeSpec

_UNITS = {
    "checkpoint": pl.String,
    "source": pl.String,
    "variant": pl.String,
    "n_facts": pl.Int64,
    "n_existing": pl.Int64,
    "n_probed": pl.Int64,
    "n_failed": pl.Int64,
    "n_correct": pl.Int64,
    "n_latent": pl.Int64,
    "run": pl.Int64,
    "seconds": pl.Float64,
}


def probe(db: Database, spec: ProbeSpec, on_progress: OnProgress | None = None) -> ProbeReport:
    """Probe the missing facts, or estimate their cost; see `Store.probe`."""
    units = units_of(db, spec)
    device = pick_device(spec.compute.device)
    by_checkpoint: dict[int, list[Unit]] = {}
    for unit in units:
        by_checkpoint.setdefault(unit.checkpoint.id, []).append(unit)
    rows: list[dict[str, Any]] = []
    for group in by_checkpoint.values():
        worker = _Worker(db, spec, group[0].checkpoint, device, on_progress)
        rows += [worker.unit(unit) for unit in group]
        worker.close()
    failed = [row["run"] for row in rows if row["n_failed"] and row["run"] is not None]
    columns = ["checkpoint", "source", "variant", "sample_id", "reason"]
    failures = db.vectors.read("probes", columns, f"{where(probe_run=failed)} AND reason IS NOT NULL")
    return ProbeReport(pl.DataFrame(rows, schema=_UNITS), failures, is_plan=spec.dry_run)


class _Worker:
    """Probes the units of one checkpoint; the model is loaded for the first one with missing facts."""

    def __init__(
        self,
        db: Database,
        spec: ProbeSpec,
        checkpoint: Checkpoint,
        device: torch.device,
        on_progress: OnProgress | None,
    ) -> None:
        self.db, self.spec, self.device, self.on_progress = db, spec, device, on_progress
        self.checkpoint, self.how = checkpoint, settings(spec)
        self.folder: ModelFolder = verify(checkpoint).model
        shape = meta_model(self.folder)
        self.context = context_length(shape)
        dtype = str(resolve_dtype(shape, spec.compute.precision, device)).removeprefix("torch.")
        self.recipe = {"dtype": dtype, "attention": spec.compute.attention, "normalisation": NORMALISATION}
        self._loaded: tuple[Any, Any] | None = None

    def close(self) -> None:
        """Free the model before the next one is loaded."""
        self._loaded = None
        gc.collect()

    def _open(self) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""
        if self._loaded is None:
            if self.on_progress:
                self.on_progress(Progress(f"{self.checkpoint.name}: loading the model", 0, 0))
            compute = self.spec.compute
            model = load_model(self.folder, self.device, compute.precision, compute.attention)
            self._loaded = model, load_tokenizer(self.folder)
        return self._loaded

    def unit(self, unit: Unit) -> dict[str, Any]:
        """Probe a unit's missing facts; return its row of the report."""
        started, run = time.perf_counter(), runs.find_run(self.db, unit, self.how, self.recipe)
        fill(self.db, unit, run, self.spec.limit)
        n_pending = len(unit.pending)
        row = unit.names | {"n_facts": len(unit.ids), "n_existing": len(unit.ids) - n_pending}
        if self.spec.dry_run:
            seconds = cost.seconds(self.db, self.spec, unit, self.folder, self.device) if n_pending else 0.0
            return row | {"n_probed": n_pending, "seconds": seconds} | dict.fromkeys(_COUNTED)
        if n_pending or (run is not None and run.status != "done"):
            with runs.locked(self.db, unit, self.how):
                check_unchanged(self.db, unit.checkpoint, unit.source, unit.variant)
                fill(self.db, unit, runs.find_run(self.db, unit, self.how, self.recipe), self.spec.limit)
                run = self._run(unit)
        return row | self._counts(unit, run) | {"n_probed": n_pending, "seconds": time.perf_counter() - started}

    def _run(self, unit: Unit) -> Any:
        provenance = {"recipe": self.recipe, "versions": versions(), "device": device_name(self.device)}
        with runs.running(self.db, unit, self.how, provenance) as run:
            if unit.pending:
                self._probe(unit, run.id)
        return run

    def _counts(self, unit: Unit, run: Any) -> dict[str, Any]:
        """Count a unit's failed, correct and latent facts."""
        if run is None:
            return dict.fromkeys(_COUNTED)
        columns = ["sample_id", "is_correct", "n_correct", "n_samples", "reason"]
        rows = self.db.vectors.read("probes", columns, where(probe_run=run.id))
        rows = rows.filter(pl.col("sample_id").is_in(unit.ids))
        n_latent = len(rows.filter(~pl.col("is_correct") & (pl.col("n_correct") > 0))) if self.spec.samples else None
        n_correct, n_failed = int(rows["is_correct"].sum()), len(rows) - rows["reason"].null_count()
        return {"n_failed": n_failed, "n_correct": n_correct, "n_latent": n_latent, "run": run.id}

    def _probe(self, unit: Unit, run: int) -> None:
        model, tokenizer = self._open()
        renderer = Renderer(unit.variant, tokenizer, self.context)
        sampler = AnswerSampler(
            model, tokenizer, n=self.spec.samples, temperature=self.spec.temperature, seed=self.spec.seed
        )
        total, done, n_failed = len(unit.pending), 0, 0
        ends = end_ids(model, tokenizer)
        for batch, failed in fact_batches(self.db, unit, renderer, ends, max_tokens(self.spec, self.device)):
            rows = [{"sample_id": sample_id, "reason": str(reason)} for sample_id, reason in failed.items()]
            for fact, forced in zip(batch, force(model, batch) if batch else (), strict=True):
                if fact.sample_id in unit.pending:
                    rows.append(_row(fact, forced, sampler, tokenizer))
            self._write(unit, run, rows)
            done, n_failed = done + len(rows), n_failed + len(failed)
            if self.on_progress:
                self.on_progress(Progress(unit.label, done, total, n_failed))

    def _write(self, unit: Unit, run: int, rows: list[dict[str, Any]]) -> None:
        """Commit a batch's rows."""
        self.db.location.locks.ensure()
        blank = dict.fromkeys(PROBES.names) | {"n_samples": self.spec.samples, "checksum": 0}
        whole = [blank | {"probe_run": run} | unit.names | row for row in rows]
        self.db.vectors.append(
            self.db.vectors.table("probes"), with_checksums(pa.Table.from_pylist(whole, schema=PROBES))
        )


_COUNTED = ("n_failed", "n_correct", "n_latent", "run")


def _row(fact: Fact, forced: Forced, sampler: AnswerSampler, tokenizer: Any) -> dict[str, Any]:
    return {
        "sample_id": fact.sample_id,
        "is_correct": forced.is_correct,
        "n_correct": sampler.n_correct(fact, forced) if sampler.n else None,
        "answer_logprob": forced.logprob,
        "n_tokens": fact.n_tokens,
        "output": None if forced.output is None else decoded(tokenizer, forced.output),
    }
