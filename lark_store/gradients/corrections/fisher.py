"""Statistics for K-FAC and EK-FAC: linear layers' inputs and output gradients, with labels drawn from the model.

A sample contributes the positions its loss depends on, up to the predictor of its last target. Labels are drawn from
the model's predictions with a seed per sample, so the order of samples and a resumed fit change nothing. For the scale
of the loss see `lark_store.gradients.corrections.kronecker`.

Shape letters: T positions, L and R rows and columns of a weight, J blocks of a side, N targets, V tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from lark_store.gradients.corrections.kronecker import Kronecker, by_blocks, eigen
from lark_store.gradients.corrections.linear_layers import fitted_linears
from lark_store.gradients.paths.hooks import FAULTS, check_tokens, failure, is_device_lost
from lark_store.gradients.paths.taps import tap
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.losses import Batch, target_logits

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.gradients.corrections.linear_layers import Linear
    from lark_store.modeling.tokens import Tokens

    Tensors = dict[str, torch.Tensor]

ROWS, COLUMNS, VALUES, COUNT = "rows", "columns", "values", "count"  # suffixes of tensor names


class FisherPath:
    """Runs backward with drawn labels; returns each weight's gradient factors, (T, L) and (T, R)."""

    def __init__(self, model: Any, linears: list[Linear], device: torch.device) -> None:
        self.model, self.device = model, device
        self._length: tuple[int, int] | None = None  # of the current sample: tokens, positions that count
        self._pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        model.requires_grad_(False)
        self._hooks = [linear.layer.register_forward_hook(self._tap(linear)) for linear in linears]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _tap(self, linear: Linear) -> Callable[..., Any]:
        def take(x: torch.Tensor, delta: torch.Tensor) -> None:
            inputs, deltas = self._cut(x), self._cut(delta)
            pair = (inputs, deltas) if linear.inputs == ROWS else (deltas, inputs)
            self._pairs.setdefault(linear.name, []).append(pair)

        def on_forward(_: Any, args: tuple[Any, ...], y: torch.Tensor) -> Any:
            if self._length is None:
                return None
            return tap(y, args[0], self._anchor, take)

        return on_forward

    def _cut(self, values: torch.Tensor) -> torch.Tensor:
        assert self._length is not None
        length, counted = self._length
        flat = values.flatten(0, -2)
        return flat[:counted] if len(flat) == length else flat

    def factors(self, tokens: Tokens, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return each weight's left and right factors for one sample: output gradients of Σ ℓ / √N, and inputs.

        Raises
        ------
        UnusableSampleError
            The model fails on the sample, or its gradient is not finite.
        """
        self._pairs = {}
        self._length = (len(tokens.input_ids), max(t for t, is_target in enumerate(tokens.is_target) if is_target))
        try:
            check_tokens(self.model, tokens)
            with torch.enable_grad():
                self._backward(tokens, seed)
        except FAULTS as error:
            if is_device_lost(error):
                raise
            raise failure(tokens, error) from error
        finally:
            self._length = None
        factors = {
            name: (torch.cat([left for left, _ in pairs]), torch.cat([right for _, right in pairs]))
            for name, pairs in self._pairs.items()
        }
        self._pairs = {}
        if not all(bool(torch.isfinite(left.sum() + right.sum())) for left, right in factors.values()):
            raise UnusableSampleError("its gradient with labels drawn from the model is not finite")
        return factors

    def _backward(self, tokens: Tokens, seed: int) -> None:
        logits_NV = target_logits(self.model, Batch([tokens], self.device))
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        loss = functional.cross_entropy(logits_NV, drawn_labels(logits_NV.detach(), seed), reduction="sum")
        (loss / len(logits_NV) ** 0.5).backward()


def drawn_labels(logits_NV: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw a label (N,) per target from its logits, identical on all devices up to rounding."""
    uniform = torch.rand(len(logits_NV), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cumulative = logits_NV.softmax(dim=-1).cumsum(dim=-1)
    thresholds = uniform.to(cumulative.device, cumulative.dtype) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(1).clamp(max=logits_NV.shape[1] - 1)


class CurvatureSums:
    """The first pass, and the only one of K-FAC: sums of second moments of inputs and output gradients."""

    label = "second moments of inputs and output gradients"

    def __init__(self, model: Any, device: torch.device, before: Tensors | None = None) -> None:  # noqa: ARG002
        self.linears = fitted_linears(model)
        self.n = 0
        self.sums = self._empty(device)
        self.path = FisherPath(model, self.linears, device)

    def _empty(self, device: torch.device) -> Tensors:
        sums: Tensors = {}
        for linear in self.linears:
            dtype = torch.float64 if linear.layer.weight.dtype == torch.float64 else torch.float32
            for side, size in zip((ROWS, COLUMNS), linear.layer.weight.shape, strict=True):
                n = linear.blocks[side]
                sums[f"{linear.name}/{side}"] = torch.zeros(n, size // n, size // n, dtype=dtype, device=device)
            sums[f"{linear.name}/{COUNT}"] = torch.zeros((), dtype=torch.int64)
        return sums

    def take(self, tokens: Tokens, seed: int) -> None:
        """Add a sample; on UnusableSampleError, nothing is added."""
        factors = self.path.factors(tokens, seed)
        self.n += 1
        for name, (left_TL, right_TR) in factors.items():
            _add_second_moments(self.sums[f"{name}/{ROWS}"], left_TL)
            _add_second_moments(self.sums[f"{name}/{COLUMNS}"], right_TR)
            self.sums[f"{name}/{COUNT}"] += len(left_TL)

    def restore(self, sums: Tensors, n: int) -> None:
        """Resume from a draft's sums."""
        for name, total in self.sums.items():
            total.copy_(sums[name])
        self.n = n

    def result(self) -> Tensors:
        """Return each weight's A and S as `rows` and `columns`, on the CPU."""
        means = {}
        for linear in self.linears:
            for side in (ROWS, COLUMNS):
                count = float(self.sums[f"{linear.name}/{COUNT}"]) if side == linear.inputs else self.n
                means[f"{linear.name}/{side}"] = (self.sums[f"{linear.name}/{side}"] / max(1, count)).cpu()
        return means

    def close(self) -> None:
        """Release the model."""
        self.path.close()


def _add_second_moments(sums_JXX: torch.Tensor, values_TX: torch.Tensor) -> None:
    parts = values_TX.to(sums_JXX.dtype)
    parts = torch.unflatten(parts, 1, (len(sums_JXX), -1)).transpose(0, 1)
    sums_JXX.baddbmm_(parts.mT, parts)


class EigenvalueSums:
    """The second pass of EK-FAC: sums of squared gradients along the eigenvectors from the first pass."""

    label = "eigenvalues"

    def __init__(self, model: Any, device: torch.device, before: Tensors | None = None) -> None:
        self.linears, self.device = fitted_linears(model), device
        self.n = 0
        self.sums: Tensors = {} if before is None else self._bases(before)
        self.path = FisherPath(model, self.linears, device)

    def _bases(self, before: Tensors) -> Tensors:
        sums = {}
        for linear in self.linears:
            for side in (ROWS, COLUMNS):
                blocks = before[f"{linear.name}/{side}"]
                vectors = eigen(blocks.to(self.device) if self.device.type == "cuda" else blocks)[1]
                sums[f"{linear.name}/{side}"] = vectors.to(self.device, blocks.dtype)
            sums[f"{linear.name}/{VALUES}"] = torch.zeros(
                linear.layer.weight.shape, dtype=blocks.dtype, device=self.device
            )
        return sums

    def take(self, tokens: Tokens, seed: int) -> None:
        """Add a sample; on UnusableSampleError, nothing is added."""
        factors = self.path.factors(tokens, seed)
        self.n += 1
        for name, (left_TL, right_TR) in factors.items():
            base = kronecker_of(self.sums, name)
            assert base.values is not None
            along_LR = by_blocks(left_TL, base.rows).T @ by_blocks(right_TR, base.columns)
            base.values.addcmul_(along_LR, along_LR)

    def restore(self, sums: Tensors, n: int) -> None:
        """Resume from a draft's sums."""
        self.sums = {name: total.to(self.device) for name, total in sums.items()}
        self.n = n

    def result(self) -> Tensors:
        """Return each weight's eigenvectors as `rows` and `columns`, and Λ as `values`, on the CPU."""
        n = max(1, self.n)
        return {name: (total / n if name.endswith(f"/{VALUES}") else total).cpu() for name, total in self.sums.items()}

    def close(self) -> None:
        """Release the model."""
        self.path.close()


def kronecker_of(tensors: Tensors, name: str) -> Kronecker:
    """Collect one weight's factors from named tensors."""
    return Kronecker(tensors[f"{name}/{ROWS}"], tensors[f"{name}/{COLUMNS}"], tensors.get(f"{name}/{VALUES}"))
