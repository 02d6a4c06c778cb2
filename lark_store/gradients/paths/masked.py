"""Masked sketching, one sample at a time: template positions contribute no gradient.

Supports any model whose layers keep token positions separate. A parameter's gradient is a sum over positions. To mask
some, each layer with sketched parameters runs twice. The first run has frozen parameters and passes gradients on
unchanged. The second has a detached input, and its output gradient is zero at masked positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from lark_store.gradients.paths.hooks import HookPath

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.gradients.paths.hooks import NamedParameters
    from lark_store.modeling.losses import Batch


class MaskedHookPath(HookPath):
    """Sketches one sample at a time, at content positions only."""

    def _watch(self, parameters: NamedParameters) -> None:
        self._batch: Batch | None = None
        self._again = False  # inside a layer's second run
        leaves: dict[int, torch.Tensor] = {}
        for name, parameter in parameters:
            leaf = parameter.detach().requires_grad_(True)  # the same memory
            leaf.register_post_accumulate_grad_hook(self._sink(name))  # type: ignore[no-untyped-call]
            leaves[id(parameter)] = leaf
        for path, layer in self.model.named_modules():
            layer_leaves = {
                name: leaves[id(parameter)]
                for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False)
                if id(parameter) in leaves
            }
            if layer_leaves:
                self._hooks.append(layer.register_forward_hook(self._split(path, layer_leaves), with_kwargs=True))

    def _split(self, path: str, leaves: dict[str, torch.Tensor]) -> Callable[..., Any]:
        def on_forward(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
            if self._batch is None or self._again or not torch.is_grad_enabled():
                return None
            batch = self._batch
            args, kwargs = _pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
            originals, self._again = dict(layer._parameters), True  # noqa: SLF001 - a tensor is no Parameter
            layer._parameters.update(leaves)  # type: ignore[arg-type]  # noqa: SLF001
            try:
                second = layer.forward(*args, **kwargs)
            finally:
                layer._parameters.update(originals)  # noqa: SLF001
                self._again = False
            return _pytree.tree_map(lambda first, second_part: _joined(path, first, second_part, batch), y, second)

        return on_forward

    def _backward(self, batch: Batch) -> float:
        self._batch = batch
        try:
            return super()._backward(batch)
        finally:
            self._batch = None


def _joined(path: str, first: Any, second: Any, batch: Batch) -> Any:
    """Join both runs' outputs: the first run's value, with gradients to the second at content positions."""
    if not (isinstance(second, torch.Tensor) and second.requires_grad):
        return first  # such as expert indices
    return first + torch.where(_mask(path, second, batch), second - second.detach(), 0)


def _mask(path: str, y: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the content mask of a layer's output, broadcastable to its shape."""
    shape, few = tuple(y.shape), y.dim() <= 3  # with 4 dimensions, the second may be heads
    rows = batch.content[0]
    if few and shape[:2] == (1, batch.n_targets[0]):
        dim, rows = 1, batch.content_targets[0]
    elif few and shape[:2] == (1, batch.width):
        dim = 1
    elif few and shape[0] == batch.width:
        dim = 0
    elif y.dim() == 4 and (shape[1] == batch.width) != (shape[2] == batch.width):
        dim = 1 if shape[1] == batch.width else 2
    else:
        raise RuntimeError(f"layer `{path}` gives {shape}, with unknown token positions")
    mask = torch.zeros(shape[dim], dtype=torch.bool, device=y.device)
    mask[rows] = True
    return mask.view([-1 if d == dim else 1 for d in range(y.dim())])
