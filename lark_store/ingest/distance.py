"""How far a checkpoint's weights are from another's, tensor by tensor.

Influence over two stages of training takes the curvature at each, as if the second stage had not moved far from the
first. The relative distance ‖θ − θ₀‖ / ‖θ₀‖ says whether that can be believed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from sqlalchemy import select

from lark_store.errors import CheckpointError
from lark_store.ingest.adapters import find_adapters
from lark_store.ingest.checkpoints import verify, weight_files
from lark_store.schema.catalog import Checkpoint, CheckpointMetric
from lark_store.schema.database import find

if TYPE_CHECKING:
    from pathlib import Path

    from lark_store.schema.database import Database


def distance(db: Database, name: str, origin: str) -> float:
    """Return the distance of a checkpoint from another, once measured kept as its metric; see `Store`.

    In a snapshot, which is only read, it is measured each time unless it was kept before.

    Raises
    ------
    NameUnknownError, CheckpointError, CheckpointChangedError
    """
    metric = f"distance-from:{origin}"
    with db.session() as session:
        one, other = find(session, Checkpoint, name), find(session, Checkpoint, origin)
        known = session.scalar(select(CheckpointMetric).filter_by(checkpoint_id=one.id, name=metric))
    if known is not None:
        return known.value
    found = measured(_weights(one), _weights(other), (name, origin))
    if not db.is_snapshot:
        with db.session() as session:
            session.merge(CheckpointMetric(checkpoint_id=one.id, name=metric, value=found))
    return found


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
