"""What K-FAC and EK-FAC are fitted to: linear layers' inputs and output gradients, with labels from the model itself.

A sample counts at the positions that its loss depends on: up to the one that predicts its last target. Labels are drawn
from what the model predicts at the targets, by a seed of the sample's own, so that the order of samples, and a fit that
goes on where another was killed, change nothing. The scale of the loss is explained in `lark_store.ingest.curvature`.

Shape letters: T positions, L and R rows and columns of a weight, J blocks of a side, N targets, V tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from lark_store.ingest.batched import Tap
from lark_store.ingest.curvature import Kronecker, by_blocks, eigen, fitted_linears
from lark_store.ingest.gradients import FAULTS, check_tokens, failure, is_device_lost
from lark_store.ingest.losses import Batch, target_logits
from lark_store.ingest.variants import UnusableSampleError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.ingest.curvature import Linear
    from lark_store.ingest.variants import Tokens

    Tensors = dict[str, torch.Tensor]

ROWS, COLUMNS, VALUES, COUNT = "rows", "columns", "values", "count"  # what a tensor is called after its parameter


class FisherPath:
    """Goes forward and back with labels that the model draws; gives each weight's factors, (T, L) and (T, R)."""

    def __init__(self, model: Any, linears: list[Linear], device: torch.device) -> None:
        self.model, self.device = model, device
        self._length: tuple[int, int] | None = None  # of the sample under way, and how many of its positions count
        self._found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        model.requires_grad_(False)
        self._hooks = [linear.layer.register_forward_hook(self._tap(linear)) for linear in linears]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _tap(self, linear: Linear) -> Callable[..., Any]:
        def take(x: torch.Tensor, delta: torch.Tensor) -> None:
            inputs, deltas = self._cut(x), self._cut(delta)
            pair = (inputs, deltas) if linear.inputs == ROWS else (deltas, inputs)
            self._found.setdefault(linear.name, []).append(pair)

        def on_forward(_: Any, args: tuple[Any, ...], y: torch.Tensor) -> Any:
            if self._length is None:
                return None
            start = y.detach() if y.is_leaf else y
            return Tap.apply(start, args[0].detach(), self._anchor, take)  # type: ignore[no-untyped-call]

        return on_forward

    def _cut(self, values: torch.Tensor) -> torch.Tensor:
        assert self._length is not None
        length, counted = self._length
        flat = values.flatten(0, -2)
        return flat[:counted] if len(flat) == length else flat

    def factors(self, tokens: Tokens, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return each weight's left and right factors: output gradients of Σ ℓ / √N, and inputs, of one sample.

        Raises
        ------
        UnusableSampleError
            The model fails on the sample, or what it gives is not finite.
        """
        self._found = {}
        self._length = (len(tokens.input_ids), max(t for t, wanted in enumerate(tokens.is_target) if wanted))
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
        found = {
            name: (torch.cat([left for left, _ in pairs]), torch.cat([right for _, right in pairs]))
            for name, pairs in self._found.items()
        }
        self._found = {}
        if not all(bool(torch.isfinite(left.sum() + right.sum())) for left, right in found.values()):
            raise UnusableSampleError("the gradient of labels that the model draws is not finite")
        return found

    def _backward(self, tokens: Tokens, seed: int) -> None:
        logits_NV = target_logits(self.model, Batch([tokens], self.device))
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        loss = functional.cross_entropy(logits_NV, drawn_labels(logits_NV.detach(), seed), reduction="sum")
        (loss / len(logits_NV) ** 0.5).backward()


def drawn_labels(logits_NV: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw a label (N,) at each target from the softmax of its logits, the same on every device but for rounding."""
    uniform = torch.rand(len(logits_NV), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    below = logits_NV.softmax(dim=-1).cumsum(dim=-1)
    wanted = uniform.to(below.device, below.dtype) * below[:, -1:]
    return torch.searchsorted(below, wanted, right=True).squeeze(1).clamp(max=logits_NV.shape[1] - 1)


class CurvatureSums:
    """The first pass, and all that K-FAC needs: sums of the second moments of inputs and of output gradients."""

    what = "second moments of inputs and output gradients"

    def __init__(self, model: Any, device: torch.device, before: Tensors | None = None) -> None:  # noqa: ARG002
        self.linears = fitted_linears(model)
        self.n = 0
        self.sums = self._empty(device)
        self.path = FisherPath(model, self.linears, device)

    def _empty(self, device: torch.device) -> Tensors:
        made: Tensors = {}
        for linear in self.linears:
            dtype = torch.float64 if linear.layer.weight.dtype == torch.float64 else torch.float32
            for side, size in zip((ROWS, COLUMNS), linear.layer.weight.shape, strict=True):
                n = linear.blocks[side]
                made[f"{linear.name}/{side}"] = torch.zeros(n, size // n, size // n, dtype=dtype, device=device)
            made[f"{linear.name}/{COUNT}"] = torch.zeros((), dtype=torch.int64)
        return made

    def take(self, tokens: Tokens, seed: int) -> None:
        """Add a sample, all of it or, if that raises UnusableSampleError, nothing."""
        found = self.path.factors(tokens, seed)
        self.n += 1
        for name, (left_TL, right_TR) in found.items():
            _add_second_moments(self.sums[f"{name}/{ROWS}"], left_TL)
            _add_second_moments(self.sums[f"{name}/{COLUMNS}"], right_TR)
            self.sums[f"{name}/{COUNT}"] += len(left_TL)

    def restore(self, sums: Tensors, n: int) -> None:
        """Go on from what a fit had summed before."""
        for name, held in self.sums.items():
            held.copy_(sums[name])
        self.n = n

    def result(self) -> Tensors:
        """Return A and S of each weight as its `rows` and `columns`, on the CPU."""
        made = {}
        for linear in self.linears:
            for side in (ROWS, COLUMNS):
                count = float(self.sums[f"{linear.name}/{COUNT}"]) if side == linear.inputs else self.n
                made[f"{linear.name}/{side}"] = (self.sums[f"{linear.name}/{side}"] / max(1, count)).cpu()
        return made

    def close(self) -> None:
        """Let go of the model."""
        self.path.close()


def _add_second_moments(sums_JXX: torch.Tensor, values_TX: torch.Tensor) -> None:
    parts = values_TX.to(sums_JXX.dtype)
    parts = torch.unflatten(parts, 1, (len(sums_JXX), -1)).transpose(0, 1)
    sums_JXX.baddbmm_(parts.mT, parts)


class EigenvalueSums:
    """The second pass of EK-FAC: sums of the squared gradient along the eigenvectors of what the first pass found."""

    what = "eigenvalues"

    def __init__(self, model: Any, device: torch.device, before: Tensors | None = None) -> None:
        self.linears, self.device = fitted_linears(model), device
        self.n = 0
        self.sums: Tensors = {} if before is None else self._bases(before)
        self.path = FisherPath(model, self.linears, device)

    def _bases(self, before: Tensors) -> Tensors:
        made = {}
        for linear in self.linears:
            for side in (ROWS, COLUMNS):
                blocks = before[f"{linear.name}/{side}"]
                vectors = eigen(blocks.to(self.device) if self.device.type == "cuda" else blocks)[1]
                made[f"{linear.name}/{side}"] = vectors.to(self.device, blocks.dtype)
            made[f"{linear.name}/{VALUES}"] = torch.zeros(
                linear.layer.weight.shape, dtype=blocks.dtype, device=self.device
            )
        return made

    def take(self, tokens: Tokens, seed: int) -> None:
        """Add a sample, all of it or, if that raises UnusableSampleError, nothing."""
        found = self.path.factors(tokens, seed)
        self.n += 1
        for name, (left_TL, right_TR) in found.items():
            base = kronecker_of(self.sums, name)
            assert base.values is not None
            along_LR = by_blocks(left_TL, base.rows).T @ by_blocks(right_TR, base.columns)
            base.values.addcmul_(along_LR, along_LR)

    def restore(self, sums: Tensors, n: int) -> None:
        """Go on from what a fit had summed before."""
        self.sums = {name: each.to(self.device) for name, each in sums.items()}
        self.n = n

    def result(self) -> Tensors:
        """Return each weight's eigenvectors as `rows` and `columns`, and Λ as `values`, on the CPU."""
        n = max(1, self.n)
        return {name: (each / n if name.endswith(f"/{VALUES}") else each).cpu() for name, each in self.sums.items()}

    def close(self) -> None:
        """Let go of the model."""
        self.path.close()


def kronecker_of(tensors: Tensors, name: str) -> Kronecker:
    """Return one weight's factors from tensors by name."""
    return Kronecker(tensors[f"{name}/{ROWS}"], tensors[f"{name}/{COLUMNS}"], tensors.get(f"{name}/{VALUES}"))
