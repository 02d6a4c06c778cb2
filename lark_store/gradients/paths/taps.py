"""Taps: during backward, a layer's input and output gradient reach the layer's rule.

`output_tap` taps a layer's output. `projection_tap` taps the one matrix product inside a layer, such as a router, whose
outputs are computed from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from lark_store.gradients.sketch.accumulate import GradientSketcher

    Names = dict[str, str]  # a layer's parameter name -> its name in the model
    Add = Callable[[Names, GradientSketcher, torch.Tensor], None]  # adds a batch's gradients to its sketches
    OnGradient = Callable[[torch.Tensor, torch.Tensor], None]
    Remove = Callable[[], None]
    Rule = Callable[[nn.Module, "Port"], Remove]  # attaches a layer to a path


class UnknownLayerError(Exception):
    """The batched path doesn't support this model; the message is the reason."""


@dataclass(frozen=True)
class Capture:
    """One call of a layer: input and output gradient per sample, without padding.

    `inputs` are (…, I), or (T,) tokens; `deltas` (…, O) are gradients of each sample's own loss.
    """

    layer: nn.Module
    inputs: Sequence[torch.Tensor]
    deltas: Sequence[torch.Tensor]


class Port(Protocol):
    """A layer's connection to its path."""

    name: str
    by_product: bool  # the correction needs whole products

    @property
    def anchor(self) -> torch.Tensor:
        """A scalar with a gradient: what depends on it is reached by backward."""
        ...

    def is_active(self) -> bool:
        """Tell whether gradients of a batch are being taken."""
        ...

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Split values per token into samples, without padding and masked positions.

        Raises
        ------
        UnknownLayerError
            The positions of the tokens are unknown.
        """
        ...

    def take(self, add: Add) -> None:
        """Add the layer's gradients to the batch's sketches."""
        ...


class Tap(torch.autograd.Function):
    """Identity on a layer's output; backward passes the layer's input and output gradient to a callback."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, _anchor: torch.Tensor, take: OnGradient) -> torch.Tensor:
        """Return y. The anchor requires a gradient, so backward always runs."""
        ctx.save_for_backward(x)
        ctx.take = take
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, delta: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        """Pass x and the gradient of y to the callback."""
        ctx.take(ctx.saved_tensors[0], delta)
        return (delta if ctx.needs_input_grad[0] else None), None, None, None


def tap(y: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, take: OnGradient) -> torch.Tensor:
    """Tap a layer's output y, computed from x."""
    start = y.detach() if y.is_leaf else y  # a leaf where transformers enabled gradients
    tapped: torch.Tensor = Tap.apply(start, x.detach(), anchor, take)  # type: ignore[no-untyped-call]
    return tapped


def output_tap(add: Callable[[Capture, Names, GradientSketcher, torch.Tensor], None]) -> Rule:
    """Return the rule of layers with one input and one output, whose captures `add` adds."""

    def attach(layer: nn.Module, port: Port) -> Remove:
        def on_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
            if not port.is_active():
                return None
            inputs = [*args, *kwargs.values()]
            if len(inputs) != 1 or not isinstance(y, torch.Tensor):
                raise UnknownLayerError(f"layer `{port.name}` takes {len(inputs)} inputs")
            return tap(y, inputs[0], port.anchor, _taker(layer, port, add))

        return layer.register_forward_hook(on_forward, with_kwargs=True).remove

    return attach


def _taker(
    layer: nn.Module, port: Port, add: Callable[[Capture, Names, GradientSketcher, torch.Tensor], None]
) -> OnGradient:
    def take(x: torch.Tensor, delta: torch.Tensor) -> None:
        port.take(partial(add, Capture(layer, port.split(x), port.split(delta))))

    return take


# --- inside a layer ------------------------------------------------------------------------------------------------


def replace_forward(layer: nn.Module, port: Port, forward: Callable[..., Any]) -> Remove:
    """Call `forward(original, *args, **kwargs)` in place of a layer's own forward while gradients are taken."""
    original, attached = layer.forward, [True]

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if attached and port.is_active():
            return forward(original, *args, **kwargs)
        return original(*args, **kwargs)

    def remove() -> None:
        attached.clear()
        if vars(layer).get("forward") is replaced:  # else another path has replaced it since
            del layer.forward

    layer.forward = replaced
    return remove


class OnLinear(TorchFunctionMode):
    """Passes the output of each `functional.linear` with a weight of this shape, and its input, to a function."""

    def __init__(self, shape: torch.Size, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.shape, self.change, self.n_calls = shape, change, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run any torch function."""
        y = func(*args, **(kwargs or {}))
        if func is not functional.linear or args[1].shape != self.shape:
            return y
        self.n_calls += 1
        return self.change(y, args[0])


def projection_tap(add: Callable[[Capture, Names, GradientSketcher, torch.Tensor], None]) -> Rule:
    """Return the rule of layers with one `functional.linear` inside, whose captures `add` adds."""

    def attach(layer: nn.Module, port: Port) -> Remove:
        take = _taker(layer, port, add)

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with OnLinear(layer.weight.shape, lambda y, x: tap(y, x, port.anchor, take)) as taps:  # type: ignore[arg-type]
                outputs = original(*args, **kwargs)
            if taps.n_calls != 1:
                raise UnknownLayerError(f"layer `{port.name}` multiplies {taps.n_calls} times by its weight")
            return outputs

        return replace_forward(layer, port, forward)

    return attach
