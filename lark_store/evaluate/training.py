"""Training for the sake of a truth: from one start again and again, on the loss that is sketched.

Shape letters: Q queries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lark_store.errors import InputError
from lark_store.ingest.batches import batches, budget
from lark_store.ingest.gradients import choose_parameters
from lark_store.ingest.losses import Batch, sample_losses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.ingest.variants import Tokens


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW (β 0.9 and 0.999, ε 1e-8), one learning rate, all parameters or, of LoRA, the adapters'."""

    epochs: int = 1
    learning_rate: float = 1e-4
    batch_size: int = 4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.learning_rate > 0 or not self.max_grad_norm > 0:
            raise InputError(
                f"nothing can be trained by {asdict(self)}",
                "epochs and batch size are 1 or more, the learning rate and the gradients' largest norm above 0",
            )


class Start:
    """A model's parameters as they were, to go back to. Takes their memory once more."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.requires_grad_(False)
        self.chosen = choose_parameters(model, None, None)
        self._kept = [p.detach().clone() for _, p in self.chosen]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back."""
        for (_, p), kept in zip(self.chosen, self._kept, strict=True):
            p.copy_(kept)


def train(start: Start, samples: Sequence[Tokens], recipe: Recipe, seed: list[int]) -> None:
    """Train from the start on the samples; `seed` decides their order and the dropout."""
    start.restore()
    parameters = [p for _, p in start.chosen]
    rng = np.random.default_rng(seed)
    torch.manual_seed(int(rng.integers(1 << 31)))
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)
    for p in parameters:
        p.requires_grad_(True)
    start.model.train()
    for _ in range(recipe.epochs):
        order = rng.permutation(len(samples))
        for first in range(0, len(order), recipe.batch_size):
            some = [samples[i] for i in order[first : first + recipe.batch_size]]
            sample_losses(start.model, Batch(some, start.model.device)).mean().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    start.model.eval()
    start.model.requires_grad_(False)


@torch.no_grad()
def losses(model: Any, samples: Sequence[Tokens]) -> torch.Tensor:
    """Return each sample's mean loss in nats per target token, (Q,) float64 on the CPU; no dropout."""
    size = budget(None, model.device.type, None)
    found = torch.zeros(len(samples), dtype=torch.float64)
    numbered = batches(list(enumerate(samples)), lambda pair: len(pair[1].input_ids), lambda: size)
    for some in numbered:
        made = sample_losses(model, Batch([sample for _, sample in some], model.device))
        found[[i for i, _ in some]] = made.double().cpu()
    return found
