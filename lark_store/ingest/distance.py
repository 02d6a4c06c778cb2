"""How far a checkpoint's weights are from another's, tensor by tensor.

Influence over two stages of training takes the curvature at each, as if the second stage had not moved far from the
first. The relative distance ‖θ − θ₀‖ / ‖θ₀‖ says whether that can be believed.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from lark_store.errors import CheckpointError
from lark_store.ingest.adapters import find_adapters
from lark_store.ingest.checkpoints import verify, weight_files
from lark_store.schema.catalog import Checkpoint
from lark_store.schema.database import find

if TYPE_CHECKING:
    from lark_store.schema.database import Database


def distance(db: Database, name: str, origin: str) -> float:
    """Return the distance of a checkpoint from another, measured once for two sets of weights; see `Store`.

    Raises
    ------
    NameUnknownError, CheckpointError, CheckpointChangedError
    """
    with db.session() as session:
        one, other = find(session, Checkpoint, name), find(session, Checkpoint, origin)
    kept = kept_at(db, one, other)
    if kept.is_file():
        return float(kept.read_text(encoding="utf-8"))
    found = measured(_weights(one), _weights(other), (name, origin))
    _keep(found, kept)
    return found


def kept_at(db: Database, one: Checkpoint, other: Checkpoint) -> Path:
    """Return where the distance of two sets of weights is kept, among what may be lost."""
    both = hashlib.sha256(f"{one.weights_sha256} {other.weights_sha256}".encode()).hexdigest()
    return db.location.cache / "distances" / both[:32]


def _keep(found: float, place: Path) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=place.parent)
    except OSError:  # a store that can only be read: it is measured each time
        return
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(repr(found))
    Path(draft).replace(place)


def _weights(checkpoint: Checkpoint) -> dict[str, Path]:
    """Return the file of each tensor of a checkpoint.

    Raises
    ------
    CheckpointError
        It is adapters: their weights are a change of a model, not a model.
    """
    folder = verify(checkpoint).folder
    if find_adapters(folder) is not None:
        raise CheckpointError(
            f"checkpoint `{checkpoint.name}` is LoRA adapters, whose distance is not measured",
            "merge them into their base and save it whole, if you need the figure",
        )
    found: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as content:
            found |= dict.fromkeys(content.keys(), path)
    return found


def measured(ours: dict[str, Path], theirs: dict[str, Path], names: tuple[str, str]) -> float:
    """Return ‖θ − θ₀‖ / ‖θ₀‖ over all tensors, one of each in memory at a time.

    Raises
    ------
    CheckpointError
        They have other tensors, or of other shapes.
    """
    odd = sorted(ours.keys() ^ theirs.keys())
    apart, whole = 0.0, 0.0
    for name in sorted(ours.keys() & theirs.keys()):
        new, old = (_read(files[name], name) for files in (ours, theirs))
        if new.shape != old.shape:
            odd.append(name)
        if odd:
            break
        apart += _squared(new - old)
        whole += _squared(old)
    if odd:
        raise CheckpointError(
            f"checkpoints `{names[0]}` and `{names[1]}` differ in their tensors: `{odd[0]}`",
            "a distance is between two checkpoints of one model",
        )
    if whole == 0:
        raise CheckpointError(f"the weights of checkpoint `{names[1]}` are all zero", "is it whole?")
    return math.sqrt(apart / whole)


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as content:
        tensor: torch.Tensor = content.get_tensor(name)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _squared(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
