"""Training runs for ground truths: repeatedly from one start, on the sketched loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lark_store.gradients.measured_influence import SavedTensors
from lark_store.gradients.paths.hooks import choose_parameters
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
        self.restore = SavedTensors(p for _, p in self.chosen).restore


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
