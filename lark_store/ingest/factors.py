"""The factors of corrections in the store: a safetensors file beside the vectors, and a row in the catalog.

A file is named by the hash of its content and never changes. The row is written after it, so a fit that is killed
leaves at most a file that no row names, and the next fit begins again.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from sqlalchemy import select

from lark_store.errors import CheckpointError, InputError, StoreError
from lark_store.ingest.corrections import POWERS, SECOND_MOMENTS, Corrector, Moments, corrector_of
from lark_store.schema.catalog import Checkpoint, Correction, IngestRun, now
from lark_store.schema.corrections import content_of, discard, factor_files, file_name, is_what_was_written
from lark_store.schema.database import find
from lark_store.schema.faults import fault_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.orm import Session

    from lark_store.ingest.oporp import Placement
    from lark_store.schema.catalog import Sketcher
    from lark_store.schema.database import Database

RECIPE_KEY = "correction_sha256"  # of an ingest run's recipe
_ROWS, _COLUMNS = "rows", "columns"


def needs_factors(sketcher: Sketcher) -> bool:
    """Tell whether a sketcher's correction has factors that are fitted at each checkpoint."""
    return sketcher.correction in POWERS


def stored(db: Database, checkpoint: Checkpoint, kind: str = SECOND_MOMENTS) -> Correction | None:
    """Return the row of a checkpoint's factors, None if none were fitted."""
    with db.session() as session:
        row = _row(session, checkpoint, kind)
        _ = row and row.checkpoint
    return row


def _row(session: Session, checkpoint: Checkpoint, kind: str) -> Correction | None:
    return session.scalar(select(Correction).filter_by(checkpoint_id=checkpoint.id, kind=kind))


def is_whole(db: Database, row: Correction) -> bool:
    """Tell whether the file of a row is there, and what was written."""
    there = file_name(row.sha256) in factor_files(db.vectors)
    return there and is_what_was_written(db.vectors, row.sha256)


# --- reading -------------------------------------------------------------------------------------------------------


def corrector_for(
    db: Database, sketcher: Sketcher, checkpoint: Checkpoint, placements: list[Placement], device: torch.device
) -> tuple[Corrector, str | None]:
    """Return what corrects the gradients of a checkpoint for a sketcher, and the hash of the factors, if it has any.

    Raises
    ------
    InputError
        They were not fitted yet.
    StoreError, CheckpointError
        Their file is gone or damaged; they do not fit the checkpoint.
    """
    if not needs_factors(sketcher):
        return Corrector(norm_1=sketcher.correction == "tensor"), None
    row = stored(db, checkpoint)
    if row is None:
        raise InputError(
            f"sketcher `{sketcher.name}` needs the second moments of checkpoint `{checkpoint.name}`",
            f"`lark-store ingest` fits them, or `lark-store correction fit --checkpoint {checkpoint.name}`",
        )
    moments = _fitting(read(db, row), row, checkpoint, placements)
    return corrector_of(moments, sketcher.correction, sketcher.damping or 0.0, device), row.sha256


def read(db: Database, row: Correction) -> dict[str, Moments]:
    """Return the second moments that a row names, by parameter.

    Raises
    ------
    StoreError
        The file is gone, or is not what was written.
    """
    hint = f"fit them again with `lark-store correction fit --checkpoint {row.checkpoint.name}`, or restore a backup"
    try:
        content = content_of(db.vectors, row.sha256)
    except OSError as error:
        known = fault_of(error)
        raise known or StoreError(f"the factors `{file_name(row.sha256)}` can't be read: {error}", hint) from error
    if hashlib.sha256(content).hexdigest() != row.sha256:
        raise StoreError(f"the factors `{file_name(row.sha256)}` are not what was written", hint)
    try:
        tensors = load(content)
        names = {key.rpartition("/")[0] for key in tensors}
        return {name: Moments(tensors[f"{name}/{_ROWS}"], tensors.get(f"{name}/{_COLUMNS}")).wide() for name in names}
    except (SafetensorError, KeyError) as error:
        raise StoreError(f"the factors `{file_name(row.sha256)}` can't be understood: {error}", hint) from error


def _fitting(
    moments: dict[str, Moments], row: Correction, checkpoint: Checkpoint, placements: list[Placement]
) -> dict[str, Moments]:
    """Return the second moments of what is sketched, if all are there and belong to this checkpoint."""
    hint = "another sketcher may take fewer parameters, with `--parameters`, `--exclude` or `--min-ndim 2`"
    if row.recipe["weights_sha256"] != checkpoint.weights_sha256:
        raise CheckpointError(
            f"the factors of checkpoint `{checkpoint.name}` were fitted to other weights",
            "fit them again with `lark-store correction fit`",
        )
    for placement in placements:
        found = moments.get(placement.name)
        if found is None or not found.fits(placement.shape):
            what = "lack" if found is None else "have another shape for"
            raise CheckpointError(
                f"the factors that were fitted at checkpoint `{checkpoint.name}` {what} `{placement.name}`", hint
            )
    return {placement.name: moments[placement.name] for placement in placements}


# --- writing -------------------------------------------------------------------------------------------------------


def packed(moments: Mapping[str, Moments]) -> bytes:
    """Return second moments as the content of a file, float32, the same for the same numbers."""
    tensors = {}
    for name, each in moments.items():
        tensors[f"{name}/{_ROWS}"] = each.rows.float().contiguous()
        if each.columns is not None:
            tensors[f"{name}/{_COLUMNS}"] = each.columns.float().contiguous()
    return bytes(save(tensors))


def keep(db: Database, moments: Mapping[str, Moments], wanted: Correction, checkpoint: Checkpoint) -> Correction:
    """Write factors and their row, in the place of others that no sketch was made with.

    Raises
    ------
    InputError
        Sketches were made with others.
    StoreError
        There is a number among them that is none.
    """
    if not all(bool(torch.isfinite(each.rows).all()) for each in moments.values()):
        raise StoreError("the second moments are not finite", "are the weights of the checkpoint finite?")
    content = packed(moments)
    wanted.sha256, wanted.n_bytes = hashlib.sha256(content).hexdigest(), len(content)
    with db.session() as session:
        _replaced(session, checkpoint, wanted)
    with tempfile.TemporaryDirectory(prefix="lark-") as folder:
        draft = Path(folder) / "factors.safetensors"
        draft.write_bytes(content)
        db.vectors.files.upload_file(str(draft), file_name(wanted.sha256))
    with db.session() as session:
        find(session, Checkpoint, checkpoint.name)
        old = _replaced(session, checkpoint, wanted)
        if old is None or old.sha256 != wanted.sha256:
            if old is not None:
                session.delete(old)
                session.flush()
            wanted.checkpoint_id, wanted.created_at = checkpoint.id, now()
            session.add(wanted)
            session.flush()
    if old is not None and old.sha256 != wanted.sha256:
        discard(db, old.sha256, old.id)
    kept = stored(db, checkpoint, wanted.kind)
    assert kept is not None
    return kept


def check_unused(db: Database, checkpoint: Checkpoint, row: Correction) -> None:
    """Make sure that no sketch was made with a row's factors.

    Raises
    ------
    InputError
    """
    with db.session() as session:
        _check_unused(session, checkpoint, row)


def _replaced(session: Session, checkpoint: Checkpoint, wanted: Correction) -> Correction | None:
    """Return the row that is there, if it says the same or no run was made with it."""
    row = _row(session, checkpoint, wanted.kind)
    if row is not None and row.sha256 != wanted.sha256:
        _check_unused(session, checkpoint, row)
    return row


def _check_unused(session: Session, checkpoint: Checkpoint, row: Correction) -> None:
    runs = session.scalars(select(IngestRun).filter_by(checkpoint_id=checkpoint.id))
    used = [run.id for run in runs if run.recipe.get(RECIPE_KEY) == row.sha256 and run.status != "superseded"]
    if used:
        raise InputError(
            f"sketches at checkpoint `{checkpoint.name}` were made with the factors that are there "
            f"(ingest run {used[0]}); with others they could not be compared",
            "add the checkpoint again under another name, and fit those there",
        )


def check_same(db: Database, checkpoint: Checkpoint, sha256: str | None) -> None:
    """Make sure that the factors that a run has begun with are those of the checkpoint: now none will replace them.

    Raises
    ------
    StoreError
    """
    row = None if sha256 is None else stored(db, checkpoint)
    if sha256 is not None and (row is None or row.sha256 != sha256):
        raise StoreError(
            f"the factors of checkpoint `{checkpoint.name}` were replaced by another process", "run the command again"
        )
