"""Add checkpoints to the catalog: one, or all of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from lark_store.core.names import check_name
from lark_store.core.paths import is_file, is_folder
from lark_store.errors import CheckpointError, InputError, NameTakenError
from lark_store.modeling.checkpoints import Files, examine, read_json, weight_files
from lark_store.modeling.foreign_weights import unreadable_weights
from lark_store.modeling.trainer_runs import (
    STATE,
    TrainerFacts,
    checkpoint_folders,
    is_pattern,
    read_facts,
    step_in_name,
)
from lark_store.modeling.weight_keys import plain_name, tensor_names, truncated, wrapped
from lark_store.schema.catalog import Checkpoint, CheckpointMetric
from lark_store.schema.database import Database, find_same

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lark_store.specs import CheckpointSpec

_OF_ONE = ("epoch", "step", "learning_rate", "revision")  # fields of a single checkpoint
_TAKEN = "already in the store with other weights, tokenizer or configuration"


@dataclass(frozen=True)
class Added:
    """A checkpoint's row, whether this call added it, and notes for the user."""

    row: Checkpoint
    is_new: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AddedRun:
    """The checkpoints of a run, the folders that were skipped with the reason, and notes."""

    added: list[Added]
    skipped: dict[str, str]
    notes: tuple[str, ...] = ()


def add_checkpoint(db: Database, name: str, path: str, spec: CheckpointSpec) -> Added:
    """Add a checkpoint, or add metrics to an existing one; see `Store.checkpoint_add`."""
    check_name(name)
    _check_figures(spec)
    is_local = is_folder(Path(path))
    if is_local and not _has_model(Path(path)) and (run := checkpoint_folders(name, path)):
        raise CheckpointError(
            f"`{path}` is the folder of a training run, with {len(run)} checkpoints",
            f'add them all with `store.checkpoint_add_run("{name}", "{path}")`',
        )
    files = examine(path, spec.revision, _stored_parts(db, name) | _given_parts(spec))
    facts = read_facts(files.folder) if is_local else TrainerFacts()
    config = read_json(files.model.config / "config.json")
    row = Checkpoint(
        name=name,
        model=spec.model or (str(config.get("model_type", "unknown")) if is_local else path),
        path=str(files.folder) if is_local else path,
        revision=files.revision,
        weights_sha256=files.weights_sha256,
        tokenizer_sha256=files.tokenizer_sha256,
        epoch=spec.epoch,
        step=spec.step,
        learning_rate=spec.learning_rate,
        parts=files.parts or None,
    )
    stored, is_new = _store(db, row, facts, spec.metrics)
    used = facts.notes if is_new and spec.learning_rate is None else ()
    return Added(stored, is_new, used + _prefix_notes(files))


def _check_figures(spec: CheckpointSpec) -> None:
    for label, figure in {"epoch": spec.epoch, "learning rate": spec.learning_rate, **spec.metrics}.items():
        if figure is not None and not math.isfinite(figure):
            raise InputError(f"{label} is {figure}, not a finite number", "omit it if unknown")
    if spec.step is not None and not 0 <= spec.step < 1 << 31:
        raise InputError(f"step {spec.step} is out of range", "give the number of optimizer steps, counted from 0")


def _stored_parts(db: Database, name: str) -> dict[str, Any]:
    with db.session() as session:
        return session.scalar(select(Checkpoint.parts).filter_by(name=name)) or {}


def _given_parts(spec: CheckpointSpec) -> dict[str, Any]:
    given = {"config": spec.config, "tokenizer": spec.tokenizer}
    return {kind: {"path": str(place), "revision": None} for kind, place in given.items() if place is not None}


def _prefix_notes(files: Files) -> tuple[str, ...]:
    """Return a note on weights saved from a wrapped model."""
    prefixed = wrapped(tensor_names(weight_files(files.base)))
    if not prefixed:
        return ()
    return (f"its weights have names of a wrapped model: `{prefixed[0]}` will be read as `{plain_name(prefixed[0])}`",)


def _store(db: Database, row: Checkpoint, facts: TrainerFacts, metrics: Mapping[str, float]) -> tuple[Checkpoint, bool]:
    """Add the row, or update the stored one; a new row takes missing values from the Trainer's facts."""
    with db.session() as session:
        given_columns = tuple(c for c in ("epoch", "step", "learning_rate") if getattr(row, c) is not None)
        existing = find_same(session, row, given_columns)
        if existing is not None and not _is_same(existing, row):
            raise NameTakenError(f"checkpoint `{row.name}` is {_TAKEN}", "add this one under another name")
        if existing is None:
            for column in ("epoch", "step", "learning_rate"):
                if getattr(row, column) is None:
                    setattr(row, column, getattr(facts, column))
        stored = existing or row
        stored.path, stored.revision, stored.parts = row.path, row.revision, row.parts  # the files may have moved
        have = {m.name: m for m in stored.metrics} if existing else {}
        logged = {name: value for name, value in facts.metrics.items() if name not in have}
        for metric, value in (logged | dict(metrics)).items():
            if metric in have:
                have[metric].value = value
            else:
                stored.metrics.append(CheckpointMetric(name=metric, value=value))
        session.add(stored)
        session.flush()
        session.refresh(stored, ["metrics"])
    return stored, existing is None


def _is_same(stored: Checkpoint, new: Checkpoint | Files) -> bool:
    return (stored.weights_sha256, stored.tokenizer_sha256) == (new.weights_sha256, new.tokenizer_sha256)


# --- a training run ------------------------------------------------------------------------------------------------


def add_run(db: Database, name: str, path: str, spec: CheckpointSpec) -> AddedRun:
    """Add the checkpoints of a run folder or of a glob pattern, else one checkpoint; see `Store.checkpoint_add_run`."""
    check_name(name)
    folders = checkpoint_folders(name, path)
    if not folders or (not is_pattern(path) and _is_known(db, name)):
        one = add_checkpoint(db, name, path, spec)
        return AddedRun([one], {})
    _check_for_all(path, len(folders), spec)
    for key in folders:
        check_name(key)
    examined, skipped = _examine_all(folders, spec)
    if not examined:
        reason = next(iter(skipped.values()))
        fact, _, hint = reason.partition("\n\nhint: ")
        raise CheckpointError(f"`{path}` has no checkpoint that can be added: {fact}", hint or None)
    notes = _add_final(db, name, path, spec, (folders, examined, skipped))
    _check_free(db, examined)
    added = [_add_of_run(db, key, folders[key], spec) for key in examined]
    return AddedRun(added, {folder: reason.partition("\n\n")[0] for folder, reason in skipped.items()}, notes)


_Run = tuple[dict[str, Path], dict[str, Files], dict[str, str]]  # folders and files by name; reasons by skipped folder


def _check_for_all(path: str, n_folders: int, spec: CheckpointSpec) -> None:
    """Refuse options of a single checkpoint."""
    given = [name for name in _OF_ONE if getattr(spec, name) is not None] + ["metric"] * bool(spec.metrics)
    if given:
        raise InputError(
            f"`--{given[0].replace('_', '-')}` is for one checkpoint, but `{path}` has {n_folders}",
            f"omit it: each checkpoint's own come from its {STATE}; or give the folder of one checkpoint",
        )


def _examine_all(folders: Mapping[str, Path], spec: CheckpointSpec) -> tuple[dict[str, Files], dict[str, str]]:
    """Hash the files of each checkpoint; return also the folders that are incomplete, with the reason."""
    examined: dict[str, Files] = {}
    skipped: dict[str, str] = {}
    for key, folder in folders.items():
        try:
            _check_complete(folder)
            files = examine(str(folder), None, _given_parts(spec))
        except CheckpointError as error:
            skipped[str(folder)] = str(error)
        else:
            examined[key] = files
    return examined, skipped


def _check_complete(folder: Path) -> None:
    """Refuse a folder without weights, or with files that are still being written."""
    read_facts(folder)
    if not _has_model(folder):
        raise unreadable_weights(folder, str(folder)) or CheckpointError(f"`{folder}` has no weights")
    incomplete = truncated(sorted(folder.glob("*.safetensors")))
    if incomplete is not None:
        raise CheckpointError(f"`{incomplete}` is incomplete", "add the run again when it is written")


def _add_final(db: Database, name: str, path: str, spec: CheckpointSpec, run: _Run) -> tuple[str, ...]:
    """Include the model in the run's folder itself, unless a checkpoint has its weights; return notes."""
    folders, examined, skipped = run
    folder = Path(path)
    if is_pattern(path) or not _has_model(folder):
        return ()
    key = check_name(f"{name}-final")
    try:
        _check_complete(folder)
        files, facts = examine(path, None, _given_parts(spec)), read_facts(folder)
    except CheckpointError as error:
        skipped[path] = str(error)
        return ()
    twin = next((other for other, known in examined.items() if known.weights_sha256 == files.weights_sha256), None)
    if twin is not None:
        return (f"the model in `{path}` itself has the weights of `{twin}`",)
    with db.session() as session:
        stored = session.scalar(select(Checkpoint).filter_by(name=key))
    if stored is not None and not _is_same(stored, files):
        skipped[path] = f"`{key}` is an earlier final model; remove it with `lark-store checkpoint remove {key}` first"
        return ()
    folders[key], examined[key] = folder, files
    unknown = "" if facts.step is not None else f"; its step is unknown, since the folder has no {STATE}"
    return (f"the final model, in `{path}` itself, is `{key}`{unknown}",)


def _has_model(folder: Path) -> bool:
    """Tell whether a folder has weights or adapters of its own."""
    return any(True for _ in folder.glob("*.safetensors"))


def _add_of_run(db: Database, name: str, folder: Path, spec: CheckpointSpec) -> Added:
    """Add one checkpoint; without the Trainer's facts, take its step from its folder's name."""
    step = None if is_file(folder / STATE) else step_in_name(folder)
    added = add_checkpoint(db, name, str(folder), replace(spec, step=step))
    if step is None or not added.is_new:
        return added
    note = f"its folder has no {STATE}: the step is from the folder's name, the learning rate is unknown"
    return replace(added, notes=(*added.notes, note))


def _is_known(db: Database, name: str) -> bool:
    with db.session() as session:
        return session.scalar(select(Checkpoint.id).filter_by(name=name)) is not None


def _check_free(db: Database, examined: Mapping[str, Files]) -> None:
    """Refuse the run before anything is added if a name belongs to other weights."""
    with db.session() as session:
        rows = list(session.scalars(select(Checkpoint).where(Checkpoint.name.in_(examined))))
    for row in rows:
        if not _is_same(row, examined[row.name]):
            raise NameTakenError(f"checkpoint `{row.name}` is {_TAKEN}", "add this run under another name")
