"""Checkpoints: find the files, hash them, add them. Safetensors only; no code from a checkpoint is run.

A checkpoint is a whole model or LoRA adapters; the base model of adapters is found by their config.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lark_store.errors import CheckpointChangedError, CheckpointError, InputError, NameTakenError
from lark_store.ingest import adapters
from lark_store.ingest.adapters import find_adapters
from lark_store.schema.catalog import Checkpoint, CheckpointMetric
from lark_store.schema.database import Database, known_as
from lark_store.schema.hashes import file_hash
from lark_store.schema.names import check_name
from lark_store.schema.paths import is_folder

_WEIGHTS = "*.safetensors"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What turns text into tokens, and tokens into a computation.
_TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
SENTENCE_FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")  # of a sentence encoder


@dataclass(frozen=True)
class Files:
    """A checkpoint's files on this machine, and what tells them from others; `base` holds the model's config."""

    folder: Path
    base: Path
    revision: str | None
    weights_sha256: str
    tokenizer_sha256: str


def _folder(path: str, revision: str | None, *, fetch: bool = True) -> tuple[Path, str | None]:
    if is_folder(Path(path)):
        return Path(path).resolve(), None
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no checkpoint folder `{path}`", "check the path, or give a hub name like `org/model`"
        )
    from huggingface_hub import snapshot_download

    try:
        got = snapshot_download(
            path,
            revision=revision,
            allow_patterns=[_WEIGHTS, *_TOKENIZER_FILES, "*.safetensors.index.json", adapters.CONFIG, *SENTENCE_FILES],
            local_files_only=not fetch,
        )
    except Exception as error:  # the library raises many kinds: offline, unknown, gated, broken off
        raise CheckpointError(
            f"`{path}` is no folder here, and the hub does not give it: {first_line(error)}",
            "check the path; for a hub name, check the network and `hf auth login`",
        ) from error
    return Path(got), Path(got).name


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _digest(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        try:
            stat = path.stat()
            digest = _file_digest(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
        except OSError as error:
            raise CheckpointError(f"`{path}` can't be read: {error.strerror}", "is the checkpoint whole?") from error
        total.update(f"{path.name} {digest}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=1024)
def _file_digest(path: Path, *_state: int) -> str:
    """Hash a file; within one process, one that has the same size, time and inode is not read again."""
    return file_hash(path)


def base_folder(folder: Path, *, fetch: bool = False) -> Path:
    """Return the folder of a checkpoint's whole model: its own or, for adapters, that of their base.

    A base on the hub is fetched when the checkpoint is examined; later its files are taken as they came.
    """
    found = find_adapters(folder)
    if found is None:
        return folder
    beside = folder / found.base
    try:
        base, _ = _folder(str(beside) if is_folder(beside) else found.base, found.revision, fetch=fetch)
    except CheckpointError as error:
        raise CheckpointError(
            f"the base model of the adapters in `{folder}` is missing: {error.fact}",
            f"put it there, or set `base_model_name_or_path` in their {adapters.CONFIG} to its folder or hub name",
        ) from error
    if (base / adapters.CONFIG).is_file():
        raise CheckpointError(
            f"the base model of the adapters in `{folder}` holds adapters itself: `{base}`",
            "merge those into their base, and save it whole",
        )
    return base


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder has a tokenizer's files."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES if name.startswith(("tokenizer", "vocab")))


def _model_files(folder: Path, named: str) -> list[Path]:
    """Return a whole model's weights."""
    weights = list(folder.glob(_WEIGHTS))
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"`{named}` has no config.json", "a checkpoint is a folder made by `save_pretrained`")
    _check_kernels(read_json(folder / "config.json"), named)
    if not weights:
        raise CheckpointError(
            f"`{named}` has no .safetensors file",
            "save the model with `save_pretrained`; pickled weights (.bin, .pt) are not read, as they can run code",
        )
    if not (folder / _WHOLE).is_file() and (folder / _INDEX).is_file():
        _check_shards(folder, named)
    return weights


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a checkpoint that holds one JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"`{path}` can't be read: {error.strerror}", "is the checkpoint whole?") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or one that nobody writes
        raise CheckpointError(f"`{path}` is no JSON: {first_line(error)}", "is the checkpoint whole?") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"`{path}` is no JSON object", "is the checkpoint whole?")
    return found


def _check_kernels(config: dict[str, Any], named: str) -> None:
    """Refuse a config by which transformers would fetch a kernel from the hub and run it."""
    for key, value in config.items():
        if key.endswith("_implementation"):
            kernels = [v for v in (value.values() if isinstance(value, dict) else [value]) if "/" in str(v)]
            if kernels:
                raise CheckpointError(
                    f"the config of `{named}` asks for code from elsewhere: `{key}` is `{kernels[0]}`",
                    f"no code that a checkpoint names is run; take `{key}` out of its config.json",
                )
        elif isinstance(value, dict):
            _check_kernels(value, named)


def _check_shards(folder: Path, named: str) -> None:
    """Make sure that an index names files beside it: what lies elsewhere isn't hashed, and may be anything."""
    shards = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(
            f"`{named}` has a {_INDEX} without a `weight_map`", "save it again with `save_pretrained`"
        )
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"the {_INDEX} of `{named}` names `{name}`, which is no .safetensors file beside it",
                "save it again with `save_pretrained`",
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"`{named}` lacks `{name}`, one of its shards", "is the checkpoint whole?")


def _tokenizer_files(folder: Path, base: Path, named: str) -> list[Path]:
    """Return the tokenizer's files, those of adapters before their base's, and the config of the model."""
    home = folder if has_tokenizer(folder) else base
    if not has_tokenizer(home):
        raise CheckpointError(f"`{named}` has no tokenizer", "save it there with `tokenizer.save_pretrained`")
    around = [home / name for name in _TOKENIZER_FILES if name != "config.json"]
    return [path for path in (base / "config.json", *around) if path.is_file()]


def examine(path: str, revision: str | None = None) -> Files:
    """Find and hash a checkpoint's files.

    The weights of adapters are their own, their config and the base's weights; wherever the base is.

    Raises
    ------
    CheckpointError
        No such folder, no weights, no config, no tokenizer or no base model.
    """
    folder, found = _folder(path, revision)
    base = base_folder(folder, fetch=True)
    weights = _digest(_model_files(base, path if base == folder else str(base)))
    lora = find_adapters(folder)
    if lora:
        parts = (_digest([folder / adapters.WEIGHTS]), lora.config_sha256, weights)
        weights = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    return Files(folder, base, found, weights, _digest(_tokenizer_files(folder, base, path)))


def add_checkpoint(
    db: Database,
    name: str,
    path: str,
    *,
    model: str | None,
    revision: str | None,
    epoch: float | None,
    step: int | None,
    learning_rate: float | None,
    metrics: dict[str, float],
) -> Checkpoint:
    """Add a checkpoint, or new metrics to the same one; see `Store.checkpoint_add`."""
    check_name(name)
    for what, figure in {"epoch": epoch, "learning rate": learning_rate, **metrics}.items():
        if figure is not None and not math.isfinite(figure):
            raise InputError(f"{what} is {figure}, not a finite number", "leave it out if it is not known")
    if step is not None and not 0 <= step < 1 << 31:
        raise InputError(f"step {step} is out of range", "a step counts optimizer steps from 0")
    files = examine(path, revision)
    local = Path(path).is_dir()
    config = read_json(files.base / "config.json")
    row = Checkpoint(
        name=name,
        model=model or (str(config.get("model_type", "unknown")) if local else path),
        path=str(files.folder) if local else path,
        revision=files.revision,
        weights_sha256=files.weights_sha256,
        tokenizer_sha256=files.tokenizer_sha256,
        epoch=epoch,
        step=step,
        learning_rate=learning_rate,
    )
    with db.session() as session:
        given = tuple(c for c in ("epoch", "step", "learning_rate") if getattr(row, c) is not None)
        known = known_as(session, row, given)
        if known and (known.weights_sha256, known.tokenizer_sha256) != (
            row.weights_sha256,
            row.tokenizer_sha256,
        ):
            raise NameTakenError(
                f"checkpoint `{name}` is in the store already with other weights or another tokenizer",
                "add these under another name",
            )
        kept = known or row
        kept.path, kept.revision = row.path, row.revision  # the same files may have moved
        have = {m.name: m for m in kept.metrics} if known else {}
        for metric, value in metrics.items():
            if metric in have:
                have[metric].value = value
            else:
                kept.metrics.append(CheckpointMetric(name=metric, value=value))
        session.add(kept)
        session.flush()
        session.refresh(kept, ["metrics"])
    return kept


def verify(checkpoint: Checkpoint) -> Files:
    """Make sure that a checkpoint's files are those that were added.

    Raises
    ------
    CheckpointChangedError, CheckpointError
    """
    files = examine(checkpoint.path, checkpoint.revision)
    for what in ("weights", "tokenizer"):
        if getattr(files, f"{what}_sha256") != getattr(checkpoint, f"{what}_sha256"):
            raise CheckpointChangedError(
                f"the {what} of checkpoint `{checkpoint.name}` in `{checkpoint.path}` changed since it was added",
                "put the old files back, or add the new ones under another name with `lark-store checkpoint add`",
            )
    return files
