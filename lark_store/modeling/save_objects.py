"""Save a model object and its tokenizer, so that they are a checkpoint with files."""

from __future__ import annotations

import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lark_store.core.names import check_name
from lark_store.core.paths import is_folder, is_taken
from lark_store.errors import CheckpointError, InputError, NameTakenError, StoreError
from lark_store.modeling.checkpoints import examine, first_line

if TYPE_CHECKING:
    from lark_store.schema.backends.base import Location
    from lark_store.schema.database import Database

_FOLDER = "checkpoints"  # in the store's folder


def saved_folder(location: Location, name: str) -> Path | None:
    """Return the folder of a model saved in the store; None if the store has no folder."""
    return None if location.root is None else location.root.absolute() / _FOLDER / name


def save_objects(
    db: Database, name: str, path: str | Path | None, model: Any, tokenizer: Any
) -> tuple[str, dict[str, str | None]]:
    """Save the given objects; return the checkpoint's path, and the names given in place of objects.

    Without a model object nothing is saved. Saving the same model again is harmless.

    Raises
    ------
    InputError
        An argument is missing or of the wrong type.
    NameTakenError
        The folder has other files.
    CheckpointError
        The model can't be saved, or is no usable checkpoint.
    """
    check_name(name)
    if model is None or isinstance(model, str):
        if tokenizer is not None and not isinstance(tokenizer, str | PathLike):
            raise InputError("`tokenizer` is an object, but there is no model to save", "give `model=model` too")
        if path is None:
            raise InputError("no path is given", "give the checkpoint's folder or hub name, or `model=model`")
        return str(path), {"model": model, "tokenizer": None if tokenizer is None else str(tokenizer)}
    model = _unwrapped(model)
    _check_objects(model, tokenizer)
    target = saved_folder(db.location, name) if path is None else Path(path).absolute()
    if target is None:
        raise InputError("this store has no folder to save the model in", "choose one with `path=PATH`")
    is_object = tokenizer is not None and not isinstance(tokenizer, str | PathLike)
    place = None if is_object or tokenizer is None else str(tokenizer)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise StoreError(f"can't save a model at `{target}`: {error.strerror}", "choose another `path=PATH`") from error
    try:
        _save(model, tokenizer if is_object else None, draft)
        _publish(draft, target, place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return str(target), {"model": None, "tokenizer": place}


def _unwrapped(model: Any) -> Any:
    """Return the model inside torch.compile, DistributedDataParallel or an engine."""
    while not hasattr(model, "save_pretrained") or hasattr(model, "_orig_mod"):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            break
        model = inner
    return model


def _check_objects(model: Any, tokenizer: Any) -> None:
    if not hasattr(model, "save_pretrained"):
        raise InputError(
            f"`model` has no `save_pretrained`: {type(model).__name__}", "give a model of transformers or peft"
        )
    if tokenizer is None and not hasattr(model, "peft_config"):  # adapters use the tokenizer of their base
        raise InputError("the model has no tokenizer", "give `tokenizer=tokenizer`")


def _save(model: Any, tokenizer: Any, draft: Path) -> None:
    from lark_store.modeling.loading import quiet

    try:
        with quiet():
            model.save_pretrained(draft)
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
    except Exception as error:  # full disks, and models that transformers can't save
        raise CheckpointError(
            f"the model can't be saved: {first_line(error)}", "save it with `save_pretrained`"
        ) from error
    draft.chmod(0o755)


def _publish(draft: Path, target: Path, tokenizer: str | None) -> None:
    """Check the saved files, and move them to their folder unless it has them already."""
    parts = {} if tokenizer is None else {"tokenizer": {"path": tokenizer, "revision": None}}
    new = examine(str(draft), None, parts)
    if is_taken(target) and (not is_folder(target) or any(target.iterdir())):
        try:
            old = examine(str(target), None, parts)
        except CheckpointError:
            old = None
        if old is None or (old.weights_sha256, old.tokenizer_sha256) != (new.weights_sha256, new.tokenizer_sha256):
            raise NameTakenError(f"`{target}` has other files", "add this model under another name, or to another path")
        return
    draft.replace(target)
