"""Measured influence: train a module on one sample alone, and measure each query's loss before and after.

    EIF(z → x) = loss of x before − loss of x after training on z        (empirical influence function)

Above 0, training on z helps x. With one step of `sgd` and a small learning rate η, EIF / η is the dot product of the
two loss gradients. Works with any torch module. The module stays in evaluation mode: no dropout, and batch norms use
their stored statistics.

Shape letters: N samples, Q queries.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

S = TypeVar("S")
OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adamw": partial(torch.optim.AdamW, weight_decay=0.0),
}


class SavedTensors:
    """A copy of tensors, to restore them in place, bit for bit. Doubles their memory."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._pairs = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the tensors."""
        for tensor, saved in self._pairs:
            tensor.copy_(saved)


class SingleSampleTrainer(Generic[S]):
    """Trains a module on single samples, each time from the same start.

    `loss` takes the module and a list of samples, and returns the loss of each. Trains the parameters with
    `requires_grad`; `optimizer` is a key of `OPTIMIZERS` with a new state for each sample.

    Raises
    ------
    InputError
        An unknown optimizer, a learning rate that isn't a positive number, less than one step, or no parameter to
        train.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        loss: Callable[[Any, Sequence[S]], torch.Tensor],
        *,
        optimizer: str = "sgd",
        learning_rate: float,
        steps: int = 1,
    ) -> None:
        check_training(optimizer, learning_rate, steps)
        self._module, self._loss, self._steps = module, loss, steps
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        if not self._parameters:
            raise InputError("the module has no parameter to train", "set `requires_grad` of some of its parameters")
        self._optimizer = partial(OPTIMIZERS[optimizer], self._parameters, lr=learning_rate)
        self._saved = SavedTensors([*self._parameters, *module.buffers()])

    @contextmanager
    def trained_on(self, sample: S) -> Iterator[None]:
        """Train on one sample for the time of a `with` block.

        Afterwards the parameters, their gradients, the buffers and the mode of each layer are as before.
        """
        gradients = [p.grad for p in self._parameters]
        training = [layer for layer in self._module.modules() if layer.training]
        try:
            self._module.eval()
            self._train(sample)
            yield
        finally:
            self._saved.restore()
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            for layer in training:
                layer.training = True

    @torch.enable_grad()
    def _train(self, sample: S) -> None:
        optimizer = self._optimizer()
        for _ in range(self._steps):
            optimizer.zero_grad(set_to_none=True)
            self._loss(self._module, [sample]).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def check_training(optimizer: str, learning_rate: float, steps: int) -> None:
    """Check the settings of a training.

    Raises
    ------
    InputError
    """
    if optimizer not in OPTIMIZERS:
        names = " and ".join(f"`{name}`" for name in OPTIMIZERS)
        raise InputError(f"unknown optimizer `{optimizer}`", f"the optimizers are {names}")
    if not 0 < learning_rate < inf:
        raise InputError(f"the learning rate {learning_rate} is not a positive number", "for example `1e-3`")
    if steps < 1:
        raise InputError(f"the number of steps must be at least 1, not {steps}", "the default is 1")


def measure_influence(
    module: torch.nn.Module,
    samples: Sequence[S],
    queries: Sequence[S],
    loss: Callable[[Any, Sequence[S]], torch.Tensor],
    *,
    learning_rate: float,
    optimizer: str = "sgd",
    steps: int = 1,
    batch_size: int = 64,
) -> NDArray[np.float64]:
    """Measure the influence of each sample on each query, (N, Q) float64, in units of the loss; > 0: it helps.

    Trains the module's parameters with `requires_grad` on one sample alone, for `steps` steps of `optimizer` (`sgd`,
    or `adamw` without weight decay), takes each query's loss before less its loss after, and restores the module.
    `loss` takes the module and a list of at most `batch_size` samples, and returns the loss of each, (B,).

    Raises
    ------
    InputError
        A setting is invalid, the module has no parameter to train, or a query's loss is not finite.

    Examples
    --------
    A model y = w x with squared error: w = 0, so z = (1, 1) has the gradient −2, and x = (2, 2) the gradient −8.

    >>> module = torch.nn.Linear(1, 1, bias=False).double()
    >>> _ = torch.nn.init.zeros_(module.weight)
    >>> def loss(module, pairs):
    ...     x, y = torch.tensor(pairs, dtype=torch.float64).T
    ...     return (module(x[:, None])[:, 0] - y) ** 2
    >>> (measure_influence(module, [(1, 1)], [(2, 2)], loss, learning_rate=1e-6) / 1e-6).round(3).tolist()
    [[16.0]]
    """
    trainer = SingleSampleTrainer(module, loss, optimizer=optimizer, learning_rate=learning_rate, steps=steps)
    before_Q = _losses(module, queries, loss, batch_size)
    influence_NQ = np.empty((len(samples), len(queries)))
    for i, sample in enumerate(samples):
        with trainer.trained_on(sample):
            influence_NQ[i] = before_Q - _losses(module, queries, loss, batch_size)
        check_finite(influence_NQ[i], f"sample {i}")
    return influence_NQ


@torch.no_grad()
def _losses(
    module: torch.nn.Module, queries: Sequence[S], loss: Callable[[Any, Sequence[S]], torch.Tensor], size: int
) -> NDArray[np.float64]:
    """Return the loss of each query in evaluation mode, (Q,)."""
    training = [layer for layer in module.modules() if layer.training]
    try:
        module.eval()
        parts = [loss(module, queries[i : i + size]).double().cpu() for i in range(0, len(queries), size)]
    finally:
        for layer in training:
            layer.training = True
    return torch.cat(parts).numpy() if parts else np.empty(0)


def check_finite(values: NDArray[np.float64], sample: str) -> None:
    """Check the queries' losses after a training on a sample.

    Raises
    ------
    InputError
        One is not finite.
    """
    if not np.isfinite(values).all():
        raise InputError(f"a query's loss is not finite after training on {sample}", "lower the learning rate")
