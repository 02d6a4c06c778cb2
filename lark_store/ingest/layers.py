"""What a layer's input and output gradient say about its parameters' gradient, for each sample of a batch.

A *rule* knows one kind of layer: linear layers and Conv1D (products), embeddings (rows), layer and RMS norms (scales).
`rule_for` returns None for a layer that no rule knows; nothing is guessed.

Shape letters: B samples, T tokens, I and O inputs and outputs of a layer, L and R left and right factor of a product,
H the model's width, N coordinates of a stretch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.ingest.oporp import GradientSketcher

    Names = dict[str, str]  # a layer's own name of a parameter -> the name it is sketched under
    Rule = Callable[["Capture", Names, GradientSketcher, torch.Tensor], None]

# Coordinates of all samples' weight gradients held at a time, 32 MB: on CUDA what an L2 cache holds of bfloat16 (an
# H100's has 50 MB), elsewhere of float32, small beside the activations.
_HELD, _HELD_CUDA = 1 << 23, 1 << 24

# What a layer raises that takes other input than a trial gives it.
_REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True)
class Capture:
    """One call of a layer: its input and output gradient, sample by sample, without padding.

    `inputs` are (…, I), or (T,) tokens; `deltas` (…, O), the gradients of the samples' own losses.
    """

    layer: nn.Module
    inputs: Sequence[torch.Tensor]
    deltas: Sequence[torch.Tensor]


def rule_for(layer: nn.Module) -> Rule | None:
    """Return the rule that knows this layer, None if none does."""
    own = type(layer).forward
    if own is nn.Linear.forward:
        return _linear
    if own is Conv1D.forward:
        return _conv1d
    if isinstance(layer, nn.Embedding):
        return _embedding(layer)
    if _scales_its_input(layer):
        return _scale
    return None


def _linear(capture: Capture, names: Names, sketcher: GradientSketcher, out: torch.Tensor) -> None:
    if "weight" in names:
        _add_products(names["weight"], capture.deltas, capture.inputs, sketcher, out)
    if "bias" in names:
        _add_sums(names["bias"], capture.deltas, sketcher, out)


def _conv1d(capture: Capture, names: Names, sketcher: GradientSketcher, out: torch.Tensor) -> None:
    """Conv1D holds its weight the other way round, (I, O)."""
    if "weight" in names:
        _add_products(names["weight"], capture.inputs, capture.deltas, sketcher, out)
    if "bias" in names:
        _add_sums(names["bias"], capture.deltas, sketcher, out)


def _add_products(
    name: str,
    lefts: Sequence[torch.Tensor],
    rights: Sequence[torch.Tensor],
    sketcher: GradientSketcher,
    out: torch.Tensor,
) -> None:
    """Add each sample's leftᵀ · right, (L, R), some rows at a time, so that no whole gradient is ever held.

    But where the correction needs a weight's gradient whole, it is held whole, of some samples at a time.
    """
    if sketcher.corrector.by_product:
        _add_whole(name, lefts, rights, sketcher, out)
        return
    left_TL = [sketcher.corrector.left(name, each.flatten(0, -2)) for each in lefts]
    right_TR = [sketcher.corrector.right(name, each.flatten(0, -2)) for each in rights]
    n, k = len(left_TL), sketcher.oporp.k
    n_left, n_right = left_TL[0].shape[1], right_TR[0].shape[1]
    whole = k // math.gcd(k, n_right)  # so many rows end where a chunk ends
    held_at_once = _HELD_CUDA if sketcher.device.type == "cuda" else _HELD
    step = max(1, held_at_once // (n * n_right * whole)) * whole
    if sketcher.together:
        left_BTL, right_BTR = _stacked(left_TL, right_TR)
    for start in range(0, n_left, step):
        stop = min(start + step, n_left)
        held = sketcher.scratch((n, stop - start, n_right), left_TL[0].dtype)
        if sketcher.together:
            torch.bmm(left_BTL[:, :, start:stop].mT, right_BTR, out=held)
        else:
            for each, left, right in zip(held, left_TL, right_TR, strict=True):
                torch.mm(left[:, start:stop].T, right, out=each)
        sketcher.add(name, held.view(n, -1), out, chunk=start * n_right // k)


def _add_whole(
    name: str,
    lefts: Sequence[torch.Tensor],
    rights: Sequence[torch.Tensor],
    sketcher: GradientSketcher,
    out: torch.Tensor,
) -> None:
    n, (n_left, n_right) = len(lefts), sketcher.placements[name].shape
    step = max(1, _HELD // (n_left * n_right))
    for start in range(0, n, step):
        stop = min(start + step, n)
        made = [
            sketcher.corrector.product(name, left.flatten(0, -2), right.flatten(0, -2))
            for left, right in zip(lefts[start:stop], rights[start:stop], strict=True)
        ]
        sketcher.add(name, torch.stack(made).view(stop - start, -1), out[..., start:stop, :])


def _stacked(left_TL: Sequence[torch.Tensor], right_TR: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad with zeros, which add nothing, for one product of all samples at once."""
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(list(left_TL), batch_first=True), pad(list(right_TR), batch_first=True)


def _add_sums(name: str, terms: Sequence[torch.Tensor], sketcher: GradientSketcher, out: torch.Tensor) -> None:
    sums_BH = torch.stack([each.flatten(0, -2).sum(dim=0, dtype=torch.float32) for each in terms])
    sketcher.add(name, sketcher.corrector.vector(name, sums_BH), out)


def _embedding(layer: nn.Embedding) -> Rule | None:
    """Rows of a table, perhaps multiplied by a number (Gemma's)."""
    if layer.sparse or layer.scale_grad_by_freq or layer.max_norm is not None:
        return None
    factor = 1.0 if type(layer).forward is nn.Embedding.forward else _factor(layer)
    if factor is None:
        return None

    def add(capture: Capture, names: Names, sketcher: GradientSketcher, out: torch.Tensor) -> None:
        for s, (index_T, delta_TH) in enumerate(zip(capture.inputs, capture.deltas, strict=True)):
            kept_TH = delta_TH.float() * factor
            if layer.padding_idx is not None:
                kept_TH = kept_TH.masked_fill((index_T == layer.padding_idx)[:, None], 0)  # as torch does
            kept_TH = sketcher.corrector.rows(names["weight"], index_T, kept_TH)
            sketcher.add_rows(names["weight"], index_T, kept_TH, out, s)

    return add


@torch.no_grad()
def _factor(layer: nn.Embedding) -> float | None:
    """Return what a layer multiplies a row of its table by; None if it does anything else."""
    index = torch.arange(min(8, layer.num_embeddings), device=layer.weight.device)
    try:
        rows, made = layer.weight[index].double(), layer(index).double()
    except _REFUSALS:
        return None
    if made.shape != rows.shape or not rows.any():
        return None
    factor = float((rows * made).sum() / (rows * rows).sum())
    return factor if torch.allclose(made, factor * rows, rtol=1e-2) else None


def _scale(capture: Capture, names: Names, sketcher: GradientSketcher, out: torch.Tensor) -> None:
    for name, sums_BH in _scale_gradients(capture, names).items():
        sketcher.add(names[name], sketcher.corrector.vector(names[name], sums_BH), out)


def _scale_gradients(capture: Capture, names: Sequence[str] | Names) -> dict[str, torch.Tensor]:
    """Return the gradients, (B, H), of a layer that gives weight · n(input) + bias; n is found by asking the layer."""
    made = {}
    if "weight" in names:
        sums = []
        for given, delta in zip(capture.inputs, capture.deltas, strict=True):
            sums.append((_normed(capture.layer, given).float() * delta.float()).flatten(0, -2).sum(dim=0))
        made["weight"] = torch.stack(sums)
    if "bias" in names:
        made["bias"] = torch.stack([delta.float().flatten(0, -2).sum(dim=0) for delta in capture.deltas])
    return made


@torch.no_grad()
def _normed(layer: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """Return n(input): the layer with weight 1 less the layer with weight 0, whatever its bias or offset."""
    one, zero = (
        torch.func.functional_call(layer, {"weight": torch.full_like(layer.weight, value)}, (given,))  # type: ignore[arg-type]
        for value in (1, 0)
    )
    difference: torch.Tensor = one - zero
    return difference


def _scales_its_input(layer: nn.Module) -> bool:
    """Try a layer with a 1-dimensional `weight`, perhaps a `bias`: the rule must give what autograd gives."""
    mine = dict(layer.named_parameters(recurse=False))
    weight = mine.get("weight")
    if not {"weight"} <= mine.keys() <= {"weight", "bias"} or weight is None or weight.dim() != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    given, delta = (torch.randn(3, len(weight), generator=generator).to(weight) for _ in range(2))
    free = {name: p.detach().clone().requires_grad_(True) for name, p in mine.items()}
    try:
        with torch.enable_grad():
            made = torch.func.functional_call(layer, free, (given,))
            expected = torch.autograd.grad(made, list(free.values()), delta)
        found = _scale_gradients(Capture(layer, [given], [delta]), list(free))
    except _REFUSALS:
        return False
    tolerance = 1e-4 if weight.dtype == torch.float32 else 5e-2
    return all(
        torch.allclose(found[name][0], gradient.float(), rtol=tolerance, atol=tolerance)
        for name, gradient in zip(free, expected, strict=True)
    )
