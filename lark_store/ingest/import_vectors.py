"""`sketcher import`: external vectors become the sketches of an imported sketcher.

An import works like an ingest of one unit: it commits rows to Lance in small batches, then counts to the catalog. An
interruption loses at most the uncommitted rows, and stored rows are not written again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy import select

from lark_store.core.names import check_name
from lark_store.core.versions import versions
from lark_store.errors import InputError
from lark_store.gradients.sketch.layout import imported_fingerprint, make_imported, sketch_bytes
from lark_store.ingest import ingest_runs
from lark_store.ingest.distributed import Ranks
from lark_store.ingest.run import make_report
from lark_store.ingest.units import Unit, drop_existing
from lark_store.ingest.vector_formats import open_vectors
from lark_store.ingest.writer import SketchWriter
from lark_store.results import IngestReport, OnProgress, Progress
from lark_store.schema.catalog import Checkpoint, FormatVariant, IngestRun, Sketcher, Source
from lark_store.schema.database import Database, add_named, check_unchanged, find, find_same
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from lark_store.ingest.vector_formats import Block, VectorFile
    from lark_store.specs import ImportSpec

_IDENTITY = ("k", "map_version", "correction", "positions")
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


def import_sketches(db: Database, spec: ImportSpec, path: Path, on_progress: OnProgress | None = None) -> IngestReport:
    """Import a file of vectors; see `Store.sketcher_import`."""
    check_name(spec.sketcher)
    with db.session() as session:
        unit = Unit(
            find(session, Checkpoint, spec.checkpoint),
            find(session, Source, spec.source),
            find(session, FormatVariant, spec.variant),
        )
    file = open_vectors(path, spec.kind, None if spec.ids is None else Path(spec.ids))
    _check_ids(db, unit.source.name, file.ids)
    sketcher = _sketcher(db, spec, file)
    unit.n_samples, unit.pending = len(file.ids), set(file.ids)
    job = _Import(db, file, unit, sketcher, on_progress)
    return make_report(db, [job.run()], job.notes)


def _check_ids(db: Database, source: str, ids: list[str]) -> None:
    """Refuse unknown and duplicate ids."""
    sample_ids = set(db.vectors.read("samples", ["sample_id"], where(source=source))["sample_id"])
    unknown = [name for name in ids if name not in sample_ids]
    if unknown:
        examples = ", ".join(f"`{name}`" for name in unknown[:3]) + (", …" if len(unknown) > 3 else "")
        raise InputError(
            f"{len(unknown)} of {len(ids)} ids are not samples of source `{source}`: {examples}",
            "add them with `lark-store source add`, or name their source with `--source`",
        )
    seen: set[str] = set()
    twice = next((name for name in ids if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]
    if twice is not None:
        raise InputError(f"sample `{twice}` appears twice", "give each sample one vector per checkpoint and variant")


def _sketcher(db: Database, spec: ImportSpec, file: VectorFile) -> Sketcher:
    """Add the sketcher, or return the existing one if it was imported with the same dimensions."""
    if spec.dtype not in (None, "float16", "float32"):
        raise InputError(f"sketches can't be stored as `{spec.dtype}`", "use `float16` or `float32`")
    dtype = spec.dtype or ("float32" if file.number == "float64" else "float16")
    row = make_imported(spec.sketcher, file.dimensions, dtype)
    columns = (*_IDENTITY, "dtype") if spec.dtype else _IDENTITY
    with db.session() as session:
        return find_same(session, row, columns) or add_named(session, row, ())


class _Import:
    """The import of one file into one unit."""

    def __init__(
        self, db: Database, file: VectorFile, unit: Unit, sketcher: Sketcher, on_progress: OnProgress | None
    ) -> None:
        self.db, self.file, self.unit, self.sketcher = db, file, unit, sketcher
        self.on_progress = on_progress
        self.fingerprint = imported_fingerprint(sketcher)
        self.notes: list[str] = []
        self.ids: ingest_runs.Ids = {
            "fingerprint": self.fingerprint,
            "sketcher_id": sketcher.id,
            "checkpoint_id": unit.checkpoint.id,
            "source_id": unit.source.id,
            "variant_id": unit.variant.id,
        }

    def run(self) -> dict[str, Any]:
        """Write the missing sketches; return the report's row."""
        unit = self.unit
        with ingest_runs.locked(self.db, self.fingerprint, unit.names):
            check_unchanged(self.db, unit.checkpoint, unit.source, unit.variant)  # removed before the lock?
            drop_existing(self.db, self.fingerprint, unit)
            existing = unit.n_samples - len(unit.pending)
            if existing:
                self._note(existing)
            row: dict[str, Any] = unit.names | {
                "n_samples": unit.n_samples,
                "n_existing": existing,
                "n_sketched": 0,
                "n_failed": 0,
            }
            row |= {"run": None, "seconds": 0.0, "bytes": len(unit.pending) * sketch_bytes(self.sketcher)}
            if not unit.pending:
                ingest_runs.settle(self.db, self.ids)
                return row
            run = ingest_runs.begin(self.db, self.ids, self._provenance(), existing)
            writer = SketchWriter(self.db, run, self.fingerprint, self.sketcher, unit.names, Ranks())
            with writer.running():
                self._write(writer)
        counts = {"n_sketched": writer.n_sketched, "n_failed": writer.n_failed}
        return row | counts | {"run": run.id, "seconds": writer.seconds}

    def _note(self, existing: int) -> None:
        """Note if existing sketches came from another file."""
        with self.db.session() as session:
            rows = session.scalars(select(IngestRun).filter_by(**self.ids).where(IngestRun.n_sketched > 0))
            other_files = {run.recipe["imported"] for run in rows if run.recipe["sha256"] != self.file.sha256}
        if other_files:
            names = ", ".join(f"`{name}`" for name in sorted(other_files))
            self.notes.append(f"kept the sketches of {existing} samples, already imported from {names}")

    def _provenance(self) -> dict[str, Any]:
        recipe = {
            "imported": self.file.path.name,
            "kind": self.file.kind,
            "sha256": self.file.sha256,
            "ids_sha256": hashlib.sha256("\n".join(self.file.ids).encode()).hexdigest(),
            "dimensions": self.file.dimensions,
            "number": self.file.number,
            "dtype": self.sketcher.dtype,
        }
        return {"recipe": recipe, "versions": versions(), "device": "made elsewhere"}

    def _write(self, writer: SketchWriter) -> None:
        ids, pending = self.file.ids, self.unit.pending
        mask = np.fromiter((name in pending for name in ids), bool, len(ids))
        for block in self.file.read(mask):
            _write_block(block, ids, mask, writer)
            if self.on_progress:
                n_done = block.start + len(block.vectors)
                self.on_progress(Progress(self.unit.label, n_done, len(ids), writer.n_failed))


def _write_block(block: Block, ids: list[str], mask: np.ndarray[Any, Any], writer: SketchWriter) -> None:
    """Write a block's selected rows: vectors scaled to norm √D, with their original norms."""
    exact_BD = block.vectors.astype(np.float64)
    k = exact_BD.shape[1]
    peak_B = np.abs(exact_BD).max(axis=1)  # NaN or infinite if any number is
    usable_B = np.isfinite(peak_B) & (peak_B > 0)
    exact_BD[usable_B] /= peak_B[usable_B, None]  # avoids overflow and underflow of squares
    norm_B = np.linalg.norm(exact_BD, axis=1)
    for i in np.flatnonzero(mask[block.start : block.start + len(exact_BD)]):
        sample_id = ids[block.start + i]
        reason = block.faults.get(int(i))
        if reason is None and not usable_B[i]:
            reason = "its vector is zero" if peak_B[i] == 0 else "its vector holds NaN or infinite numbers"
        facts = {"loss": float("nan"), "n_tokens": 0, "n_loss_tokens": 0}
        facts |= {"grad_norm": float(peak_B[i] * norm_B[i])} | block.facts[i]
        if reason is None and not _SMALLEST <= facts["grad_norm"] <= _LARGEST:
            reason = f"its norm {facts['grad_norm']:g} is outside the range of float32"
        if reason is None:
            writer.put(sample_id, exact_BD[i] * (k**0.5 / norm_B[i]), facts)
        else:
            writer.fail(sample_id, reason)
