"""The factors of corrections in the store: a safetensors file beside the vectors, and a row in the catalog.

A file is named by the hash of its content and never changes. The row is written after it, so a fit that is killed
leaves at most a file that no row names, and the next fit writes it again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sqlalchemy import select

from lark_store.errors import CheckpointError, InputError, StoreError
from lark_store.ingest.corrections import FACTORS, IN_WORDS, SECOND_MOMENTS, Corrector, Moments, corrector_of
from lark_store.ingest.curvature import DEFAULT_POWER, Kronecker, curvature_corrector
from lark_store.ingest.fisher import kronecker_of
from lark_store.ingest.moments import moments_in
from lark_store.schema.catalog import Checkpoint, Correction, IngestRun, now
from lark_store.schema.corrections import discard, factor_files, fetched, file_name, is_what_was_written
from lark_store.schema.database import find
from lark_store.schema.faults import fault_of
from lark_store.schema.hashes import file_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy.orm import Session

    from lark_store.ingest.oporp import Placement
    from lark_store.schema.catalog import Sketcher
    from lark_store.schema.database import Database

T = TypeVar("T")
F = TypeVar("F", Moments, Kronecker)
RECIPE_KEY = "correction_sha256"  # of an ingest run's recipe


def kind_for(sketcher: Sketcher) -> str | None:
    """Return the kind of the factors that a sketcher's correction needs at each checkpoint, None if it needs none."""
    return FACTORS.get(sketcher.correction)


def stored(db: Database, checkpoint: Checkpoint, kind: str) -> Correction | None:
    """Return the row of a checkpoint's factors of a kind, None if none were fitted."""
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
    kind = kind_for(sketcher)
    if kind is None:
        return Corrector(norm_1=sketcher.correction == "tensor"), None
    row = stored(db, checkpoint, kind)
    if row is None:
        raise InputError(
            f"sketcher `{sketcher.name}` needs the {IN_WORDS[kind]} of checkpoint `{checkpoint.name}`",
            "`lark-store ingest` fits them, or "
            f"`lark-store correction fit --kind {kind} --checkpoint {checkpoint.name}`",
        )
    damping, tensors = sketcher.damping or 0.0, read(db, row)
    if kind == SECOND_MOMENTS:
        moments = _fitting(_understood(moments_in, tensors, row), row, checkpoint, placements)
        return corrector_of(moments, sketcher.correction, damping, device), row.sha256
    curvature = _fitting(_understood(_curvature_in, tensors, row), row, checkpoint, placements)
    return curvature_corrector(curvature, damping, sketcher.power or DEFAULT_POWER, device), row.sha256


def _curvature_in(tensors: dict[str, torch.Tensor]) -> dict[str, Kronecker]:
    return {name: kronecker_of(tensors, name) for name in {key.rpartition("/")[0] for key in tensors}}


def read(db: Database, row: Correction) -> dict[str, torch.Tensor]:
    """Return the factors that a row names: tensors, called by a parameter and a part of its factors.

    Raises
    ------
    StoreError
        The file is gone, or is not what was written.
    """
    try:
        with fetched(db.vectors, row.sha256) as copy:
            if file_hash(copy) != row.sha256:
                raise _damaged(row, "are not what was written")
            return load_file(copy)  # mapped: what is never looked at takes no memory
    except OSError as error:
        known = fault_of(error)
        raise known or _damaged(row, f"can't be read: {error}") from error
    except SafetensorError as error:
        raise _damaged(row, f"can't be understood: {error}") from error


def _damaged(row: Correction, fact: str) -> StoreError:
    again = f"lark-store correction fit --kind {row.kind} --checkpoint {row.checkpoint.name}"
    return StoreError(
        f"the factors `{file_name(row.sha256)}` {fact}", f"fit them again with `{again}`, or restore a backup"
    )


def _understood(parse: Callable[[dict[str, torch.Tensor]], T], tensors: dict[str, torch.Tensor], row: Correction) -> T:
    try:
        return parse(tensors)
    except KeyError as error:
        raise _damaged(row, f"can't be understood: {error}") from error


def _fitting(found: dict[str, F], row: Correction, checkpoint: Checkpoint, placements: list[Placement]) -> dict[str, F]:
    """Return the factors of what is sketched, if all are there and belong to this checkpoint."""
    hint = "another sketcher may take fewer parameters, with `--parameters`, `--exclude` or `--min-ndim 2`"
    if row.recipe["weights_sha256"] != checkpoint.weights_sha256:
        raise CheckpointError(
            f"the factors of checkpoint `{checkpoint.name}` were fitted to other weights",
            "fit them again with `lark-store correction fit`",
        )
    for placement in placements:
        each = found.get(placement.name)
        if each is None or not each.fits(placement.shape):
            what = "lack" if each is None else "have another shape for"
            raise CheckpointError(
                f"the factors that were fitted at checkpoint `{checkpoint.name}` {what} `{placement.name}`", hint
            )
    return {placement.name: found[placement.name] for placement in placements}


# --- writing -------------------------------------------------------------------------------------------------------


def keep(db: Database, tensors: Mapping[str, torch.Tensor], wanted: Correction, checkpoint: Checkpoint) -> Correction:
    """Write factors, in float32, and their row, in the place of others that no sketch was made with.

    Raises
    ------
    InputError
        Sketches were made with others.
    StoreError
        There is a number among them that is none.
    """
    if not all(bool(torch.isfinite(each).all()) for each in tensors.values()):
        raise StoreError(f"the {IN_WORDS[wanted.kind]} are not finite", "are the weights of the checkpoint finite?")
    with tempfile.TemporaryDirectory(prefix="lark-") as folder:
        draft = Path(folder) / "factors.safetensors"
        save_file({name: each.float().contiguous() for name, each in tensors.items()}, draft)
        wanted.sha256, wanted.n_bytes = file_hash(draft), draft.stat().st_size
        with db.session() as session:
            _replaced(session, checkpoint, wanted)
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
    if sha256 is None:
        return
    with db.session() as session:
        row = session.scalar(select(Correction).filter_by(checkpoint_id=checkpoint.id, sha256=sha256))
    if row is None:
        raise StoreError(
            f"the factors of checkpoint `{checkpoint.name}` were replaced by another process", "run the command again"
        )
