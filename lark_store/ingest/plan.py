"""What an ingest will take, before it runs: what is sketched, bytes, time and memory.

No weights are loaded (the files are hashed, as always). A model of its config is built with weights that share their
memory (one tensor for all of one shape), and a few batches with the lengths of the samples at hand are run through it.
"""

from __future__ import annotations

import gc
import threading
import time
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

import polars as pl
import psutil
import torch

from lark_store.ingest.batched import make_path
from lark_store.ingest.batches import batches, budget
from lark_store.ingest.corrections import stand_in
from lark_store.ingest.gradients import pick_device, recompute_activations
from lark_store.ingest.models import load_tokenizer, meta_model, resolve_dtype, unweighted_model
from lark_store.ingest.oporp import GradientSketcher
from lark_store.ingest.run import fill, prepare, read_samples
from lark_store.ingest.sketchers import chosen_of, is_masked, oporp_of, placements_of, sketch_bytes
from lark_store.ingest.variants import Renderer, Tokens
from lark_store.schema.records import PlanReport, Progress

if TYPE_CHECKING:
    from lark_store.ingest.gradients import SketchPath
    from lark_store.ingest.run import Plan, Request, Unit
    from lark_store.schema.catalog import Sketcher
    from lark_store.schema.database import Database
    from lark_store.schema.records import OnProgress

_RENDERED = 128  # samples of a unit whose lengths stand for all
_LONG_ENOUGH = 20.0  # seconds of probing after which no further batch is run
_POLL = 0.005
_UNITS = {
    "checkpoint": pl.String,
    "source": pl.String,
    "variant": pl.String,
    "n_samples": pl.Int64,
    "n_existing": pl.Int64,
    "tokens_per_sample": pl.Float64,
    "seconds": pl.Float64,
    "bytes": pl.Int64,
}
_CHECKPOINTS = {
    "checkpoint": pl.String,
    "path": pl.String,
    "tensors": pl.Int64,
    "coordinates": pl.Int64,
    "bytes_per_sample": pl.Int64,
    "seconds_per_sample": pl.Float64,
    "peak_bytes": pl.Int64,
}


def plan(db: Database, request: Request, on_progress: OnProgress | None = None) -> PlanReport:
    """Say what an ingest will take; see `Store.plan`."""
    prepare(db, request)  # a wrong name is said before anything is computed
    sketcher, plans = prepare(db, request, request.choose() if request.choose else {})
    device = pick_device(request.device)
    units: list[dict[str, Any]] = []
    checkpoints: list[dict[str, Any]] = []
    for make in plans:
        work = make()
        if on_progress:
            on_progress(Progress(f"{work.checkpoint.name}: trying a few batches", 0, 0))
        lengths = _lengths(db, work, request.limit)
        probe = _Probe(work, sketcher, request, device)
        probed = probe.run([one for some in lengths for one in some])
        checkpoints.append({"checkpoint": work.checkpoint.name, "bytes_per_sample": sketch_bytes(sketcher)} | probed)
        for unit, tokens in zip(work.units, lengths, strict=True):
            units.append(_unit_row(unit, tokens, sketcher, probe))
    return PlanReport(pl.DataFrame(units, schema=_UNITS), pl.DataFrame(checkpoints, schema=_CHECKPOINTS))


def _unit_row(unit: Unit, tokens: list[Tokens], sketcher: Sketcher, probe: _Probe) -> dict[str, Any]:
    todo = len(unit.pending)
    padded = sum(_padded(batch) for batch in probe.batches(tokens)) / max(1, len(tokens))
    return unit.names | {
        "n_samples": unit.n_samples,
        "n_existing": unit.n_samples - todo,
        "tokens_per_sample": sum(len(t.input_ids) for t in tokens) / max(1, len(tokens)),
        "seconds": todo * padded * probe.seconds_per_token,
        "bytes": todo * sketch_bytes(sketcher),
    }


def _padded(batch: list[Tokens]) -> int:
    return len(batch) * len(batch[0].input_ids)


def _lengths(db: Database, work: Plan, limit: int | None) -> list[list[Tokens]]:
    """Render some samples of each unit, spread over those that are missing."""
    tokenizer, made = load_tokenizer(work.folder), []
    for unit in work.units:
        fill(db, work.fingerprint, unit, limit)
        renderer = Renderer(unit.variant, tokenizer, work.context)
        step = max(1, len(unit.pending) // _RENDERED)
        rendered = [renderer.attempt(sample) for sample in islice(read_samples(db, unit), 0, None, step)]
        made.append([tokens for tokens in rendered if isinstance(tokens, Tokens)])
    return made


class _Probe:
    """Runs a few batches through a model of a checkpoint's config."""

    def __init__(self, work: Plan, sketcher: Sketcher, request: Request, device: torch.device) -> None:
        self.work, self.sketcher, self.request, self.device = work, sketcher, request, device
        self.seconds_per_token = 0.0
        self._path: SketchPath | None = None

    def batches(self, tokens: list[Tokens]) -> list[list[Tokens]]:
        """Cut samples into batches as an ingest does."""
        largest = None if self._path is None else self._path.largest
        wanted = budget(self.request.batch_tokens, self.device.type, largest)
        return list(batches(tokens, lambda one: len(one.input_ids), lambda: wanted))

    def run(self, tokens: list[Tokens]) -> dict[str, Any]:
        """Return a row of the report's `checkpoints`; time and memory are those of a few batches, evenly spread."""
        full = meta_model(self.work.folder)
        placements = placements_of(self.sketcher, full)
        dtype = resolve_dtype(full, self.request.precision, self.device)
        weights = sum(p.numel() for p in full.parameters()) * dtype.itemsize
        row = {"tensors": len(placements), "coordinates": sum(p.numel for p in placements)}
        if not tokens:
            return row
        before = memory_in_use(self.device)
        model = unweighted_model(self.work.folder, dtype, self.device)
        if self.request.gradient_checkpointing:
            recompute_activations(model)
        chosen = chosen_of(self.sketcher, model)
        corrector = stand_in(self.sketcher.correction, placements, self.device)
        sketcher = GradientSketcher(oporp_of(self.sketcher), placements, self.device, corrector)
        with PeakMemory(self.device) as peak:
            self._path, _ = make_path(model, chosen, sketcher, masked=is_masked(self.sketcher))
            ordered = self.batches(tokens)
            self.seconds_per_token = self._time([ordered[i] for i in sorted({0, len(ordered) // 2, len(ordered) - 1})])
        kind = type(self._path).__name__
        self._path.close()
        gc.collect()
        padded = sum(_padded(batch) for batch in ordered) / len(tokens)
        return row | {
            "path": kind,
            "seconds_per_sample": padded * self.seconds_per_token,
            "peak_bytes": before + weights + peak.highest - peak.start,
        }

    def _time(self, some: list[list[Tokens]]) -> float:
        """Return the seconds per token of some batches, or of the first of them if that takes long."""
        assert self._path is not None
        seconds, n_tokens = 0.0, 0
        if self.device.type == "cuda":
            self._path.sketch(some[0])  # compiles
        for batch in some:
            started = time.perf_counter()
            self._path.sketch(batch)
            seconds += time.perf_counter() - started
            n_tokens += _padded(batch)
            if seconds > _LONG_ENOUGH:
                break
        return seconds / n_tokens


def memory_in_use(device: torch.device) -> int:
    """Return the bytes that this process has on a device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """Measures a device's memory while it is open: `start` and `highest`, in bytes, of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.highest = 0
        self._done = threading.Event()

    def __enter__(self) -> Self:
        self.start = self.highest = memory_in_use(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(_POLL):
            self.highest = max(self.highest, memory_in_use(self.device))

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.highest = torch.cuda.max_memory_allocated(self.device)
        else:
            self._done.set()
            self._watcher.join()
