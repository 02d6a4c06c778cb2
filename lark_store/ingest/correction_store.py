"""Stored factors of corrections: a safetensors file beside the vectors and a row in the catalog.

A file is named by its content hash and never changes. The row is written after the file, so an interrupted fit leaves
at most an unreferenced file, which the next fit overwrites.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sqlalchemy import select

from lark_store.core.hashing import file_hash
from lark_store.errors import CheckpointError, InputError, StoreError
from lark_store.gradients.corrections import CORRECTIONS, DEFAULT_POWER, factors_of_kind
from lark_store.schema.catalog import Checkpoint, Correction, IngestRun
from lark_store.schema.catalog_base import now
from lark_store.schema.database import find, lock_catalog
from lark_store.schema.factor_files import discard, factor_files, fetched, file_name, is_intact
from lark_store.schema.faults import machine_fault_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.orm import Session

    from lark_store.gradients.corrections import Corrector, Factors
    from lark_store.gradients.corrections.base import ParameterFactors
    from lark_store.gradients.sketch.placement import Placement
    from lark_store.schema.catalog import Sketcher
    from lark_store.schema.database import Database

RECIPE_KEY = "correction_sha256"  # in an ingest run's recipe


def kind_for(sketcher: Sketcher) -> str | None:
    """Return the kind of factors that a sketcher needs at each checkpoint, or None."""
    factors = CORRECTIONS[sketcher.correction].factors
    return None if factors is None else factors.kind


def stored(db: Database, checkpoint: Checkpoint, kind: str) -> Correction | None:
    """Return the row of a checkpoint's factors, None if not fitted."""
    with db.session() as session:
        row = _row(session, checkpoint, kind)
        _ = row and row.checkpoint
    return row


def _row(session: Session, checkpoint: Checkpoint, kind: str) -> Correction | None:
    return session.scalar(select(Correction).filter_by(checkpoint_id=checkpoint.id, kind=kind))


def is_whole(db: Database, row: Correction) -> bool:
    """Tell whether a row's file exists and is intact."""
    exists = file_name(row.sha256) in factor_files(db.vectors)
    return exists and is_intact(db.vectors, row.sha256)


# --- reading -------------------------------------------------------------------------------------------------------


def corrector_for(
    db: Database, sketcher: Sketcher, checkpoint: Checkpoint, placements: list[Placement], device: torch.device
) -> tuple[Corrector, str | None]:
    """Return a sketcher's corrector at a checkpoint, and the hash of its factors or None.

    Raises
    ------
    InputError
        The factors are not fitted yet.
    StoreError, CheckpointError
        The file is missing or damaged, or the factors do not fit the checkpoint.
    """
    correction = CORRECTIONS[sketcher.correction]
    damping, power = sketcher.damping or 0.0, sketcher.power or DEFAULT_POWER
    needed = correction.factors
    if needed is None:
        return correction.corrector({}, damping, power, device), None
    row = stored(db, checkpoint, needed.kind)
    if row is None:
        raise InputError(
            f"sketcher `{sketcher.name}` needs the {needed.noun} of checkpoint `{checkpoint.name}`",
            "`lark-store ingest` fits them, as does "
            f"`lark-store correction fit --kind {needed.kind} --checkpoint {checkpoint.name}`",
        )
    factors = _matching(_parsed(needed, read(db, row), row), row, checkpoint, placements)
    return correction.corrector(factors, damping, power, device), row.sha256


def read(db: Database, row: Correction) -> dict[str, torch.Tensor]:
    """Read a row's factors: tensors named `parameter/part`.

    Raises
    ------
    StoreError
        The file is missing or damaged.
    """
    try:
        with fetched(db.vectors, row.sha256) as copy:
            if file_hash(copy) != row.sha256:
                raise _damaged(row, "are damaged: their checksum differs")
            return load_file(copy)  # memory-mapped: unused tensors take no memory
    except OSError as error:
        fault = machine_fault_of(error)
        raise fault or _damaged(row, f"can't be read: {error}") from error
    except SafetensorError as error:
        raise _damaged(row, f"can't be parsed: {error}") from error


def _damaged(row: Correction, fact: str) -> StoreError:
    again = f"lark-store correction fit --kind {row.kind} --checkpoint {row.checkpoint.name}"
    return StoreError(
        f"the factors `{file_name(row.sha256)}` {fact}", f"fit them again with `{again}`, or restore a backup"
    )


def _parsed(factors: Factors, tensors: dict[str, torch.Tensor], row: Correction) -> Mapping[str, ParameterFactors]:
    try:
        return factors.parse(tensors)
    except KeyError as error:
        raise _damaged(row, f"can't be parsed: {error}") from error


def _matching(
    factors: Mapping[str, ParameterFactors], row: Correction, checkpoint: Checkpoint, placements: list[Placement]
) -> dict[str, ParameterFactors]:
    """Return the factors of the sketched parameters, checked against the checkpoint."""
    hint = "add a sketcher of fewer parameters, with `--parameters`, `--exclude` or `--min-ndim 2`"
    if row.recipe["weights_sha256"] != checkpoint.weights_sha256:
        raise CheckpointError(
            f"the factors of checkpoint `{checkpoint.name}` were fitted to other weights",
            "fit them again with `lark-store correction fit`",
        )
    for placement in placements:
        parameter = factors.get(placement.name)
        if parameter is None or not parameter.fits(placement.shape):
            fault = "lack" if parameter is None else "have another shape for"
            raise CheckpointError(f"the factors of checkpoint `{checkpoint.name}` {fault} `{placement.name}`", hint)
    return {placement.name: factors[placement.name] for placement in placements}


# --- writing -------------------------------------------------------------------------------------------------------


def save(db: Database, tensors: Mapping[str, torch.Tensor], new: Correction, checkpoint: Checkpoint) -> Correction:
    """Write factors in float32 and their row; replace existing factors unless sketches use them.

    Raises
    ------
    InputError
        Sketches use other factors.
    StoreError
        The factors are not finite.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise StoreError(
            f"the {factors_of_kind(new.kind).noun} are not finite", "are the weights of the checkpoint finite?"
        )
    with tempfile.TemporaryDirectory(prefix="lark-") as folder:
        draft = Path(folder) / "factors.safetensors"
        save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, draft)
        new.sha256, new.n_bytes = file_hash(draft), draft.stat().st_size
        with db.session() as session:
            _replaced(session, checkpoint, new)
        db.vectors.files.upload_file(str(draft), file_name(new.sha256))
    with db.session() as session:
        lock_catalog(session)  # no run starts with the old factors during the change, see `check_same`
        find(session, Checkpoint, checkpoint.name)
        old = _replaced(session, checkpoint, new)
        if old is None or old.sha256 != new.sha256:
            if old is not None:
                session.delete(old)
                session.flush()
            new.checkpoint_id, new.created_at = checkpoint.id, now()
            session.add(new)
            session.flush()
    if old is not None and old.sha256 != new.sha256:
        discard(db, old.sha256, old.id)
    row = stored(db, checkpoint, new.kind)
    assert row is not None
    return row


def check_unused(db: Database, checkpoint: Checkpoint, row: Correction) -> None:
    """Check that no sketches use a row's factors.

    Raises
    ------
    InputError
    """
    with db.session() as session:
        _check_unused(session, checkpoint, row)


def _replaced(session: Session, checkpoint: Checkpoint, new: Correction) -> Correction | None:
    """Return the row to replace; refuse if it differs and sketches use it."""
    row = _row(session, checkpoint, new.kind)
    if row is not None and row.sha256 != new.sha256:
        _check_unused(session, checkpoint, row)
    return row


def _check_unused(session: Session, checkpoint: Checkpoint, row: Correction) -> None:
    runs = session.scalars(select(IngestRun).filter_by(checkpoint_id=checkpoint.id))
    used = [run.id for run in runs if run.recipe.get(RECIPE_KEY) == row.sha256 and run.status != "superseded"]
    if used:
        raise InputError(
            f"sketches at checkpoint `{checkpoint.name}` use its current factors (ingest run {used[0]}); "
            "sketches with other factors could not be compared with them",
            "add the checkpoint again under another name, and fit the factors there",
        )


def check_same(db: Database, checkpoint: Checkpoint, sha256: str | None) -> None:
    """Check that a checkpoint still has the factors of a running ingest; from then on they are not replaced.

    Raises
    ------
    StoreError
    """
    if sha256 is None:
        return
    with db.session() as session:
        lock_catalog(session)  # either the replacing process sees the run, or the run sees the change
        row = session.scalar(select(Correction).filter_by(checkpoint_id=checkpoint.id, sha256=sha256))
    if row is None:
        raise StoreError(
            f"another process replaced the factors of checkpoint `{checkpoint.name}`", "run the command again"
        )
