"""Relative distance ‖θ − θ₀‖ / ‖θ₀‖ between the weights of two checkpoints.

Influence over two stages of training uses the curvature at both checkpoints. This assumes small steps between them;
the distance shows how far the assumption holds. It is over all tensors, or over the weights of the linear layers of
MLPs and attention alone: no embeddings, output head, norms and biases. A tied embedding counts once.

Distances are cached, and reading them imports no torch.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lark_store.errors import CheckpointError, InputError
from lark_store.modeling.checkpoints import verify, weight_files
from lark_store.modeling.lora import find_adapters
from lark_store.modeling.weight_keys import plain_name
from lark_store.schema.catalog import Checkpoint
from lark_store.schema.database import find

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from lark_store.schema.database import Database

LAYERS = ("all", "linear")


def distance(db: Database, name: str, origin: str, layers: str = "all") -> float:
    """Return the distance between two checkpoints, cached by their weights; see `Store.checkpoint_distance`.

    Raises
    ------
    InputError, NameUnknownError, CheckpointError, CheckpointChangedError
    """
    if layers not in LAYERS:
        raise InputError(f"unknown layers `{layers}`", f"use {' or '.join(f'`{each}`' for each in LAYERS)}")
    with db.session() as session:
        checkpoint, reference = find(session, Checkpoint, name), find(session, Checkpoint, origin)
    cache = cache_file(db, checkpoint, reference, layers)
    if cache.is_file():
        value = float(cache.read_text(encoding="utf-8"))
    else:
        files, reference_files = _weights(checkpoint), _weights(reference)
        measured = relative_distances(files, reference_files, (name, origin), _linear(checkpoint, files))
        for each, measure in measured.items():
            _cache(measure, cache_file(db, checkpoint, reference, each))
        value = measured[layers]
    if math.isnan(value):
        raise CheckpointError(
            f"the tensors of checkpoint `{name}` have other names than the linear layers of its model",
            "take the distance over all tensors",
        )
    return value


def cache_file(db: Database, checkpoint: Checkpoint, reference: Checkpoint, layers: str = "all") -> Path:
    """Return the cache file for the distance of two sets of weights."""
    weights = [checkpoint.weights_sha256, reference.weights_sha256, *(() if layers == "all" else [layers])]
    key = hashlib.sha256(" ".join(map(str, weights)).encode()).hexdigest()
    return db.location.cache / "distances" / key[:32]


def _linear(checkpoint: Checkpoint, tensors: Collection[str]) -> set[str] | None:
    """Return which tensors are weights of linear layers, None if their names don't tell."""
    from lark_store.modeling.linear_modules import linear_tensors
    from lark_store.modeling.loading import meta_model

    try:
        return linear_tensors(meta_model(verify(checkpoint).model), tensors)
    except CheckpointError:
        return None


def _cache(value: float, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent)
    except OSError:  # read-only store: measure every time
        return
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(repr(value))
    Path(draft).replace(path)


def _weights(checkpoint: Checkpoint) -> dict[str, Path]:
    """Map each tensor of a checkpoint to its file.

    Raises
    ------
    CheckpointError
        The checkpoint is LoRA adapters.
    """
    from safetensors import safe_open

    folder = verify(checkpoint).folder
    if find_adapters(folder) is not None:
        raise CheckpointError(
            f"checkpoint `{checkpoint.name}` holds LoRA adapters; a distance needs whole models",
            "merge them into their base and add the whole model",
        )
    files: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as content:
            files |= dict.fromkeys(map(plain_name, content.keys()), path)
    return files


def relative_distances(
    files: dict[str, Path],
    reference_files: dict[str, Path],
    names: tuple[str, str],
    linear: Collection[str] | None = None,
) -> dict[str, float]:
    """Compute ‖θ − θ₀‖ / ‖θ₀‖ over `all` tensors and over the `linear` ones, one pair in memory at a time.

    The second is NaN if the linear tensors are unknown, or all zero.

    Raises
    ------
    CheckpointError
        Names or shapes of the tensors differ.
    """
    mismatched = sorted(files.keys() ^ reference_files.keys())
    apart, norm = dict.fromkeys(LAYERS, 0.0), dict.fromkeys(LAYERS, 0.0)
    for name in sorted(files.keys() & reference_files.keys()):
        new, old = _read(files[name], name), _read(reference_files[name], name)
        if new.shape != old.shape:
            mismatched.append(name)
        if mismatched:
            break
        squares = _squared(new - old), _squared(old)
        for layers in LAYERS if linear and name in linear else ("all",):
            apart[layers] += squares[0]
            norm[layers] += squares[1]
    if mismatched:
        raise CheckpointError(
            f"checkpoints `{names[0]}` and `{names[1]}` have different tensors, such as `{mismatched[0]}`",
            "compare two checkpoints of one model",
        )
    if norm["all"] == 0:
        raise CheckpointError(f"the weights of checkpoint `{names[1]}` are all zero", "is it complete?")
    return {layers: math.sqrt(apart[layers] / norm[layers]) if norm[layers] else math.nan for layers in LAYERS}


def _read(path: Path, name: str) -> torch.Tensor:
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as content:
        key = next(key for key in content.keys() if plain_name(key) == name)  # noqa: SIM118  # no dict
        tensor: torch.Tensor = content.get_tensor(key)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _squared(tensor: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
