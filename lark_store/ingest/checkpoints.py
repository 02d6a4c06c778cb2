"""Checkpoints: find the files, hash them, load the model. Safetensors only; no code from a checkpoint is run."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lark_store.errors import CheckpointChangedError, CheckpointError, InputError, NameTakenError
from lark_store.schema.catalog import Checkpoint, CheckpointMetric
from lark_store.schema.database import Database, known_as
from lark_store.schema.names import check_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_WEIGHTS = "*.safetensors"
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
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Files:
    """A checkpoint's files on this machine, and what tells them from others."""

    folder: Path
    revision: str | None
    weights_sha256: str
    tokenizer_sha256: str


def _folder(path: str, revision: str | None) -> tuple[Path, str | None]:
    if Path(path).is_dir():
        return Path(path).resolve(), None
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no checkpoint folder `{path}`", "check the path, or give a hub name like `org/model`"
        )
    from huggingface_hub import snapshot_download

    try:
        got = snapshot_download(
            path, revision=revision, allow_patterns=[_WEIGHTS, *_TOKENIZER_FILES, "*.safetensors.index.json"]
        )
    except Exception as error:  # the library raises many kinds: offline, unknown, gated, broken off
        raise CheckpointError(
            f"`{path}` is no folder here, and the hub does not give it: {_first_line(error)}",
            "check the path; for a hub name, check the network and `hf auth login`",
        ) from error
    return Path(got), Path(got).name


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _digest(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(paths):
        stat = path.stat()
        total.update(f"{path.name} {_file_digest(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=1024)
def _file_digest(path: Path, *_state: int) -> str:
    """Hash a file; within one process, one that has the same size, time and inode is not read again."""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def examine(path: str, revision: str | None = None) -> Files:
    """Find and hash a checkpoint's files.

    Raises
    ------
    CheckpointError
        No such folder, no weights, no config or no tokenizer.
    """
    folder, found = _folder(path, revision)
    weights = list(folder.glob(_WEIGHTS))
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"`{path}` has no config.json", "a checkpoint is a folder made by `save_pretrained`")
    if not weights:
        raise CheckpointError(
            f"`{path}` has no .safetensors file",
            "save the model with `save_pretrained`; pickled weights (.bin, .pt) are not read, as they can run code",
        )
    around = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not any(p.name.startswith(("tokenizer", "vocab")) for p in around):
        raise CheckpointError(f"`{path}` has no tokenizer", "save it there with `tokenizer.save_pretrained`")
    return Files(folder, found, _digest(weights), _digest(around))


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
    config = json.loads((files.folder / "config.json").read_text(encoding="utf-8"))
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


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """Load a checkpoint's tokenizer."""
    from transformers import AutoTokenizer

    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds for a broken file
        raise CheckpointError(
            f"the tokenizer in `{folder}` can't be loaded: {_first_line(error)}", "is it complete?"
        ) from error


def meta_model(folder: Path) -> torch.nn.Module:
    """Build a checkpoint's model without its weights: names and shapes alone.

    Raises
    ------
    CheckpointError
        The config can't be read, or names no causal language model that transformers knows.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with _quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model: torch.nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a config it can't use
        raise CheckpointError(
            f"`{folder / 'config.json'}` describes no usable model: {_first_line(error)}",
            "it must be a causal language model that transformers knows without remote code",
        ) from error
    return model


def context_length(model: torch.nn.Module) -> int | None:
    """Return the longest input of a model in tokens, None if its config names no limit."""
    found = getattr(model.config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def load_model(folder: Path, device: torch.device, precision: str) -> Any:
    """Load a checkpoint's causal language model for gradients: in evaluation mode (no dropout), on `device`.

    Raises
    ------
    CheckpointError
        The weights can't be read, or do not cover the whole model.
    """
    from transformers import AutoModelForCausalLM

    if precision not in PRECISIONS:
        raise InputError(f"`{precision}` is no precision", f"one of {', '.join(PRECISIONS)}")
    dtype: Any = precision if precision != "auto" else "auto" if device.type == "cuda" else "float32"
    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # transformers and safetensors raise many kinds for a broken file
        raise CheckpointError(
            f"the model in `{folder}` can't be loaded: {_first_line(error)}", "are its files whole?"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"the weights in `{folder}` lack {len(missing)} of the model's tensors, such as `{missing[0]}`",
            "a model with random tensors would give wrong gradients; save the whole model",
        )
    return model.to(device).eval()
