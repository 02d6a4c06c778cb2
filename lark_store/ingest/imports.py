"""`sketcher import`: vectors that were made elsewhere become the sketches of a sketcher of their own.

It goes the way of an ingest: one unit, one run, rows to Lance in small commits and then the counts to the catalog; a
kill loses the rows in hand at most, and what is there is not written again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy import select

from lark_store.errors import InputError
from lark_store.ingest import ledger
from lark_store.ingest.foreign import open_foreign
from lark_store.ingest.ranks import Ranks
from lark_store.ingest.run import Unit, drop_existing, make_report
from lark_store.ingest.sketchers import imported_fingerprint, make_imported, sketch_bytes
from lark_store.ingest.writer import SketchWriter
from lark_store.schema.catalog import Checkpoint, FormatVariant, IngestRun, Sketcher, Source
from lark_store.schema.database import Database, add_named, find, known_as, still_there
from lark_store.schema.names import check_name
from lark_store.schema.records import IngestReport, OnProgress, Progress
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from pathlib import Path

    from lark_store.ingest.foreign import Block, Foreign

_SAME = ("k", "map_version", "correction", "positions")
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Wanted:
    """What an import is to make, by name; `dtype` None leaves it to the sketcher, or to the file."""

    sketcher: str
    checkpoint: str
    source: str
    variant: str
    dtype: str | None


def import_sketches(
    db: Database, wanted: Wanted, path: Path, kind: str, ids: Path | None, on_progress: OnProgress | None = None
) -> IngestReport:
    """Import a file of vectors; see `Store.sketcher_import`."""
    check_name(wanted.sketcher)
    with db.session() as session:
        unit = Unit(
            find(session, Checkpoint, wanted.checkpoint),
            find(session, Source, wanted.source),
            find(session, FormatVariant, wanted.variant),
        )
    foreign = open_foreign(path, kind, ids)
    _check_ids(db, unit.source.name, foreign.ids)
    sketcher = _sketcher(db, wanted, foreign)
    unit.n_samples, unit.pending = len(foreign.ids), set(foreign.ids)
    made = _Import(db, foreign, unit, sketcher, on_progress)
    return make_report(db, [made.run()], made.notes)


def _check_ids(db: Database, source: str, ids: list[str]) -> None:
    """Refuse ids that are no samples of the source, or are there twice."""
    known = set(db.vectors.read("samples", ["sample_id"], where(source=source))["sample_id"])
    unknown = [name for name in ids if name not in known]
    if unknown:
        shown = ", ".join(f"`{name}`" for name in unknown[:3]) + (", …" if len(unknown) > 3 else "")
        raise InputError(
            f"{len(unknown)} of {len(ids)} ids are no samples of source `{source}`: {shown}",
            "add them with `lark-store source add`, or name their source with `--source`",
        )
    seen: set[str] = set()
    twice = next((name for name in ids if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]
    if twice is not None:
        raise InputError(
            f"sample `{twice}` is there twice", "a sample has one sketch per checkpoint and variant; import them apart"
        )


def _sketcher(db: Database, wanted: Wanted, foreign: Foreign) -> Sketcher:
    """Make the sketcher, or return the one of this name if it was imported with as many dimensions."""
    if wanted.dtype not in (None, "float16", "float32"):
        raise InputError(f"sketches can't be stored as `{wanted.dtype}`", "`float16` or `float32`")
    dtype = wanted.dtype or ("float32" if foreign.number == "float64" else "float16")
    row = make_imported(wanted.sketcher, foreign.dimensions, dtype)
    same = (*_SAME, "dtype") if wanted.dtype else _SAME
    with db.session() as session:
        return known_as(session, row, same) or add_named(session, row, ())


class _Import:
    """One file's way into one unit."""

    def __init__(
        self, db: Database, foreign: Foreign, unit: Unit, sketcher: Sketcher, on_progress: OnProgress | None
    ) -> None:
        self.db, self.foreign, self.unit, self.sketcher = db, foreign, unit, sketcher
        self.on_progress = on_progress
        self.fingerprint = imported_fingerprint(sketcher)
        self.notes: list[str] = []
        self.ids: ledger.Ids = {
            "fingerprint": self.fingerprint,
            "sketcher_id": sketcher.id,
            "checkpoint_id": unit.checkpoint.id,
            "source_id": unit.source.id,
            "variant_id": unit.variant.id,
        }

    def run(self) -> dict[str, Any]:
        """Write what is missing; returns the row of the report."""
        unit = self.unit
        with ledger.held(self.db, self.fingerprint, unit.names):
            still_there(self.db, unit.checkpoint, unit.source, unit.variant)  # it may have been removed before the lock
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
                ledger.settle(self.db, self.ids)
                return row
            run = ledger.begin(self.db, self.ids, self._how(), existing)
            writer = SketchWriter(self.db, run, self.fingerprint, self.sketcher, unit.names, Ranks())
            with writer.running():
                self._write(writer)
        counts = {"n_sketched": writer.n_sketched, "n_failed": writer.n_failed}
        return row | counts | {"run": run.id, "seconds": writer.seconds}

    def _note(self, existing: int) -> None:
        """Say so if what is there came from another file."""
        with self.db.session() as session:
            runs = session.scalars(select(IngestRun).filter_by(**self.ids).where(IngestRun.n_sketched > 0))
            others = {run.recipe["imported"] for run in runs if run.recipe["sha256"] != self.foreign.sha256}
        if others:
            names = ", ".join(f"`{name}`" for name in sorted(others))
            self.notes.append(f"{existing} samples had sketches already, imported from {names}; they are kept")

    def _how(self) -> dict[str, Any]:
        recipe = {
            "imported": self.foreign.path.name,
            "kind": self.foreign.kind,
            "sha256": self.foreign.sha256,
            "ids_sha256": hashlib.sha256("\n".join(self.foreign.ids).encode()).hexdigest(),
            "dimensions": self.foreign.dimensions,
            "number": self.foreign.number,
            "dtype": self.sketcher.dtype,
        }
        return {"recipe": recipe, "versions": ledger.versions(), "device": "made elsewhere"}

    def _write(self, writer: SketchWriter) -> None:
        ids, pending = self.foreign.ids, self.unit.pending
        wanted = np.fromiter((name in pending for name in ids), bool, len(ids))
        for block in self.foreign.read(wanted):
            _take(block, ids, wanted, writer)
            if self.on_progress:
                done = block.start + len(block.vectors)
                self.on_progress(Progress(self.unit.label, done, len(ids), writer.n_failed))


def _take(block: Block, ids: list[str], wanted: np.ndarray[Any, Any], writer: SketchWriter) -> None:
    """Write a block's wanted rows: each vector scaled to norm √D, beside the norm that it had."""
    exact_BD = block.vectors.astype(np.float64)
    k = exact_BD.shape[1]
    peak_B = np.abs(exact_BD).max(axis=1)  # NaN or infinite if one of the numbers is
    usable_B = np.isfinite(peak_B) & (peak_B > 0)
    exact_BD[usable_B] /= peak_B[usable_B, None]  # squares of very large and very small numbers are not numbers
    norm_B = np.linalg.norm(exact_BD, axis=1)
    for i in np.flatnonzero(wanted[block.start : block.start + len(exact_BD)]):
        sample_id = ids[block.start + i]
        reason = block.faults.get(int(i))
        if reason is None and not usable_B[i]:
            reason = "its vector is zero" if peak_B[i] == 0 else "its vector holds NaN or infinite numbers"
        facts = {"loss": float("nan"), "n_tokens": 0, "n_loss_tokens": 0}
        facts |= {"grad_norm": float(peak_B[i] * norm_B[i])} | block.facts[i]
        if reason is None and not _SMALLEST <= facts["grad_norm"] <= _LARGEST:
            reason = f"its norm is {facts['grad_norm']:g}, which float32 can't hold"
        if reason is None:
            writer.put(sample_id, exact_BD[i] * (k**0.5 / norm_B[i]), facts)
        else:
            writer.fail(sample_id, reason)
