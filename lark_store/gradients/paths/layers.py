"""Rules: per-sample parameter gradients from a layer's input and output gradient.

A *rule* supports one kind of layer: linear and Conv1D (products), embeddings (rows), layer and RMS norms (scales),
routers and experts of a mixture. Each has an entry in `RULES`. `rule_for` returns None for unsupported layers; nothing
is guessed.

Shape letters: B samples, T tokens, I and O inputs and outputs of a layer, H the model's width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lark_store.gradients.paths.experts import experts_rule
from lark_store.gradients.paths.products import add_products, add_sums
from lark_store.gradients.paths.taps import Capture, OnLinear, output_tap, projection_tap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.gradients.paths.taps import Names, Rule
    from lark_store.gradients.sketch.accumulate import GradientSketcher

# Raised by layers that do not accept a trial input.
_REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)


def rule_for(layer: nn.Module) -> Rule | None:
    """Return the rule for a layer, None if unsupported."""
    return next((rule for matches in RULES if (rule := matches(layer)) is not None), None)


# --- linear layers -------------------------------------------------------------------------------------------------


def _linear_rule(layer: nn.Module) -> Rule | None:
    return output_tap(_linear) if type(layer).forward is nn.Linear.forward else None


def _conv1d_rule(layer: nn.Module) -> Rule | None:
    return output_tap(_conv1d) if type(layer).forward is Conv1D.forward else None


def _linear(capture: Capture, names: Names, sketcher: GradientSketcher, out: torch.Tensor) -> None:
    if "weight" in names:
        add_products(names["weight"], capture.deltas, capture.inputs, sketcher, out)
    if "bias" in names:
        add_sums(names["bias"], capture.deltas, sketcher, out)


def _conv1d(capture: Capture, names: Names, sketcher: GradientSketcher, out: torch.Tensor) -> None:
    """Conv1D stores its weight transposed, (I, O)."""
    if "weight" in names:
        add_products(names["weight"], capture.inputs, capture.deltas, sketcher, out)
    if "bias" in names:
        add_sums(names["bias"], capture.deltas, sketcher, out)


# --- embeddings ----------------------------------------------------------------------------------------------------


def _embedding_rule(layer: nn.Module) -> Rule | None:
    """Return the rule for a table's rows, possibly times a constant (Gemma)."""
    if not isinstance(layer, nn.Embedding):
        return None
    if layer.sparse or layer.scale_grad_by_freq or layer.max_norm is not None:
        return None
    factor = 1.0 if type(layer).forward is nn.Embedding.forward else _factor(layer)
    if factor is None:
        return None

    def add(capture: Capture, names: Names, sketcher: GradientSketcher, out: torch.Tensor) -> None:
        for s, (index_T, delta_TH) in enumerate(zip(capture.inputs, capture.deltas, strict=True)):
            kept_TH = delta_TH.float() * factor
            if layer.padding_idx is not None:
                kept_TH = kept_TH.masked_fill((index_T == layer.padding_idx)[:, None], 0)  # like torch
            kept_TH = sketcher.corrector.rows(names["weight"], index_T, kept_TH)
            sketcher.add_rows(names["weight"], index_T, kept_TH, out, s)

    return output_tap(add)


@torch.no_grad()
def _factor(layer: nn.Embedding) -> float | None:
    """Return the factor on a table's rows, None if the layer does anything else."""
    index = torch.arange(min(8, layer.num_embeddings), device=layer.weight.device)
    try:
        rows, outputs = layer.weight[index].double(), layer(index).double()
    except _REFUSALS:
        return None
    if outputs.shape != rows.shape or not rows.any():
        return None
    factor = float((rows * outputs).sum() / (rows * rows).sum())
    return factor if torch.allclose(outputs, factor * rows, rtol=1e-2) else None


# --- norms ---------------------------------------------------------------------------------------------------------


def _scale_rule(layer: nn.Module) -> Rule | None:
    return output_tap(_scale) if _scales_its_input(layer) else None


def _scale(capture: Capture, names: Names, sketcher: GradientSketcher, out: torch.Tensor) -> None:
    for name, sums_BH in _scale_gradients(capture, names).items():
        sketcher.add(names[name], sketcher.corrector.vector(names[name], sums_BH), out)


def _scale_gradients(capture: Capture, names: Sequence[str] | Names) -> dict[str, torch.Tensor]:
    """Return the gradients, (B, H), of a layer weight · n(input) + bias; n is measured by calling the layer."""
    gradients = {}
    if "weight" in names:
        sums = []
        for inputs, delta in zip(capture.inputs, capture.deltas, strict=True):
            sums.append((_normed(capture.layer, inputs).float() * delta.float()).flatten(0, -2).sum(dim=0))
        gradients["weight"] = torch.stack(sums)
    if "bias" in names:
        gradients["bias"] = torch.stack([delta.float().flatten(0, -2).sum(dim=0) for delta in capture.deltas])
    return gradients


@torch.no_grad()
def _normed(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return n(input): the layer with weight 1 minus the layer with weight 0, which removes bias and offset."""
    scaled, offset = (
        torch.func.functional_call(layer, {"weight": torch.full_like(layer.weight, value)}, (inputs,))  # type: ignore[arg-type]
        for value in (1, 0)
    )
    difference: torch.Tensor = scaled - offset
    return difference


def _scales_its_input(layer: nn.Module) -> bool:
    """Test a layer with a 1-dimensional `weight` and maybe a `bias`: the rule must agree with autograd."""
    own_parameters = dict(layer.named_parameters(recurse=False))
    weight = own_parameters.get("weight")
    if not {"weight"} <= own_parameters.keys() <= {"weight", "bias"} or weight is None or weight.dim() != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    inputs, delta = (torch.randn(3, len(weight), generator=generator).to(weight) for _ in range(2))
    free = {name: p.detach().clone().requires_grad_(True) for name, p in own_parameters.items()}
    try:
        with torch.enable_grad():
            outputs = torch.func.functional_call(layer, free, (inputs,))
            expected = torch.autograd.grad(outputs, list(free.values()), delta)
        gradients = _scale_gradients(Capture(layer, [inputs], [delta]), list(free))
    except _REFUSALS:
        return False
    tolerance = 1e-4 if weight.dtype == torch.float32 else 5e-2
    return all(
        torch.allclose(gradients[name][0], gradient.float(), rtol=tolerance, atol=tolerance)
        for name, gradient in zip(free, expected, strict=True)
    )


# --- routers -------------------------------------------------------------------------------------------------------


def _projection_rule(layer: nn.Module) -> Rule | None:
    """Return the rule for a layer that multiplies by its weight once, such as a mixture's router."""
    return projection_tap(_linear) if _multiplies_once(layer) else None


def _multiplies_once(layer: nn.Module) -> bool:
    """Test a layer with a 2-dimensional `weight` and maybe a `bias`: the rule must agree with autograd."""
    parameters = dict(layer.named_parameters())
    weight = parameters.get("weight")
    if not {"weight"} <= parameters.keys() <= {"weight", "bias"} or weight is None or weight.dim() != 2:
        return False
    inputs = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    free = {name: p.detach().clone().requires_grad_(True) for name, p in parameters.items()}
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        calls.append((y, x))
        return y

    try:
        with torch.enable_grad(), OnLinear(weight.shape, record):
            outputs = torch.func.functional_call(layer, free, (inputs,))
        ((product, x),) = calls
        if x.shape != inputs.shape:
            return False
        expected = torch.autograd.grad(_mixed(outputs), [product, *free.values()])
    except _REFUSALS:
        return False
    delta, gradients = expected[0].float(), dict(zip(free, expected[1:], strict=True))
    actual = {"weight": delta.T @ x.float(), "bias": delta.sum(dim=0)}
    return all(_agrees(actual[name], gradients[name]) for name in free)


def _mixed(outputs: object) -> torch.Tensor:
    """Return a sum of all outputs with a gradient, each number with its own weight."""
    given = outputs if isinstance(outputs, tuple) else (outputs,)
    kept = [y.flatten().float() for y in given if isinstance(y, torch.Tensor) and y.requires_grad]
    return torch.stack([y @ torch.linspace(1, 2, len(y)).to(y) for y in kept]).sum()


def _agrees(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


RULES: tuple[Callable[[nn.Module], Rule | None], ...] = (
    _linear_rule,
    _conv1d_rule,
    _embedding_rule,
    _scale_rule,
    _projection_rule,
    experts_rule,
)
