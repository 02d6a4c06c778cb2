"""Estimate an ingest's sketches, bytes, time and memory before it runs.

The files are hashed, but no weights are loaded. The model is built from its config, with one shared tensor for all
weights of a shape, and runs a few batches with the lengths of real samples.
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

from lark_store.core.device import pick_device
from lark_store.gradients.corrections import CORRECTIONS, factors_of_kind
from lark_store.gradients.paths.batched import make_path
from lark_store.gradients.paths.hooks import recompute_activations
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.layout import is_masked, oporp_of, placements_of, sketch_bytes, sketched_parameters
from lark_store.ingest.correction_store import kind_for, stored
from lark_store.ingest.units import checked, fill, prepare, read_samples
from lark_store.modeling.batching import batches, budget
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.loading import load_tokenizer, meta_model, resolve_dtype, unweighted_model
from lark_store.modeling.predicted_answers import AnswerPredictor, AnswerPrompt
from lark_store.modeling.rendering import Renderer
from lark_store.modeling.tokens import Tokens
from lark_store.results import PlanReport, Progress
from lark_store.specs import FitSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.gradients.paths.hooks import SketchPath
    from lark_store.ingest.units import Plan, Unit
    from lark_store.results import Chosen, OnProgress
    from lark_store.schema.catalog import Checkpoint, Sketcher
    from lark_store.schema.database import Database
    from lark_store.specs import Compute, IngestSpec

    _Tried = tuple[str, Tokens | UnusableSampleError]  # a sample's id and its rendering

_RENDERED = 128  # samples rendered per unit
_LONG_ENOUGH = 20.0  # seconds of probing, then no further batch
_POLL = 0.005
_UNITS = {
    "checkpoint": pl.String,
    "source": pl.String,
    "variant": pl.String,
    "n_samples": pl.Int64,
    "n_existing": pl.Int64,
    "tokens_per_sample": pl.Float64,
    "n_truncated": pl.Int64,
    "n_cut": pl.Int64,
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


def plan(
    db: Database,
    spec: IngestSpec,
    choose: Callable[[IngestSpec], dict[str, Chosen]] | None = None,
    on_progress: OnProgress | None = None,
) -> PlanReport:
    """Estimate an ingest; see `Store.plan`."""
    ingest = checked(db, spec)  # wrong names fail before any work
    spec = ingest.spec
    sketcher, plans = prepare(db, ingest, choose(spec) if choose else {})
    device = pick_device(spec.compute.device)
    units: list[dict[str, Any]] = []
    checkpoints: list[dict[str, Any]] = []
    notes: list[str] = []
    for make in plans:
        work = make()
        if on_progress:
            on_progress(Progress(f"{work.checkpoint.name}: timing a few batches", 0, 0))
        rendered, prompts = _render(db, work, spec.limit)
        usable = [[tokens for _, tokens in attempts if isinstance(tokens, Tokens)] for attempts in rendered]
        probe = _Probe(work, sketcher, spec.compute, device)
        probed = probe.run([tokens for unit_tokens in usable for tokens in unit_tokens], prompts)
        checkpoints.append({"checkpoint": work.checkpoint.name, "bytes_per_sample": sketch_bytes(sketcher)} | probed)
        for unit, unit_tokens, attempts in zip(work.units, usable, rendered, strict=True):
            units.append(_unit_row(unit, unit_tokens, len(attempts), sketcher, probe))
            notes += _unusable(unit, attempts) + _departures(unit, unit_tokens)
        notes += _missing_factors(db, sketcher, work.checkpoint)
    return PlanReport(pl.DataFrame(units, schema=_UNITS), pl.DataFrame(checkpoints, schema=_CHECKPOINTS), notes)


def _missing_factors(db: Database, sketcher: Sketcher, checkpoint: Checkpoint) -> list[str]:
    """Return a note if the ingest will fit factors first."""
    kind = kind_for(sketcher)
    if kind is None or stored(db, checkpoint, kind) is not None:
        return []
    extra = f"fitting them to up to {FitSpec.samples} samples takes additional time"
    return [f"checkpoint `{checkpoint.name}` has no {factors_of_kind(kind).noun}: {extra}"]


def _unusable(unit: Unit, attempts: list[_Tried]) -> list[str]:
    """Return a note on rendered samples that will fail, with the first one's reason."""
    failed = [(name, reason) for name, reason in attempts if isinstance(reason, UnusableSampleError)]
    if not failed:
        return []
    name, reason = failed[0]
    failures = f"{len(failed)} of {len(attempts)} samples rendered from `{unit.label}` will fail"
    return [f"{failures}; `{name}`: {reason}"]


def _departures(unit: Unit, tokens: list[Tokens]) -> list[str]:
    """Return a note on rendered samples whose template departs from them, with the first one's note."""
    notes = [t.notes[0] for t in tokens if t.notes]
    return [f"{len(notes)} of {len(tokens)} samples rendered from `{unit.label}`: {notes[0]}"] if notes else []


def _unit_row(unit: Unit, tokens: list[Tokens], n_tried: int, sketcher: Sketcher, probe: _Probe) -> dict[str, Any]:
    """Return a unit's row; `tokens` are the usable ones of `n_tried` rendered samples."""
    todo = len(unit.pending)
    cut = [t.n_cut for t in tokens if t.n_cut]
    scale = todo / max(1, n_tried)
    padded = sum(_padded(batch) for batch in probe.batches(tokens)) / max(1, len(tokens))
    return unit.names | {
        "n_samples": unit.n_samples,
        "n_existing": unit.n_samples - todo,
        "tokens_per_sample": sum(len(t.input_ids) for t in tokens) / max(1, len(tokens)),
        "n_truncated": round(len(cut) * scale),
        "n_cut": round(sum(cut) * scale),
        "seconds": todo * (padded * probe.seconds_per_token + probe.seconds_per_answer.get(unit.label, 0.0)),
        "bytes": todo * sketch_bytes(sketcher),
    }


def _padded(batch: list[Tokens]) -> int:
    return len(batch) * len(batch[0].input_ids)


def _render(db: Database, work: Plan, limit: int | None) -> tuple[list[list[_Tried]], dict[str, AnswerPrompt]]:
    """Render some samples of each unit, evenly spread over the missing ones.

    Return also a prompt of each unit whose answers are predicted.
    """
    tokenizer, rendered, prompts = load_tokenizer(work.folder), [], {}
    for unit in work.units:
        fill(db, work.fingerprint, unit, limit)
        renderer = Renderer(unit.variant, tokenizer, work.context)
        step = max(1, len(unit.pending) // _RENDERED)
        drawn = islice(read_samples(db, unit), 0, None, step)
        seen: list[AnswerPrompt] = []

        def answer(prompt: AnswerPrompt, seen: list[AnswerPrompt] = seen) -> list[int]:
            seen.append(prompt)
            return prompt.stand_in()

        rendered.append([(sample.sample_id, renderer.attempt(sample, answer)) for sample in drawn])
        if seen:
            prompts[unit.label] = sorted(seen, key=lambda prompt: len(prompt.input_ids))[len(seen) // 2]
    return rendered, prompts


class _Probe:
    """Times a few batches on a model built from a checkpoint's config."""

    def __init__(self, work: Plan, sketcher: Sketcher, compute: Compute, device: torch.device) -> None:
        self.work, self.sketcher, self.compute, self.device = work, sketcher, compute, device
        self.seconds_per_token = 0.0
        self.seconds_per_answer: dict[str, float] = {}
        self._path: SketchPath | None = None

    def batches(self, tokens: list[Tokens]) -> list[list[Tokens]]:
        """Cut samples into batches like an ingest."""
        largest = None if self._path is None else self._path.largest
        max_tokens = budget(self.compute.batch_tokens, self.device.type, largest)
        return list(batches(tokens, lambda sample: len(sample.input_ids), lambda: max_tokens))

    def run(self, tokens: list[Tokens], prompts: dict[str, AnswerPrompt]) -> dict[str, Any]:
        """Return a row of the report's `checkpoints`, with time and memory of a few batches, evenly spread.

        `prompts` have one prompt per unit with predicted answers.
        """
        full = meta_model(self.work.folder)
        placements = placements_of(self.sketcher, full)
        dtype = resolve_dtype(full, self.compute.precision, self.device)
        weights = sum(p.numel() for p in full.parameters()) * dtype.itemsize
        row = {"tensors": len(placements), "coordinates": sum(p.numel for p in placements)}
        if not tokens:
            return row
        before = memory_in_use(self.device)
        model = unweighted_model(self.work.folder, dtype, self.device, self.compute.attention)
        if self.compute.gradient_checkpointing:
            recompute_activations(model)
        parameters = sketched_parameters(self.sketcher, model)
        with PeakMemory(self.device) as peak:
            corrector = CORRECTIONS[self.sketcher.correction].stand_in(placements, model, self.device)
            sketcher = GradientSketcher(oporp_of(self.sketcher), placements, self.device, corrector)
            self._path, _ = make_path(model, parameters, sketcher, masked=is_masked(self.sketcher))
            ordered = self.batches(tokens)
            self.seconds_per_token = self._time([ordered[i] for i in sorted({0, len(ordered) // 2, len(ordered) - 1})])
            if prompts:
                self._time_answers(AnswerPredictor(model, load_tokenizer(self.work.folder)), prompts)
        kind = type(self._path).__name__
        self._path.close()
        gc.collect()
        padded = sum(_padded(batch) for batch in ordered) / len(tokens)
        return row | {
            "path": kind,
            "seconds_per_sample": padded * self.seconds_per_token,
            "peak_bytes": before + weights + peak.highest - peak.start,
        }

    def _time_answers(self, predict: AnswerPredictor, prompts: dict[str, AnswerPrompt]) -> None:
        """Set the seconds per answer of each unit: random weights decode up to the maximum length."""
        for label, prompt in prompts.items():
            started = time.perf_counter()
            predict(prompt)
            self.seconds_per_answer[label] = time.perf_counter() - started

    def _time(self, samples: list[list[Tokens]]) -> float:
        """Return the seconds per token of batches, stopping early if they are slow."""
        assert self._path is not None
        seconds, n_tokens = 0.0, 0
        if self.device.type == "cuda":
            self._path.sketch(samples[0])  # compiles
        for batch in samples:
            started = time.perf_counter()
            self._path.sketch(batch)
            seconds += time.perf_counter() - started
            n_tokens += _padded(batch)
            if seconds > _LONG_ENOUGH:
                break
        return seconds / n_tokens


def memory_in_use(device: torch.device) -> int:
    """Return this process's memory on a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """Context manager for this process's memory on a device: `start` and `highest`, in bytes."""

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
