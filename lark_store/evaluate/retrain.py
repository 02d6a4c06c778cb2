"""Training runs for ground truths: repeatedly from one start, on the sketched loss.

Shape letters: Q queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lark_store.gradients.paths.hooks import choose_parameters
from lark_store.modeling.batching import batches, budget
from lark_store.modeling.losses import Batch, sample_losses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.modeling.tokens import Tokens
    from lark_store.specs import TrainingSpec


class Start:
    """A copy of a model's parameters to restore. Doubles their memory."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.requires_grad_(False)
        self.chosen = choose_parameters(model, None, None)
        self._saved = [p.detach().clone() for _, p in self.chosen]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the parameters."""
        for (_, p), saved in zip(self.chosen, self._saved, strict=True):
            p.copy_(saved)


def train(start: Start, samples: Sequence[Tokens], recipe: TrainingSpec, seed: list[int]) -> None:
    """Train on the samples from `start`; `seed` determines their order and the dropout."""
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
            batch = [samples[i] for i in order[first : first + recipe.batch_size]]
            sample_losses(start.model, Batch(batch, start.model.device)).mean().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    start.model.eval()
    start.model.requires_grad_(False)


@torch.no_grad()
def losses(model: Any, samples: Sequence[Tokens]) -> torch.Tensor:
    """Return each sample's mean loss in nats per target token, (Q,) float64 on the CPU; no dropout."""
    size = budget(None, model.device.type, None)
    loss_Q = torch.zeros(len(samples), dtype=torch.float64)
    numbered = batches(list(enumerate(samples)), lambda pair: len(pair[1].input_ids), lambda: size)
    for batch in numbered:
        values = sample_losses(model, Batch([sample for _, sample in batch], model.device))
        loss_Q[[i for i, _ in batch]] = values.double().cpu()
    return loss_Q
