"""The ingest: for each checkpoint, source and variant, sketch the samples that are missing and commit them.

A unit of work is one checkpoint × source × variant; it has one row in `ingest_run`. Rows go to Lance in small commits
first, then the run's counts to the catalog, so a kill loses at most the rows in hand. An unfinished run is continued
by the next ingest of the same recipe; what is in the table already is never sketched twice.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import polars as pl
from sqlalchemy import select

from lark_store.errors import CheckpointError, InputError
from lark_store.ingest import factors, ledger, moments
from lark_store.ingest.batched import hook_path, make_path
from lark_store.ingest.batches import WINDOW, batches, budget, windows
from lark_store.ingest.checkpoints import verify
from lark_store.ingest.gradients import pick_device, recompute_activations
from lark_store.ingest.models import context_length, load_model, load_tokenizer, meta_model
from lark_store.ingest.oporp import GradientSketcher
from lark_store.ingest.ranks import Ranks, joined
from lark_store.ingest.sketchers import (
    check_ours,
    chosen_of,
    fingerprint,
    is_masked,
    oporp_of,
    placements_of,
    sketch_bytes,
)
from lark_store.ingest.sources import Sample
from lark_store.ingest.variants import Renderer, Tokens, UnusableSampleError
from lark_store.ingest.writer import UNIT_KEYS, SketchWriter
from lark_store.schema.catalog import Checkpoint, FormatVariant, Sketcher, Source
from lark_store.schema.database import Database, find, still_there
from lark_store.schema.records import IngestReport, OnProgress, Progress
from lark_store.schema.vectors import FAILURES, sketch_table, where

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from lark_store.ingest.corrections import Corrector
    from lark_store.ingest.gradients import SketchPath
    from lark_store.ingest.oporp import Placement
    from lark_store.schema.catalog import IngestRun
    from lark_store.schema.records import Chosen, CorrectionInfo

_COUNTS = ("n_samples", "n_existing", "n_sketched", "n_failed", "run")
_UNITS = (
    dict.fromkeys(UNIT_KEYS, pl.String) | dict.fromkeys(_COUNTS, pl.Int64) | {"seconds": pl.Float64, "bytes": pl.Int64}
)


@dataclass(frozen=True)
class Request:
    """What an ingest was asked for, by name."""

    checkpoints: list[str]
    sources: list[str]
    variants: list[str]
    sketcher: str
    limit: int | None = None
    device: str = "auto"
    precision: str = "auto"
    batch_tokens: int | None = None
    gradient_checkpointing: bool = False
    choose: Callable[[], dict[str, Chosen]] | None = None  # what is taken of some sources, by name; of others all


@dataclass
class Unit:
    """One checkpoint × source × variant: what it should hold and what is missing."""

    checkpoint: Checkpoint
    source: Source
    variant: FormatVariant
    chosen: Chosen | None = None
    n_samples: int = 0
    pending: set[str] = field(default_factory=set)

    @property
    def names(self) -> dict[str, str]:
        """The names that key the unit's rows."""
        return {"checkpoint": self.checkpoint.name, "source": self.source.name, "variant": self.variant.name}

    @property
    def label(self) -> str:
        """The unit in one line."""
        return " · ".join(self.names.values())


@dataclass(frozen=True)
class Plan:
    """One checkpoint's work: its files, the parameters' layout and the sketcher's fingerprint for it."""

    checkpoint: Checkpoint
    folder: Path
    placements: list[Placement]
    fingerprint: str
    context: int | None
    units: list[Unit]


def ingest(db: Database, request: Request, on_progress: OnProgress | None = None) -> IngestReport:
    """Sketch what is missing; see `Store.ingest`."""
    with joined() as ranks:
        ranks.once(lambda: _check(db, request))  # a wrong name is said once
        chosen = ranks.once(request.choose) if request.choose else {}
        sketcher, plans = prepare(db, request, chosen)
        device = pick_device(request.device)
        report: list[dict[str, Any]] = []
        notes: list[str] = []
        for plan in plans:
            worker = _Worker(db, plan(), sketcher, request, device, ranks, on_progress if ranks.is_first else None)
            report += worker.run()
            notes += worker.notes
    return make_report(db, report, notes)


def prepare(
    db: Database, request: Request, chosen: dict[str, Chosen] | None = None
) -> tuple[Sketcher, list[Callable[[], Plan]]]:
    """Find what a request names; returns the sketcher and, for each checkpoint, what makes its plan."""
    chosen = chosen or {}
    if request.limit is not None and request.limit < 1:
        raise InputError(f"a limit of {request.limit} leaves nothing to do", "leave `--limit` out to take all")
    if request.batch_tokens is not None and request.batch_tokens < 1:
        raise InputError(f"a batch of {request.batch_tokens} tokens holds no sample", "try `--batch-tokens 1024`")
    with db.session() as session:
        sketcher = check_ours(find(session, Sketcher, request.sketcher))
        checkpoints = [find(session, Checkpoint, name) for name in request.checkpoints]
        sources = [find(session, Source, name) for name in request.sources]
        variants = [find(session, FormatVariant, name) for name in request.variants]

    def plan(checkpoint: Checkpoint) -> Plan:
        return _plan(
            sketcher, checkpoint, [Unit(checkpoint, s, v, chosen.get(s.name)) for s in sources for v in variants]
        )

    return sketcher, [partial(plan, checkpoint) for checkpoint in checkpoints]


def _check(db: Database, request: Request) -> None:
    prepare(db, request)


def _plan(sketcher: Sketcher, checkpoint: Checkpoint, units: list[Unit]) -> Plan:
    files = verify(checkpoint)
    model = meta_model(files.folder)
    placements = placements_of(sketcher, model)
    made = fingerprint(sketcher, placements)
    return Plan(checkpoint, files.folder, placements, made, context_length(model), units)


def fill(db: Database, fingerprint: str, unit: Unit, limit: int | None) -> None:
    """Find which of a unit's samples have no sketch yet."""
    ids = db.vectors.read("samples", ["sample_id"], where(source=unit.source.name))["sample_id"]
    wanted = ids if limit is None else ids.head(limit)
    if unit.chosen is not None:
        wanted = ids.filter(ids.is_in(list(unit.chosen.ids)))
    unit.n_samples = len(wanted)
    unit.pending = set(wanted)
    drop_existing(db, fingerprint, unit)


def drop_existing(db: Database, fingerprint: str, unit: Unit) -> None:
    """Take from a unit's pending samples those that have a sketch."""
    table = sketch_table(fingerprint)
    if db.vectors.has(table):
        unit.pending -= set(db.vectors.read(table, ["sample_id"], where(**unit.names))["sample_id"])


class _Worker:
    """Does one checkpoint's units with one loaded model."""

    def __init__(
        self,
        db: Database,
        plan: Plan,
        sketcher: Sketcher,
        request: Request,
        device: torch.device,
        ranks: Ranks,
        on_progress: OnProgress | None,
    ) -> None:
        self.db, self.plan, self.sketcher, self.request, self.device = db, plan, sketcher, request, device
        self.ranks, self.on_progress = ranks, on_progress
        self.notes: list[str] = []
        self.tokenizer: Any = None
        self.path: SketchPath | None = None
        self.dtype = ""
        self.factors_sha256: str | None = None

    def run(self) -> list[dict[str, Any]]:
        """Do each unit; returns one row of the report each."""
        try:
            return [self._unit(unit) for unit in self.plan.units]
        finally:
            self._unload()

    def _unit(self, unit: Unit) -> dict[str, Any]:
        fill(self.db, self.plan.fingerprint, unit, self.request.limit)
        unit.pending = self.ranks.once(lambda: unit.pending)
        row = self._row(unit) | self._result(unit)
        unit.pending = set()
        return row

    def _result(self, unit: Unit) -> dict[str, Any]:
        if unit.pending:
            self._load()
            return self._do(unit)
        self.ranks.once(lambda: self._settle(unit))
        return {}

    def _settle(self, unit: Unit) -> None:
        if ledger.has_unfinished(self.db, self._ids(unit)):
            with ledger.held(self.db, self.plan.fingerprint, unit.names):
                still_there(self.db, unit.checkpoint, unit.source, unit.variant)
                ledger.settle(self.db, self._ids(unit))

    def _row(self, unit: Unit) -> dict[str, Any]:
        counts = {"n_samples": unit.n_samples, "n_existing": unit.n_samples - len(unit.pending)}
        size = {"bytes": len(unit.pending) * sketch_bytes(self.sketcher)}
        return unit.names | counts | {"n_sketched": 0, "n_failed": 0, "run": None, "seconds": 0.0} | size

    def _load(self) -> None:
        if self.path is not None:
            return
        if self.on_progress:
            self.on_progress(Progress(f"{self.plan.checkpoint.name}: loading the model", 0, 0))
        self.tokenizer = load_tokenizer(self.plan.folder)
        model = load_model(self.plan.folder, self.device, self.request.precision)
        kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
        self.dtype = kinds.pop() if len(kinds) == 1 else "auto"  # adapters in float32 on a base in half precision
        chosen = chosen_of(self.sketcher, model)
        planned = [(p.name, p.shape) for p in self.plan.placements]
        if [(name, tuple(p.shape)) for name, p in chosen] != planned:
            raise CheckpointError(
                f"the weights of checkpoint `{self.plan.checkpoint.name}` do not fit its config: other parameters",
                "are its embeddings tied as config.json says? save it again with `save_pretrained`",
            )
        if self.request.gradient_checkpointing:
            recompute_activations(model)
        sketcher = GradientSketcher(oporp_of(self.sketcher), self.plan.placements, self.device, self._corrector(model))
        masked = is_masked(self.sketcher)
        self.path, mine = make_path(model, chosen, sketcher, masked=masked)
        reasons = [why for why in self.ranks.gather(mine) if why]
        reason = self.ranks.once(lambda: next(iter(reasons), None))
        if reason and not mine:
            self.path.close()
            self.path = hook_path(model, chosen, sketcher, masked=masked)
        if reason:
            self.notes.append(f"checkpoint `{self.plan.checkpoint.name}` is sketched one sample at a time: {reason}")

    def _corrector(self, model: Any) -> Corrector:
        """Return what corrects this checkpoint's gradients, fitted now where it is missing."""
        checkpoint, unit = self.plan.checkpoint, self.plan.units[0]
        if factors.needs_factors(self.sketcher):
            made = self.ranks.once(lambda: self._fit(model, unit))
            if made:
                self.notes.append(
                    f"the second moments of checkpoint `{checkpoint.name}` were missing, and were fitted to "
                    f"{made.n_samples} samples of {made.sources}, as `{unit.variant.name}`"
                )
        made_of = (self.db, self.sketcher, checkpoint, self.plan.placements, self.device)
        corrector, self.factors_sha256 = factors.corrector_for(*made_of)
        return corrector

    def _fit(self, model: Any, unit: Unit) -> CorrectionInfo | None:
        wanted = moments.Wanted(unit.checkpoint.name, variant=unit.variant.name, precision=self.request.precision)
        with self.db.session() as session:
            if session.scalar(select(Source.id).filter_by(stage="finetune")) is None:
                wanted = replace(wanted, sources=tuple(self.request.sources))
        return moments.fit_missing(self.db, wanted, model, self.tokenizer, self.device, self.on_progress)

    def _unload(self) -> None:
        """Free the model before the next is loaded: its hooks and parameters refer to each other."""
        if self.path is not None:
            self.path.close()
            self.path = None
            gc.collect()

    def _samples(self, unit: Unit) -> Iterator[Sample]:
        """Return this rank's share of a unit's missing samples, in the source's order."""
        return islice(read_samples(self.db, unit), self.ranks.rank, None, self.ranks.size)

    def _do(self, unit: Unit) -> dict[str, Any]:
        renderer = Renderer(unit.variant, self.tokenizer, self.plan.context)
        with ledger.held(self.db, self.plan.fingerprint, unit.names, self.ranks):
            run = self.ranks.once(lambda: self._begin(unit, renderer))
            unit.pending = self.ranks.once(lambda: unit.pending)
            writer = SketchWriter(self.db, run, self.plan.fingerprint, self.sketcher, unit.names, self.ranks)
            with writer.running():
                self._sketch_all(unit, renderer, writer)
        return self.ranks.once(
            lambda: {
                "n_sketched": writer.n_sketched,
                "n_failed": writer.n_failed,
                "run": run.id,
                "seconds": writer.seconds,
            }
        )

    def _begin(self, unit: Unit, renderer: Renderer) -> IngestRun:
        still_there(self.db, unit.checkpoint, unit.source, unit.variant)  # it may have been removed before the lock
        drop_existing(self.db, self.plan.fingerprint, unit)  # another process may have been here
        run = ledger.begin(self.db, self._ids(unit), self._how(unit, renderer), unit.n_samples - len(unit.pending))
        factors.check_same(self.db, unit.checkpoint, self.factors_sha256)
        return run

    def _ids(self, unit: Unit) -> ledger.Ids:
        return {
            "fingerprint": self.plan.fingerprint,
            "sketcher_id": self.sketcher.id,
            "checkpoint_id": unit.checkpoint.id,
            "source_id": unit.source.id,
            "variant_id": unit.variant.id,
        }

    def _how(self, unit: Unit, renderer: Renderer) -> dict[str, Any]:
        """Say how sketches are made: runs that agree on this, and on the unit, can go on from one another."""
        recipe: dict[str, Any] = {
            "weights_sha256": self.plan.checkpoint.weights_sha256,
            "tokenizer_sha256": self.plan.checkpoint.tokenizer_sha256,
            "template_sha256": renderer.sha256,
            "targets": renderer.variant.targets,
            "max_length": renderer.max_length,
            "loss": "mean cross-entropy over the targets",
            "k": self.sketcher.k,
            "seed": self.sketcher.seed,
            "map_version": self.sketcher.map_version,
            "dtype": self.sketcher.dtype,
            "parameters": len(self.plan.placements),
            "coordinates": sum(p.numel for p in self.plan.placements),
            "precision": self.dtype,
            "path": type(self.path).__name__,
            "limit": self.request.limit,
        }
        if self.factors_sha256 is not None:
            recipe[factors.RECIPE_KEY] = self.factors_sha256
        if unit.chosen is not None:
            recipe["candidates"] = unit.chosen.how
        return {"recipe": recipe, "versions": ledger.versions(), "device": ledger.device_name(self.device)}

    def _sketch_all(self, unit: Unit, renderer: Renderer, writer: SketchWriter) -> None:
        """Sketch this rank's share, window by window; the ranks commit each window together."""
        total, done = len(unit.pending), 0
        share = windows(self._samples(unit))
        for _ in range(-(-total // (WINDOW * self.ranks.size))):
            ready: list[tuple[str, Tokens]] = []
            window = next(share, [])
            for sample in window:
                tokens = renderer.attempt(sample)
                if isinstance(tokens, Tokens):
                    ready.append((sample.sample_id, tokens))
                else:
                    writer.fail(sample.sample_id, str(tokens))
            done += (len(window) - len(ready)) * self.ranks.size
            for batch in batches(ready, lambda one: len(one[1].input_ids), self._budget):
                self._sketch(batch, writer)
                done += len(batch) * self.ranks.size
                if self.on_progress:
                    self.on_progress(Progress(unit.label, min(done, total), total, writer.n_failed))
            if self.ranks.size > 1:
                writer.commit()

    def _budget(self) -> int:
        assert self.path is not None
        return budget(self.request.batch_tokens, self.device.type, self.path.largest)

    def _sketch(self, batch: list[tuple[str, Tokens]], writer: SketchWriter) -> None:
        assert self.path is not None
        made = self.path.sketch([tokens for _, tokens in batch])
        for (sample_id, tokens), sketch in zip(batch, made, strict=True):
            if isinstance(sketch, UnusableSampleError):
                writer.fail(sample_id, str(sketch))
            else:
                writer.add(sample_id, tokens, sketch)


def read_samples(db: Database, unit: Unit) -> Iterator[Sample]:
    """Yield a unit's missing samples in the source's order."""
    columns = ["sample_id", "prompt", "response", "text"]
    for batch in db.vectors.scan("samples", columns, where(source=unit.source.name), batch_rows=256):
        for row in batch.to_pylist():
            if row["sample_id"] in unit.pending:
                yield Sample(**row)


def make_report(db: Database, rows: list[dict[str, Any]], notes: list[str]) -> IngestReport:
    """Make the report of some units' rows, with the reasons of the samples that failed."""
    units = pl.DataFrame(rows, schema=_UNITS)
    runs = [r["run"] for r in rows if r["run"] is not None and r["n_failed"]]
    failures = db.vectors.read("failures", FAILURES.names, where(ingest_run=runs))
    return IngestReport(units, failures.select(*UNIT_KEYS, "sample_id", "reason"), notes)
