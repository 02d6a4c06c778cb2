"""Full gradients of one model, a few at a time: a gradient of 135M parameters takes 0.5 GB.

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
from lark_store.gradients.sketch.layout import parameters_of_row
from lark_store.modeling.losses import Batch, sample_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lark_store.evaluate.baselines.context import BaselineContext, Matrix
    from lark_store.evaluate.dataset import Loaded, Material
    from lark_store.gradients.paths.hooks import NamedParameters
    from lark_store.modeling.tokens import Tokens
    from lark_store.store import Store

    Function = Callable[[Any, Batch], torch.Tensor]

MEMORY_LIMIT = 4 << 30  # bytes of full gradients and similar vectors in memory; a block holds at least one query


def mean_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Return a single sample's mean loss, in nats per target token."""
    return sample_losses(model, batch)[0]


@dataclass(frozen=True)
class Parameters:
    """A model and its chosen parameters; vectors are flat, (P,), in their order."""

    model: Any
    chosen: NamedParameters

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.chosen[0][1].device

    @cached_property
    def size(self) -> int:
        """The number of coordinates, P."""
        return sum(p.numel() for _, p in self.chosen)

    def split(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return flat vectors (…, P) split by parameter, (…, *shape) each, as views."""
        parts = torch.split(flat, [p.numel() for _, p in self.chosen], dim=-1)
        return {name: part.view(*part.shape[:-1], *p.shape) for (name, p), part in zip(self.chosen, parts, strict=True)}

    def parts(self, sample: Tokens, function: Function = mean_loss) -> list[torch.Tensor]:
        """Return the gradient of a function of one sample, one tensor per parameter; no dropout."""
        parameters = [p for _, p in self.chosen]
        for p in parameters:
            p.requires_grad_(True)
        try:
            value = function(self.model, Batch([sample], self.device))
            grads = torch.autograd.grad(value, parameters, allow_unused=True)
        finally:
            self.model.requires_grad_(False)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]

    def gradient(self, sample: Tokens) -> torch.Tensor:
        """Return the gradient of a sample's mean loss, (P,) float32."""
        return torch.cat([g.flatten().float() for g in self.parts(sample)])

    def gradients(self, samples: Sequence[Tokens]) -> torch.Tensor:
        """Return the gradients of the samples' mean losses, (N, P)."""
        return torch.stack([self.gradient(sample) for sample in samples])

    def blocks(self, samples: Sequence[Tokens], vectors: int) -> Iterator[slice]:
        """Yield blocks of samples small enough to hold `vectors` vectors (P,) per sample."""
        size = max(1, MEMORY_LIMIT // (4 * self.size * vectors))
        for start in range(0, len(samples), size):
            yield slice(start, min(start + size, len(samples)))


def parameters_of(store: Store, loaded: Loaded, sketcher: str | None) -> Parameters:
    """Return a model's parameters: those of a sketcher; without one, all, or the adapters' parameters.

    Raises
    ------
    NameUnknownError
    """
    return Parameters(loaded.model, parameters_of_row(sketcher_of(store, sketcher), loaded.model))


def open_model(
    material: Material, context: BaselineContext, sketcher: str | None, correction: str | None = None
) -> tuple[Loaded, Parameters]:
    """Return the checkpoint's model and the chosen parameters, loaded once; the trials of an evaluation share them.

    `sketcher` restricts the parameters, and so does a `correction`, to those that it corrects.

    Raises
    ------
    InputError, NameUnknownError, CheckpointError, CheckpointChangedError
    """

    def opened() -> tuple[Loaded, Parameters]:
        loaded, row = context.loaded(material), sketcher_of(material.store, sketcher)
        row |= {"correction": correction} if correction else {}
        return loaded, Parameters(loaded.model, parameters_of_row(row, loaded.model))

    return context.preparation.once("model", opened)


def sketcher_of(store: Store, name: str | None) -> dict[str, Any]:
    """Return the selection of a sketcher of the store; without a name, one of all parameters.

    Raises
    ------
    NameUnknownError
    """
    if name is None:
        return {"parameters": None, "exclude": None, "min_ndim": None, "correction": "none"}
    found = store.sql("select name, parameters, exclude, min_ndim, correction from sketchers where name = ?", [name])
    if found.is_empty():
        known = store.sql("select name from sketchers")["name"]
        raise NameUnknownError.of("sketcher", name, known, "add it with `lark-store sketcher add`")
    return found.row(0, named=True)


def influence(
    parameters: Parameters,
    texts: tuple[Sequence[Tokens], Sequence[Tokens]],
    solve: Callable[[torch.Tensor], torch.Tensor],
    vectors: int,
    context: BaselineContext,
) -> Matrix:
    """Return g_qᵀ A g_z for queries and samples, (Q, N); `solve` maps g_q (Q', P) to A g_q, a block at a time.

    `vectors` is the number of vectors (P,) that `solve` holds per query, including g_q.
    """
    queries, samples = texts
    scores = np.empty((len(queries), len(samples)), np.float32)
    blocks = list(parameters.blocks(queries, vectors))
    for block in blocks:
        solved_QP = solve(parameters.gradients(queries[block]))
        for i, sample in enumerate(samples):
            with context.preparation.candidates(len(blocks)):
                gradient_P = parameters.gradient(sample)
            scores[block, i] = (solved_QP @ gradient_P).float().cpu().numpy()
            n_done = block.start * len(samples) + (i + 1) * (block.stop - block.start)
            context.say("scores", n_done, math.prod(scores.shape))
    return scores
