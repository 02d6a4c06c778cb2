"""One sample at a time, without what the template's positions say: right for any model whose layers keep tokens apart.

A parameter's gradient is a sum over positions. To leave some out, each layer that holds a parameter to sketch is run
twice: once as it is, with its parameters fixed, so that what goes back through it is unchanged; and once on a detached
input, where the output gradient at the masked positions is set to zero on its way to the parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from lark_store.ingest.gradients import HookPath

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.ingest.gradients import Chosen
    from lark_store.ingest.losses import Batch


class MaskedHookPath(HookPath):
    """Sketches one sample at a time, at the positions of its content."""

    def _watch(self, chosen: Chosen) -> None:
        self._batch: Batch | None = None
        self._again = False  # within the second run of a layer
        leaves: dict[int, torch.Tensor] = {}
        for name, parameter in chosen:
            leaf = parameter.detach().requires_grad_(True)  # the same memory
            leaf.register_post_accumulate_grad_hook(self._sink(name))  # type: ignore[no-untyped-call]
            leaves[id(parameter)] = leaf
        for path, layer in self.model.named_modules():
            own = {
                name: leaves[id(parameter)]
                for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False)
                if id(parameter) in leaves
            }
            if own:
                self._hooks.append(layer.register_forward_hook(self._split(path, own), with_kwargs=True))

    def _split(self, path: str, own: dict[str, torch.Tensor]) -> Callable[..., Any]:
        def on_forward(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
            if self._batch is None or self._again or not torch.is_grad_enabled():
                return None
            batch = self._batch
            args, kwargs = _pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
            held, self._again = dict(layer._parameters), True  # noqa: SLF001 - a tensor is no Parameter
            layer._parameters.update(own)  # type: ignore[arg-type]  # noqa: SLF001
            try:
                mine = layer.forward(*args, **kwargs)
            finally:
                layer._parameters.update(held)  # noqa: SLF001
                self._again = False
            return _pytree.tree_map(lambda whole, part: _joined(path, whole, part, batch), y, mine)

        return on_forward

    def _backward(self, batch: Batch) -> float:
        self._batch = batch
        try:
            return super()._backward(batch)
        finally:
            self._batch = None


def _joined(path: str, whole: Any, part: Any, batch: Batch) -> Any:
    """Return an output of the first run that also leads to the second, where it is content."""
    if not (isinstance(part, torch.Tensor) and part.requires_grad):
        return whole  # indices of experts, for example
    return whole + torch.where(_mask(path, part, batch), part - part.detach(), 0)


def _mask(path: str, y: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return which positions of a layer's output are content, in a shape that is broadcast to it."""
    shape, few = tuple(y.shape), y.dim() <= 3  # of 4 dimensions the second may be heads
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
        raise RuntimeError(f"layer `{path}` gives {shape}, whose positions can't be told")
    mask = torch.zeros(shape[dim], dtype=torch.bool, device=y.device)
    mask[rows] = True
    return mask.view([-1 if d == dim else 1 for d in range(y.dim())])
