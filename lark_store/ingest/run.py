"""The ingest: for each checkpoint, source and variant, sketch the samples that are missing and commit them.

A unit of work is one checkpoint × source × variant; it has one row in `ingest_run`. Rows go to Lance in small commits
first, then the run's counts to the catalog, so a kill loses at most the rows in hand. An unfinished run is continued
by the next ingest of the same recipe; what is in the table already is never sketched twice.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from filelock import FileLock, Timeout
from sqlalchemy import select

from lark_store.errors import InputError, StoreBusyError
from lark_store.ingest.checkpoints import load_model, load_tokenizer, meta_model, verify
from lark_store.ingest.gradients import HookPath, choose_parameters, pick_device
from lark_store.ingest.oporp import GradientSketcher, Oporp, place
from lark_store.ingest.sources import Sample
from lark_store.ingest.variants import Renderer, Tokens, UnusableSampleError
from lark_store.ingest.writer import UNIT_KEYS, SketchWriter
from lark_store.schema.catalog import Checkpoint, FormatVariant, IngestRun, Sketcher, Source, now
from lark_store.schema.database import Database, find
from lark_store.schema.records import IngestReport, OnProgress, Progress
from lark_store.schema.vectors import FAILURES, sketch_table, where

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lark_store.ingest.gradients import SketchPath
    from lark_store.ingest.oporp import Placement

_PROBES = 3


@dataclass(frozen=True)
class Request:
    """What an ingest was asked for, by name."""

    checkpoints: list[str]
    sources: list[str]
    variants: list[str]
    sketcher: str
    limit: int | None = None
    dry_run: bool = False
    device: str = "auto"
    precision: str = "auto"


@dataclass
class Unit:
    """One checkpoint × source × variant: what it should hold and what is missing."""

    checkpoint: Checkpoint
    source: Source
    variant: FormatVariant
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
    units: list[Unit]


def fingerprint(sketcher: Sketcher, placements: list[Placement]) -> str:
    """Return what tells comparable sketches: the map, what is sketched, and the parameters' layout."""
    identity = {
        "k": sketcher.k,
        "seed": sketcher.seed,
        "map_version": sketcher.map_version,
        "dtype": sketcher.dtype,
        "correction": sketcher.correction,
        "positions": sketcher.positions,
        "layout": [(p.name, p.shape, p.first_chunk) for p in placements],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def ingest(db: Database, request: Request, on_progress: OnProgress | None = None) -> IngestReport:
    """Sketch what is missing; see `Store.ingest`."""
    if request.limit is not None and request.limit < 1:
        raise InputError(f"a limit of {request.limit} leaves nothing to do", "leave `--limit` out to take all")
    with db.session() as session:
        sketcher = find(session, Sketcher, request.sketcher)
        checkpoints = [find(session, Checkpoint, name) for name in request.checkpoints]
        sources = [find(session, Source, name) for name in request.sources]
        variants = [find(session, FormatVariant, name) for name in request.variants]
    device = pick_device(request.device)
    report: list[dict[str, Any]] = []
    for checkpoint in checkpoints:
        units = [Unit(checkpoint, s, v) for s in sources for v in variants]
        plan = _plan(db, sketcher, checkpoint, units, request.limit)
        report += _Worker(db, plan, sketcher, request, device, on_progress).run()
    return _report(db, report, dry_run=request.dry_run)


def _plan(db: Database, sketcher: Sketcher, checkpoint: Checkpoint, units: list[Unit], limit: int | None) -> Plan:
    files = verify(checkpoint)
    chosen = choose_parameters(meta_model(files.folder), sketcher.parameters, sketcher.exclude)
    placements = place([(name, tuple(p.shape)) for name, p in chosen], sketcher.k)
    plan = Plan(checkpoint, files.folder, placements, fingerprint(sketcher, placements), units)
    table = sketch_table(plan.fingerprint)
    has_table = db.vectors.has(table)
    for unit in units:
        ids = db.vectors.read("samples", ["sample_id"], where(source=unit.source.name))["sample_id"]
        wanted = ids if limit is None else ids.head(limit)
        unit.n_samples = len(wanted)
        unit.pending = set(wanted)
        if has_table:
            unit.pending -= set(db.vectors.read(table, ["sample_id"], where(**unit.names))["sample_id"])
    return plan


class _Worker:
    """Does one checkpoint's units with one loaded model."""

    def __init__(
        self,
        db: Database,
        plan: Plan,
        sketcher: Sketcher,
        request: Request,
        device: torch.device,
        on_progress: OnProgress | None,
    ) -> None:
        self.db, self.plan, self.sketcher, self.request, self.device = db, plan, sketcher, request, device
        self.on_progress = on_progress
        self.tokenizer: Any = None
        self.path: SketchPath | None = None
        self.dtype = ""

    def run(self) -> list[dict[str, Any]]:
        """Do, or for a dry run only estimate, each unit; returns one row of the report each."""
        rows = []
        for unit in self.plan.units:
            row = self._row(unit)
            if unit.pending:
                self._load()
                row |= self._estimate(unit) if self.request.dry_run else self._do(unit)
            rows.append(row)
        return rows

    def _row(self, unit: Unit) -> dict[str, Any]:
        width = 2 if self.sketcher.dtype == "float16" else 4
        counts = {"n_samples": unit.n_samples, "n_existing": unit.n_samples - len(unit.pending)}
        size = {"bytes": len(unit.pending) * self.sketcher.k * width}
        return unit.names | counts | {"n_sketched": 0, "n_failed": 0, "run": None, "seconds": 0.0} | size

    def _load(self) -> None:
        if self.path is not None:
            return
        if self.on_progress:
            self.on_progress(Progress(f"{self.plan.checkpoint.name}: loading the model", 0, 0))
        self.tokenizer = load_tokenizer(self.plan.folder)
        model = load_model(self.plan.folder, self.device, self.request.precision)
        self.dtype = str(model.dtype).removeprefix("torch.")
        chosen = choose_parameters(model, self.sketcher.parameters, self.sketcher.exclude)
        oporp = Oporp(self.sketcher.k, self.sketcher.seed)
        self.path = HookPath(model, chosen, GradientSketcher(oporp, self.plan.placements, self.device))

    def _samples(self, unit: Unit) -> Iterator[Sample]:
        columns = ["sample_id", "prompt", "response", "text"]
        for batch in self.db.vectors.scan("samples", columns, where(source=unit.source.name), batch_rows=256):
            for row in batch.to_pylist():
                if row["sample_id"] in unit.pending:
                    yield Sample(**row)

    def _estimate(self, unit: Unit) -> dict[str, Any]:
        """Time a few of the unit's samples, after one to warm up, and scale up."""
        assert self.path is not None
        renderer, times = Renderer(unit.variant, self.tokenizer), []
        for sample in self._samples(unit):
            try:
                tokens = renderer.render(sample)
            except UnusableSampleError:
                continue
            started = time.perf_counter()
            self.path.sketch([tokens])
            times.append(time.perf_counter() - started)
            if len(times) > _PROBES:
                break
        timed = times[1:] or times
        return {"seconds": len(unit.pending) * sum(timed) / len(timed)} if timed else {}

    def _do(self, unit: Unit) -> dict[str, Any]:
        renderer = Renderer(unit.variant, self.tokenizer)
        started = time.perf_counter()
        with _held(self.db, self.plan, unit):
            run = self._begin(unit, renderer)
            writer = SketchWriter(self.db, run, self.plan.fingerprint, self.sketcher, unit.names)
            try:
                self._sketch_all(unit, renderer, writer)
            except KeyboardInterrupt:
                writer.finish("interrupted", time.perf_counter() - started)
                raise
            except Exception as error:
                writer.finish("failed", time.perf_counter() - started, f"{type(error).__name__}: {error}")
                raise
            seconds = time.perf_counter() - started
            writer.finish("done", seconds)
        return {
            "n_sketched": writer.n_sketched,
            "n_failed": writer.n_failed,
            "run": run.id,
            "seconds": seconds,
        }

    def _begin(self, unit: Unit, renderer: Renderer) -> IngestRun:
        """Continue the unit's unfinished run if it has the same recipe, else start one."""
        recipe = {
            "weights_sha256": self.plan.checkpoint.weights_sha256,
            "tokenizer_sha256": self.plan.checkpoint.tokenizer_sha256,
            "template_sha256": renderer.sha256,
            "targets": unit.variant.targets,
            "max_length": unit.variant.max_length,
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
        ids = {
            "sketcher_id": self.sketcher.id,
            "checkpoint_id": unit.checkpoint.id,
            "source_id": unit.source.id,
            "variant_id": unit.variant.id,
            "fingerprint": self.plan.fingerprint,
        }
        how = {"recipe": recipe, "versions": versions(), "device": device_name(self.device)}
        with self.db.session() as session:
            unfinished = select(IngestRun).filter_by(**ids).where(IngestRun.status != "done")
            for run in session.scalars(unfinished):
                if {key: getattr(run, key) for key in how} == how:
                    run.status, run.error, run.finished_at = "running", None, None
                    return run
                run.status, run.error = (
                    "done",
                    f"{run.status}; its rows are kept, the rest was made by a later run",
                )
                run.finished_at = run.finished_at or now()
            run = IngestRun(**ids, **how, status="running", n_existing=unit.n_samples - len(unit.pending))
            session.add(run)
            session.flush()
        return run

    def _sketch_all(self, unit: Unit, renderer: Renderer, writer: SketchWriter) -> None:
        assert self.path is not None
        total = len(unit.pending)
        for done, sample in enumerate(self._samples(unit), start=1):
            tokens = _render(renderer, sample)
            made = self.path.sketch([tokens])[0] if isinstance(tokens, Tokens) else tokens
            if isinstance(made, UnusableSampleError) or isinstance(tokens, UnusableSampleError):
                writer.fail(sample.sample_id, str(made))
            else:
                writer.add(sample.sample_id, tokens, made)
            if self.on_progress:
                self.on_progress(Progress(unit.label, done, total, writer.n_failed))


def _render(renderer: Renderer, sample: Sample) -> Tokens | UnusableSampleError:
    try:
        return renderer.render(sample)
    except UnusableSampleError as error:
        return error


@contextmanager
def _held(db: Database, plan: Plan, unit: Unit) -> Iterator[None]:
    """Hold the unit: two processes never sketch the same rows."""
    db.location.locks.mkdir(exist_ok=True)
    key = hashlib.sha256(f"{plan.fingerprint} {unit.label}".encode()).hexdigest()[:16]
    lock = FileLock(db.location.locks / f"ingest-{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StoreBusyError(
            f"another process is ingesting {unit.label}", "wait for it, or ingest something else meanwhile"
        ) from error
    try:
        yield
    finally:
        lock.release()


def versions() -> dict[str, Any]:
    """Return the versions that a result depends on."""
    names = ("lark-store", "torch", "transformers", "tokenizers", "lancedb")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def device_name(device: torch.device) -> str:
    """Return a device's name as people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _report(db: Database, rows: list[dict[str, Any]], *, dry_run: bool) -> IngestReport:
    units = pl.DataFrame(rows, schema_overrides={"run": pl.Int64, "seconds": pl.Float64}, infer_schema_length=None)
    runs = [r["run"] for r in rows if r["run"] is not None and r["n_failed"]]
    failures = db.vectors.read("failures", FAILURES.names, where(ingest_run=runs))
    return IngestReport(units, failures.select(*UNIT_KEYS, "sample_id", "reason"), dry_run)
