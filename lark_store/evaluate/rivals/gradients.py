"""Whole gradients of one model, a few at a time: a model of 135M parameters has gradients of 0.5 GB.

Shape letters: Q queries, N samples, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lark_store.errors import NameUnknownError
from lark_store.ingest.losses import Batch, sample_losses
from lark_store.ingest.sketchers import chosen_of
from lark_store.schema.catalog import Sketcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lark_store.evaluate.material import Loaded
    from lark_store.evaluate.rivals.given import Given, Matrix
    from lark_store.ingest.gradients import Chosen
    from lark_store.ingest.variants import Tokens
    from lark_store.store import Store

    Function = Callable[[Any, Batch], torch.Tensor]

HELD = 4 << 30  # bytes of whole gradients and their like that are held at a time; one query is always taken


def mean_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Return the one sample's mean loss, in nats per target token."""
    return sample_losses(model, batch)[0]


@dataclass(frozen=True)
class Parameters:
    """A model and which of its parameters count; a vector of them is flat, (P,), in their order."""

    model: Any
    chosen: Chosen

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.chosen[0][1].device

    @cached_property
    def size(self) -> int:
        """P."""
        return sum(p.numel() for _, p in self.chosen)

    def split(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parts of flat vectors (…, P) by parameter, (…, *shape) each; nothing is copied."""
        parts = torch.split(flat, [p.numel() for _, p in self.chosen], dim=-1)
        return {name: part.view(*part.shape[:-1], *p.shape) for (name, p), part in zip(self.chosen, parts, strict=True)}

    def parts(self, sample: Tokens, of: Function = mean_loss) -> list[torch.Tensor]:
        """Return the gradient of a function of one sample, parameter by parameter; no dropout."""
        parameters = [p for _, p in self.chosen]
        for p in parameters:
            p.requires_grad_(True)
        try:
            found = torch.autograd.grad(of(self.model, Batch([sample], self.device)), parameters, allow_unused=True)
        finally:
            self.model.requires_grad_(False)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    def gradient(self, sample: Tokens) -> torch.Tensor:
        """Return the gradient of a sample's mean loss, (P,) float32."""
        return torch.cat([g.flatten().float() for g in self.parts(sample)])

    def gradients(self, samples: Sequence[Tokens]) -> torch.Tensor:
        """Return the gradients of some samples' mean losses, (N, P)."""
        return torch.stack([self.gradient(sample) for sample in samples])

    def blocks(self, samples: Sequence[Tokens], vectors: int) -> Iterator[slice]:
        """Cut samples into blocks for each of which `vectors` vectors (P,) a sample can be held."""
        size = max(1, HELD // (4 * self.size * vectors))
        for start in range(0, len(samples), size):
            yield slice(start, min(start + size, len(samples)))


def parameters_of(store: Store, loaded: Loaded, sketcher: str | None) -> Parameters:
    """Return a model's parameters: those that a sketcher takes; without one all, or the adapters' own.

    Raises
    ------
    NameUnknownError
    """
    asked = Sketcher(parameters=None, exclude=None, min_ndim=None, correction="none")
    if sketcher is not None:
        found = store.sql(
            "select name, parameters, exclude, min_ndim, correction from sketchers where name = ?", [sketcher]
        )
        if found.is_empty():
            known = store.sql("select name from sketchers")["name"]
            raise NameUnknownError.of("sketcher", sketcher, known, "add it with `lark-store sketcher add`")
        asked = Sketcher(**found.row(0, named=True))
    return Parameters(loaded.model, chosen_of(asked, loaded.model))


def influence(
    held: Parameters,
    both: tuple[Sequence[Tokens], Sequence[Tokens]],
    solve: Callable[[torch.Tensor], torch.Tensor],
    vectors: int,
    given: Given,
) -> Matrix:
    """Return g_qᵀ A g_z for queries and samples, (Q, N); `solve` takes g_q (Q', P) to A g_q, some queries at a time.

    `vectors` is how many vectors (P,) it holds for each query, its own included.
    """
    queries, samples = both
    made = np.empty((len(queries), len(samples)), np.float32)
    for block in held.blocks(queries, vectors):
        solved_QP = solve(held.gradients(queries[block]))
        for i, sample in enumerate(samples):
            made[block, i] = (solved_QP @ held.gradient(sample)).float().cpu().numpy()
            done = block.start * len(samples) + (i + 1) * (block.stop - block.start)
            given.say("scores", done, math.prod(made.shape))
    return made
