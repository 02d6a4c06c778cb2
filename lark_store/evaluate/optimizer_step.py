"""One real optimizer step from a checkpoint and back, and its effect on the queries' losses.

    sgd    θ ← θ − η g
    adam   θ ← θ − η g / (√(β₂ V + (1 − β₂) g²) + ε), β₂ = 0.999, ε = 1e-8

g is the gradient of the samples' mean loss. `adam` is a step of AdamW without decay in the middle of a training: V is
the mean squared gradient over samples of the training, updated with the step's gradient; the first moment is the
gradient alone. Shape letters: Q queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lark_store.errors import InputError
from lark_store.evaluate.retrain import Start
from lark_store.modeling.losses import Batch, losses, sample_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.modeling.tokens import Tokens

BETA_2, EPSILON = 0.999, 1e-8
Gradient = list[torch.Tensor]  # in the order of the trained parameters


class Stepper:
    """Makes steps from a model's current parameters and restores them after each.

    `moments` is V from `second_moments`, None for plain gradient descent. Holds a second copy of the parameters.
    """

    def __init__(self, model: Any, rate: float, moments: Gradient | None = None) -> None:
        if not rate > 0:
            raise InputError(f"the learning rate {rate} is not a positive number", "for example `2e-5`")
        self.start = Start(model)
        self.rate, self.moments = rate, moments

    def effect(self, samples: Sequence[Tokens], queries: Sequence[Tokens], before_Q: torch.Tensor) -> torch.Tensor:
        """Return the drop of each query's loss after a step on samples, (Q,) float64, in nats per target token.

        `before_Q` are the losses before the step.
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
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        start.model.requires_grad_(False)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]


def second_moments(start: Start, samples: Sequence[Tokens], on_sample: Callable[[int], None]) -> Gradient:
    """Return the mean over samples of their squared gradients; `on_sample` receives the number of samples done."""
    moments = [torch.zeros_like(p) for _, p in start.chosen]
    for n, sample in enumerate(samples):
        for moment, g in zip(moments, gradient(start, [sample]), strict=True):
            moment.addcmul_(g, g, value=1 / len(samples))
        on_sample(n + 1)
    return moments
