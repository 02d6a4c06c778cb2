"""The layout of sketched parameters: each starts at a chunk boundary of the map."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lark_store.errors import InputError
from lark_store.gradients.sketch.oporp import LANES

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Placement:
    """A parameter's position in the layout: its shape and chunks."""

    name: str
    shape: tuple[int, ...]
    first_chunk: int
    n_chunks: int

    @property
    def numel(self) -> int:
        """P, the parameter's coordinates."""
        return torch.Size(self.shape).numel()


def place(shapes: list[tuple[str, tuple[int, ...]]], k: int) -> list[Placement]:
    """Lay out parameters in order, each from a chunk boundary.

    >>> [p.first_chunk for p in place([("a", (300,)), ("b", (10, 10))], k=256)]
    [0, 2]
    """
    placed, chunk = [], 0
    for name, shape in shapes:
        n_chunks = -(-torch.Size(shape).numel() // k)
        placed.append(Placement(name, tuple(shape), chunk, n_chunks))
        chunk += n_chunks
    if chunk * k // LANES > _MASK:
        raise InputError(
            "the sketched parameters exceed 2^38 coordinates, the map's limit", "sketch fewer with `--parameters`"
        )
    return placed
