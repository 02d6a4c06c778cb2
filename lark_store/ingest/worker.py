"""The work on one checkpoint's units with one loaded model: render, sketch, commit."""

from __future__ import annotations

import gc
from itertools import islice
from typing import TYPE_CHECKING, Any

from lark_store.core.device import device_name
from lark_store.core.versions import versions
from lark_store.gradients.sketch.layout import sketch_bytes
from lark_store.ingest import correction_store, ingest_runs
from lark_store.ingest.pipeline import open_pipeline
from lark_store.ingest.stored_answers import stored_answers
from lark_store.ingest.units import drop_existing, fill, read_samples
from lark_store.ingest.writer import SketchWriter
from lark_store.modeling.batching import WINDOW, batches, budget, windows
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.rendering import Renderer
from lark_store.modeling.tokens import Tokens
from lark_store.results import Progress
from lark_store.schema.database import check_unchanged
from lark_store.specs import PREDICTED_ANSWER

if TYPE_CHECKING:
    from lark_store.ingest.pipeline import IngestContext, Pipeline
    from lark_store.ingest.units import Plan, Unit
    from lark_store.modeling.predicted_answers import Predict
    from lark_store.schema.catalog import IngestRun

_PREDICTED_WINDOW = 32  # fewer samples than usual: their answers are predicted before the first sketch
DONE = ("n_sketched", "n_failed", "n_truncated", "n_cut")  # counts of a finished unit


class CheckpointWorker:
    """Ingests one checkpoint's units. The model is loaded at the first unit with missing samples."""

    def __init__(self, context: IngestContext, plan: Plan) -> None:
        self.context, self.plan = context, plan
        self.db, self.ranks = context.db, context.ranks
        self.notes: list[str] = []
        self.pipeline: Pipeline | None = None

    def run(self) -> list[dict[str, Any]]:
        """Ingest all units; return one report row per unit."""
        try:
            return [self._unit(unit) for unit in self.plan.units]
        finally:
            self._close()

    def _close(self) -> None:
        """Free the model before the next one is loaded; hooks and parameters form reference cycles."""
        if self.pipeline is not None:
            self.pipeline.path.close()
            self.pipeline = None
            gc.collect()

    def _unit(self, unit: Unit) -> dict[str, Any]:
        fill(self.db, self.plan.fingerprint, unit, self.context.spec.limit)
        unit.pending = self.ranks.once(lambda: unit.pending)
        row = self._row(unit)
        if unit.pending:
            row |= UnitRun(self.context, self.plan, self._opened(), unit).run()
        else:
            self.ranks.once(lambda: self._settle(unit))
        unit.pending = set()
        return row

    def _opened(self) -> Pipeline:
        if self.pipeline is None:
            self.pipeline, notes = open_pipeline(self.context, self.plan)
            self.notes += notes
        return self.pipeline

    def _row(self, unit: Unit) -> dict[str, Any]:
        counts = {"n_samples": unit.n_samples, "n_existing": unit.n_samples - len(unit.pending)}
        size = {"bytes": len(unit.pending) * sketch_bytes(self.context.sketcher)}
        return unit.names | counts | dict.fromkeys(DONE, 0) | {"run": None, "seconds": 0.0} | size

    def _settle(self, unit: Unit) -> None:
        """Commit an interrupted run without missing samples."""
        ids = ids_of(self.context, self.plan, unit)
        if ingest_runs.has_unfinished(self.db, ids):
            with ingest_runs.locked(self.db, self.plan.fingerprint, unit.names):
                check_unchanged(self.db, unit.checkpoint, unit.source, unit.variant)
                ingest_runs.settle(self.db, ids)


def ids_of(context: IngestContext, plan: Plan, unit: Unit) -> ingest_runs.Ids:
    """Return a unit's identity in `ingest_run`."""
    return {
        "fingerprint": plan.fingerprint,
        "sketcher_id": context.sketcher.id,
        "checkpoint_id": unit.checkpoint.id,
        "source_id": unit.source.id,
        "variant_id": unit.variant.id,
    }


class UnitRun:
    """The run of one unit: begin or resume it, sketch the missing samples, commit."""

    def __init__(self, context: IngestContext, plan: Plan, pipeline: Pipeline, unit: Unit) -> None:
        self.context, self.plan, self.pipeline, self.unit = context, plan, pipeline, unit
        self.db, self.ranks = context.db, context.ranks
        self.renderer = Renderer(unit.variant, pipeline.tokenizer, plan.context)
        self.predicts = unit.variant.targets == PREDICTED_ANSWER
        self.answers = stored_answers(self.db, unit.names) if self.predicts else {}  # by another sketcher

    def run(self) -> dict[str, Any]:
        """Sketch and commit the missing samples; return the unit's counts."""
        unit = self.unit
        with ingest_runs.locked(self.db, self.plan.fingerprint, unit.names, self.ranks):
            run = self.ranks.once(self._begin)
            unit.pending = self.ranks.once(lambda: unit.pending)
            writer = SketchWriter(self.db, run, self.plan.fingerprint, self.context.sketcher, unit.names, self.ranks)
            with writer.running():
                self._sketch_all(writer)
        return self.ranks.once(
            lambda: {name: getattr(writer, name) for name in DONE} | {"run": run.id, "seconds": writer.seconds}
        )

    def _begin(self) -> IngestRun:
        unit = self.unit
        check_unchanged(self.db, unit.checkpoint, unit.source, unit.variant)  # may have been removed before the lock
        drop_existing(self.db, self.plan.fingerprint, unit)  # another process may have ingested some
        ids, n_existing = ids_of(self.context, self.plan, unit), unit.n_samples - len(unit.pending)
        run = ingest_runs.begin(self.db, ids, self._provenance(), n_existing)
        correction_store.check_same(self.db, unit.checkpoint, self.pipeline.factors_sha256)
        return run

    def _provenance(self) -> dict[str, Any]:
        """Return the run's recipe, versions and device; only equal runs of a unit resume each other."""
        sketcher, plan, renderer = self.context.sketcher, self.plan, self.renderer
        recipe: dict[str, Any] = {
            "weights_sha256": plan.checkpoint.weights_sha256,
            "tokenizer_sha256": plan.checkpoint.tokenizer_sha256,
            "template_sha256": renderer.sha256,
            "targets": renderer.variant.targets,
            "max_length": renderer.max_length,
            "loss": f"{renderer.variant.loss or 'mean'} cross-entropy over the targets",
            "k": sketcher.k,
            "seed": sketcher.seed,
            "map_version": sketcher.map_version,
            "dtype": sketcher.dtype,
            "parameters": len(plan.placements),
            "coordinates": sum(p.numel for p in plan.placements),
            "precision": self.pipeline.dtype,
            "path": type(self.pipeline.path).__name__,
            "limit": self.context.spec.limit,
        }
        if self.pipeline.factors_sha256 is not None:
            recipe[correction_store.RECIPE_KEY] = self.pipeline.factors_sha256
        if self.context.spec.compute.attention != "auto":
            recipe["attention"] = self.context.spec.compute.attention
        if self.unit.candidates is not None:
            recipe["candidates"] = self.unit.candidates.how
        return {"recipe": recipe, "versions": versions(), "device": device_name(self.context.device)}

    def _sketch_all(self, writer: SketchWriter) -> None:
        """Sketch this rank's share in windows; all ranks commit each window together."""
        unit, n_ranks, on_progress = self.unit, self.ranks.size, self.context.on_progress
        total, n_done = len(unit.pending), 0
        size = _PREDICTED_WINDOW if self.predicts else WINDOW
        share = windows(islice(read_samples(self.db, unit), self.ranks.rank, None, n_ranks), size)
        for _ in range(-(-total // (size * n_ranks))):
            ready: list[tuple[str, Tokens]] = []
            window = next(share, [])
            for sample in window:
                tokens = self.renderer.attempt(sample, self._predict(sample.sample_id))
                if isinstance(tokens, Tokens):
                    ready.append((sample.sample_id, tokens))
                else:
                    writer.fail(sample.sample_id, str(tokens))
            n_done += (len(window) - len(ready)) * n_ranks
            for batch in batches(ready, lambda pair: len(pair[1].input_ids), self._budget):
                self._sketch(batch, writer)
                n_done += len(batch) * n_ranks
                if on_progress:
                    on_progress(Progress(unit.label, min(n_done, total), total, writer.n_failed))
            if n_ranks > 1:
                writer.commit()

    def _predict(self, sample_id: str) -> Predict:
        """Return the function that answers a sample's prompt: all sketchers share one answer."""
        stored = self.answers.get(sample_id)
        return self.pipeline.predict if stored is None else lambda _: stored

    def _budget(self) -> int:
        return budget(self.context.spec.compute.batch_tokens, self.context.device.type, self.pipeline.path.largest)

    def _sketch(self, batch: list[tuple[str, Tokens]], writer: SketchWriter) -> None:
        sketches = self.pipeline.path.sketch([tokens for _, tokens in batch])
        for (sample_id, tokens), sketch in zip(batch, sketches, strict=True):
            if isinstance(sketch, UnusableSampleError):
                writer.fail(sample_id, str(sketch))
            else:
                writer.add(sample_id, tokens, sketch)
