"""The experts of a mixture: one backward pass over all of them, with each sample's weight gradients.

transformers keeps the experts of a layer as stacks, such as `gate_up_proj` (E, 2I, H) and `down_proj` (E, H, I). A
router assigns each token to some experts, so an expert sees tokens of several samples. While gradients are taken,
`_Mixture` replaces the layer's forward: the same function, with pairs of a token and its expert ordered by expert.
Tokens are numbered sample by sample, so the pairs of an expert are ordered by sample. Its backward computes the factors
of the weight gradients once, for both the input's gradient and the sketches. They take as much memory as one layer's
activations.

Shape letters: N tokens, C experts of a token, S = N · C pairs, E experts, B samples, H the model's width, I an
expert's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lark_store.gradients.paths.products import StackFactors, add_stack
from lark_store.gradients.paths.taps import UnknownLayerError, replace_forward

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from lark_store.gradients.paths.taps import Names, Port, Remove, Rule
    from lark_store.gradients.sketch.accumulate import GradientSketcher

_DOWN = "down_proj"

# Set by transformers on the experts that it runs with interchangeable implementations.
_TRAITS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


def experts_rule(layer: nn.Module) -> Rule | None:
    """Return the rule for stacked experts of transformers, None for other layers."""
    if not all(hasattr(layer, trait) for trait in _TRAITS) or getattr(layer, "has_post_expert_norm", False):
        return None
    weights = {_up(layer), _DOWN}
    expected = weights | {f"{name}_bias" for name in weights} if layer.has_bias else weights
    return _attach if {name for name, _ in layer.named_parameters()} == expected else None


def _up(layer: Any) -> str:
    return "gate_up_proj" if layer.has_gate else "up_proj"


def _attach(layer: Any, port: Port) -> Remove:
    if port.by_product:
        raise UnknownLayerError("the correction needs whole gradients of stacked experts")

    def forward(_: Callable[..., Any], *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        values = (*args, *kwargs.values())
        if len(values) != 3 or values[0].dim() != 2 or getattr(layer, "_is_expert_parallel", False):
            raise UnknownLayerError(f"experts `{port.name}` are called in an unknown way")
        hidden_NH, index_NC, weight_NC = values
        pairs = _Pairs(layer, index_NC)
        mixed: torch.Tensor = _Mixture.apply(hidden_NH, weight_NC, port.anchor, port, pairs)  # type: ignore[no-untyped-call]
        return mixed

    return replace_forward(layer, port, forward)


class _Pairs:
    """A layer's pairs of a token and its expert, ordered by expert, then by token."""

    def __init__(self, layer: Any, index_NC: torch.Tensor) -> None:
        self.layer, self.n_tokens, self.n_experts = layer, len(index_NC), len(layer.down_proj)
        self.expert_S, self.order_S = index_NC.flatten().sort(stable=True)
        self.token_S = self.order_S // index_NC.shape[1]
        self.counts: list[int] = torch.bincount(self.expert_S, minlength=self.n_experts).tolist()

    def multiply(self, name: str, values_S: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """Multiply each pair's values by its expert's matrix, from inputs to outputs, or `back` to inputs."""
        stack = getattr(self.layer, name)
        stack = stack if self.layer.is_transposed != back else stack.mT
        values_S = values_S.to(stack.dtype)  # as transformers does
        result = values_S.new_empty(len(values_S), stack.shape[2])
        start = 0
        for matrix, count in zip(stack, self.counts, strict=True):
            torch.mm(values_S[start : start + count], matrix, out=result[start : start + count])
            start += count
        if self.layer.has_bias and not back:
            result += getattr(self.layer, f"{name}_bias")[self.expert_S]
        return result

    def gate(self, raw_S: torch.Tensor) -> torch.Tensor:
        """Apply the experts' activation."""
        inner: torch.Tensor = self.layer._apply_gate(raw_S) if self.layer.has_gate else self.layer.act_fn(raw_S)  # noqa: SLF001
        return inner

    def by_token(self, values_S: torch.Tensor) -> torch.Tensor:
        """Return values in the order of the tokens, (N, C, …)."""
        result = torch.empty_like(values_S)
        result[self.order_S] = values_S
        return torch.unflatten(result, 0, (self.n_tokens, -1))


class _Mixture(torch.autograd.Function):
    """The experts' forward, and a backward that passes each weight's gradient factors to the sketches."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_NC: torch.Tensor, _anchor: torch.Tensor, port: Port, pairs: _Pairs
    ) -> torch.Tensor:
        """Return the experts' weighted sum, (N, H). The anchor requires a gradient, so backward always runs."""
        raw_S = pairs.multiply(_up(pairs.layer), hidden_NH[pairs.token_S])
        ctx.save_for_backward(hidden_NH, weight_NC, raw_S)
        ctx.port, ctx.pairs = port, pairs
        outputs_S = pairs.multiply(_DOWN, pairs.gate(raw_S))
        weight_S = weight_NC.flatten()[pairs.order_S]
        return pairs.by_token(outputs_S * weight_S[:, None]).sum(dim=1).to(hidden_NH.dtype)

    @staticmethod
    def backward(ctx: Any, delta_NH: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        """Take the weights' gradients; return those of the input and the routing weights."""
        hidden_NH, weight_NC, raw_S = ctx.saved_tensors
        pairs: _Pairs = ctx.pairs
        up, weight_S = _up(pairs.layer), weight_NC.flatten()[pairs.order_S, None]
        delta_S = delta_NH[pairs.token_S]
        with torch.enable_grad():
            raw_S = raw_S.detach().requires_grad_(True)
            inner_S = pairs.gate(raw_S)
        unweighted_S = pairs.multiply(_DOWN, delta_S, back=True)
        (delta_raw_S,) = torch.autograd.grad(inner_S, raw_S, (unweighted_S * weight_S).to(inner_S.dtype))
        inner_S = inner_S.detach()
        factors = {  # inputs and output gradients
            up: (hidden_NH[pairs.token_S].to(raw_S.dtype), delta_raw_S),
            _DOWN: (inner_S, (delta_S * weight_S).to(inner_S.dtype)),
        }
        ctx.port.take(partial(_add, pairs, ctx.port, factors))
        along_S = (unweighted_S * inner_S).sum(dim=-1)
        if pairs.layer.has_bias:
            along_S = along_S + (delta_S * pairs.layer.down_proj_bias[pairs.expert_S]).sum(dim=-1)
        weight_gradient = pairs.by_token(along_S.to(weight_NC.dtype)) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, weight_gradient, None, None, None
        return pairs.by_token(pairs.multiply(up, delta_raw_S, back=True)).sum(dim=1), weight_gradient, None, None, None


def _add(
    pairs: _Pairs,
    port: Port,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]],
    names: Names,
    sketcher: GradientSketcher,
    out: torch.Tensor,
) -> None:
    """Add the gradients of the stacks, from inputs and output gradients of each pair."""
    tokens = port.split(torch.arange(pairs.n_tokens, device=pairs.token_S.device))
    sample_N = torch.full((pairs.n_tokens,), -1, device=pairs.token_S.device)
    for b, token_T in enumerate(tokens):
        sample_N[token_T] = b
    sample_S = sample_N[pairs.token_S]
    kept = (sample_S >= 0).nonzero().flatten()  # neither padding nor masked
    expert_S = pairs.expert_S[kept]
    n_groups = pairs.n_experts * len(tokens)
    counts = torch.bincount(expert_S * len(tokens) + sample_S[kept], minlength=n_groups)
    counts_EB = counts.view(pairs.n_experts, len(tokens)).tolist()
    for local, name in names.items():
        inputs_S, deltas_S = (values[kept] for values in factors[local.removesuffix("_bias")])
        if local.endswith("_bias"):
            left_S, right_S = deltas_S.new_ones(len(kept), 1), sketcher.corrector.rows(name, expert_S, deltas_S)
        else:
            left_S, right_S = (inputs_S, deltas_S) if pairs.layer.is_transposed else (deltas_S, inputs_S)
            left_S = sketcher.corrector.left(name, left_S, expert_S)
            right_S = sketcher.corrector.right(name, right_S, expert_S)
        add_stack(name, StackFactors(left_S.to(right_S.dtype), right_S, counts_EB), sketcher, out)
