"""The files of checkpoints: find, hash and verify them. Safetensors only; code in a checkpoint never runs.

A checkpoint is a whole model or LoRA adapters, whose config names their base model. Its config and its tokenizer may be
in folders of their own: its *parts*.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lark_store.core.hashing import file_hash
from lark_store.core.paths import is_file, is_folder
from lark_store.errors import CheckpointChangedError, CheckpointError
from lark_store.modeling import lora
from lark_store.modeling.foreign_weights import check_precision_kept, unreadable_weights
from lark_store.modeling.lora import find_adapters
from lark_store.schema.catalog import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Part = Mapping[str, str | None]  # `path` and, for a hub name, `revision`

_WEIGHTS = "*.safetensors"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_INCOMPLETE = "is the checkpoint complete?"
# Hashed together: everything that affects tokenization or the computation.
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
SENTENCE_FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")  # sentence-transformers


_PATTERNS = (_WEIGHTS, *_TOKENIZER_FILES, "*.safetensors.index.json", lora.CONFIG, *SENTENCE_FILES)


@dataclass(frozen=True)
class ModelFolder:
    """The folders of a model: its weights or adapters, the weights of its base, its config and its tokenizer.

    `base` is `weights`, except for adapters. The config and the tokenizer are there too, unless they are parts.
    """

    weights: Path
    base: Path
    config: Path
    tokenizer: Path


@dataclass(frozen=True)
class Files:
    """A checkpoint's local files and their hashes. `folder` has its weights, `base` those of the whole model.

    `parts` are the locations of the config and the tokenizer outside these folders.
    """

    folder: Path
    base: Path
    revision: str | None
    weights_sha256: str
    tokenizer_sha256: str
    model: ModelFolder
    parts: Mapping[str, Part]


def _folder(
    path: str,
    revision: str | None,
    *,
    fetch: bool = True,
    kind: str = "checkpoint",
    patterns: Sequence[str] = _PATTERNS,
) -> tuple[Path, str | None]:
    if is_folder(Path(path)):
        return Path(path).resolve(), None
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no {kind} folder `{path}`", "check the path, or give a hub name like `org/model`"
        )
    from huggingface_hub import snapshot_download

    try:
        local = snapshot_download(path, revision=revision, allow_patterns=list(patterns), local_files_only=not fetch)
    except Exception as error:  # offline, unknown, gated, interrupted: many exception types
        raise CheckpointError(
            f"`{path}` is not a local folder and can't be downloaded from the hub: {first_line(error)}",
            "check the path; for a hub name, check the network and `hf auth login`",
        ) from error
    return Path(local), Path(local).name


def local_folder(checkpoint: Checkpoint) -> Path:
    """Return the folder of a checkpoint's files on this machine; nothing is downloaded or hashed.

    Raises
    ------
    CheckpointError
        There is none.
    """
    folder, _ = _folder(checkpoint.path, checkpoint.revision, fetch=False)
    return folder


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
            raise CheckpointError(f"`{path}` can't be read: {error.strerror}", _INCOMPLETE) from error
        total.update(f"{path.name} {digest}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=1024)
def _file_digest(path: Path, *_state: int) -> str:
    """Hash a file. Cached within a process by size, mtime and inode."""
    return file_hash(path)


def base_folder(folder: Path, *, fetch: bool = False) -> Path:
    """Return the folder of the whole model: the checkpoint's own, or the base of its adapters.

    `fetch` may download a base from the hub; otherwise only downloaded files are used.
    """
    adapters = find_adapters(folder)
    if adapters is None:
        return folder
    relative = folder / adapters.base
    try:
        base, _ = _folder(str(relative) if is_folder(relative) else adapters.base, adapters.revision, fetch=fetch)
    except CheckpointError as error:
        raise CheckpointError(
            f"the base model of the adapters in `{folder}` is missing: {error.fact}",
            f"put it there, or set `base_model_name_or_path` in {lora.CONFIG} to its folder or hub name",
        ) from error
    if (base / lora.CONFIG).is_file():
        raise CheckpointError(
            f"the base model of the adapters in `{folder}` holds adapters itself: `{base}`",
            "merge these into their base and save the whole model",
        )
    return base


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder contains tokenizer files."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES if name.startswith(("tokenizer", "vocab")))


def model_folder(folder: Path | ModelFolder, *, fetch: bool = False) -> ModelFolder:
    """Return the folders of a model: adapters use the config of their base, and its tokenizer if they have none."""
    if isinstance(folder, ModelFolder):
        return folder
    base = base_folder(folder, fetch=fetch)
    return ModelFolder(folder, base, config=base, tokenizer=folder if has_tokenizer(folder) else base)


def _model_files(base: Path, config: Path, path: str) -> list[Path]:
    """Return the weight files of a whole model in `base`, which messages call `path`; `config` has its config."""
    weights = list(base.glob(_WEIGHTS))
    unreadable = None if weights else unreadable_weights(base, path)
    if unreadable is not None:
        raise unreadable
    if not (config / "config.json").is_file():
        raise CheckpointError(
            f"`{path if config == base else config}` has no config.json",
            "a checkpoint is a folder made by `save_pretrained`; name another folder with its config: `--config PATH`",
        )
    settings = read_json(config / "config.json")
    _check_kernels(settings, path)
    if not weights:
        raise CheckpointError(
            f"`{path}` has no .safetensors file",
            "save the model with `save_pretrained`; pickled weights (.bin, .pt) can run code and are never read",
        )
    if not (base / _WHOLE).is_file() and (base / _INDEX).is_file():
        _check_shards(base, path)
    check_precision_kept(settings, weights, path)
    return weights


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a whole model: one file, or the shards in its index."""
    if (folder / _WHOLE).is_file() or not (folder / _INDEX).is_file():
        return [folder / _WHOLE] if (folder / _WHOLE).is_file() else sorted(folder.glob(_WEIGHTS))
    return [folder / name for name in sorted(set(read_json(folder / _INDEX)["weight_map"].values()))]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"`{path}` can't be read: {error.strerror}", _INCOMPLETE) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise CheckpointError(f"`{path}` is not JSON: {first_line(error)}", _INCOMPLETE) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"`{path}` is not a JSON object", _INCOMPLETE)
    return content


def _check_kernels(config: dict[str, Any], path: str) -> None:
    """Refuse a config that makes transformers download a kernel and run it."""
    for key, value in config.items():
        if key.endswith("_implementation"):
            kernels = [v for v in (value.values() if isinstance(value, dict) else [value]) if "/" in str(v)]
            if kernels:
                raise CheckpointError(
                    f"the config of `{path}` asks for external code: `{key}` is `{kernels[0]}`",
                    f"lark-store never runs code named by a checkpoint; remove `{key}` from its config.json",
                )
        elif isinstance(value, dict):
            _check_kernels(value, path)


def _check_shards(folder: Path, path: str) -> None:
    """Check that the index only names files beside it: files elsewhere are not hashed."""
    shards = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"`{path}` has a {_INDEX} without a `weight_map`", "save it again with `save_pretrained`")
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"the {_INDEX} of `{path}` names `{name}`, not a .safetensors file beside it",
                "save it again with `save_pretrained`",
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"`{path}` lacks the shard `{name}`", _INCOMPLETE)


def _tokenizer_files(model: ModelFolder, path: str) -> list[Path]:
    """Return the tokenizer files and the model's config."""
    home = model.tokenizer
    if not has_tokenizer(home):
        raise CheckpointError(
            f"`{path if home in {model.weights, model.base} else home}` has no tokenizer",
            "save one there with `tokenizer.save_pretrained`, or name the folder of another: `--tokenizer PATH`",
        )
    around = [home / name for name in _TOKENIZER_FILES if name != "config.json"]
    return [path for path in (model.config / "config.json", *around) if path.is_file()]


def _part(kind: str, part: Part) -> tuple[Path, Part]:
    """Return the folder of a config or tokenizer, and its location as stored: an absolute path, or a hub name."""
    place = str(part["path"])
    folder = str(Path(place).parent) if is_file(Path(place)) else place
    local, commit = _folder(folder, part.get("revision"), kind=kind, patterns=_TOKENIZER_FILES)
    return local, {"path": str(local) if commit is None else folder, "revision": commit}


def examine(path: str, revision: str | None = None, parts: Mapping[str, Part] | None = None) -> Files:
    """Find and hash a checkpoint's files; `parts` locate its `config` and its `tokenizer` outside its folder.

    The weights hash of adapters covers their weights, their config and the base's weights, not the base's location.

    Raises
    ------
    CheckpointError
        The folder, weights, config, tokenizer or base model is missing, or the weights are quantised.
    """
    folder, commit = _folder(path, revision)
    model = model_folder(folder, fetch=True)
    located = {kind: _part(kind, part) for kind, part in (parts or {}).items()}
    model = replace(model, **{kind: local for kind, (local, _) in located.items()})
    weights = _digest(_model_files(model.base, model.config, path if model.base == folder else str(model.base)))
    adapters = find_adapters(folder)
    if adapters:
        hashes = (_digest([folder / lora.WEIGHTS]), adapters.config_sha256, weights)
        weights = hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    tokenizer = _digest(_tokenizer_files(model, path))
    stored = {kind: part for kind, (_, part) in located.items()}
    return Files(folder, model.base, commit, weights, tokenizer, model, stored)


def verify(checkpoint: Checkpoint) -> Files:
    """Check that a checkpoint's files are unchanged since it was added.

    Raises
    ------
    CheckpointChangedError, CheckpointError
    """
    files = examine(checkpoint.path, checkpoint.revision, checkpoint.parts)
    hashes = {"weights": "weights_sha256", "tokenizer or configuration": "tokenizer_sha256"}
    for part, column in hashes.items():
        if getattr(files, column) != getattr(checkpoint, column):
            raise CheckpointChangedError(
                f"the {part} of checkpoint `{checkpoint.name}` in `{checkpoint.path}` changed since it was added",
                "restore the old files, or add the new ones under another name with `lark-store checkpoint add`",
            )
    return files


def verify_row(row: dict[str, Any]) -> Files:
    """Do the same for a row of the view `checkpoints`: name, path, revision, parts and both hashes."""
    parts = row["parts"]
    return verify(Checkpoint(**row | {"parts": None if parts is None else json.loads(parts)}))
