"""One real optimizer step from a checkpoint, and back: what it does to the queries' losses.

    sgd    θ ← θ − η g
    adam   θ ← θ − η g / (√(β₂ V + (1 − β₂) g²) + ε), β₂ = 0.999, ε = 1e-8

g is the gradient of the mean loss of some samples. `adam` is a step of AdamW without decay in the middle of a training:
V is the mean squared gradient over samples of that training, moved on by the step's own gradient; the first moment is
the gradient alone. Shape letters: Q queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lark_store.errors import InputError
from lark_store.evaluate.training import Start, losses
from lark_store.ingest.losses import Batch, sample_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.ingest.variants import Tokens

BETA_2, EPSILON = 0.999, 1e-8
OPTIMIZERS = ("adam", "sgd")
Gradient = list[torch.Tensor]  # in the order of the parameters trained


class Stepper:
    """Makes steps from a model as it is now, which it is again after each.

    `moments` is V, as `second_moments` returns it; None: plain gradient descent. Takes the parameters' memory again.
    """

    def __init__(self, model: Any, rate: float, moments: Gradient | None = None) -> None:
        if not rate > 0:
            raise InputError(f"a learning rate of {rate} makes no step", "such as 2e-5")
        self.start = Start(model)
        self.rate, self.moments = rate, moments

    def effect(self, samples: Sequence[Tokens], queries: Sequence[Tokens], before_Q: torch.Tensor) -> torch.Tensor:
        """Return how much a step on samples lowers each query's loss, (Q,) float64, in nats per target token.

        `before_Q` are the queries' losses before it.
        """
        try:
            self._step(gradient(self.start, samples))
            return before_Q - losses(self.start.model, queries)
        finally:
            self.start.restore()

    @torch.no_grad()
    def _step(self, grads: Gradient) -> None:
        for i, (_, p) in enumerate(self.start.chosen):
            if self.moments is None:
                p.sub_(grads[i], alpha=self.rate)
                continue
            second = (self.moments[i] * BETA_2).addcmul_(grads[i], grads[i], value=1 - BETA_2)
            p.sub_(grads[i] / second.sqrt_().add_(EPSILON), alpha=self.rate)


def gradient(start: Start, samples: Sequence[Tokens]) -> Gradient:
    """Return the gradient of the samples' mean loss, in the order of `start.chosen`; no dropout."""
    parameters = [p for _, p in start.chosen]
    for p in parameters:
        p.requires_grad_(True)
    try:
        loss = sample_losses(start.model, Batch(samples, start.model.device)).mean()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        start.model.requires_grad_(False)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def second_moments(start: Start, samples: Sequence[Tokens], on_sample: Callable[[int], None]) -> Gradient:
    """Return the mean over samples of their own squared gradients. `on_sample` is told how many are done."""
    made = [torch.zeros_like(p) for _, p in start.chosen]
    for n, sample in enumerate(samples):
        for held, g in zip(made, gradient(start, [sample]), strict=True):
            held.addcmul_(g, g, value=1 / len(samples))
        on_sample(n + 1)
    return made
