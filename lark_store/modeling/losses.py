"""Losses of rendered samples: padding, labels, and logits only where needed.

Shape letters: B samples of the batch, T tokens of the longest, N targets of all samples, S samples of
several batches, H the model's width, V the
vocabulary.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from lark_store.modeling.batching import batches, budget

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lark_store.modeling.tokens import Tokens


@dataclass(frozen=True)
class Batch:
    """Samples padded to one length, on the right (default) or left."""

    samples: Sequence[Tokens]
    device: torch.device
    pad_left: bool = False

    @cached_property
    def lengths(self) -> list[int]:
        """Each sample's number of tokens."""
        return [len(s.input_ids) for s in self.samples]

    @cached_property
    def width(self) -> int:
        """T, the number of tokens of the longest sample."""
        return max(self.lengths)

    def span(self, b: int) -> slice:
        """Return the positions of sample `b` among the T."""
        length = self.lengths[b]
        return slice(self.width - length, self.width) if self.pad_left else slice(0, length)

    def inputs(self, model: Any) -> dict[str, Any]:
        """Return the model's keyword arguments.

        Right padding needs no mask: a causal model never looks ahead, and padding has no loss. Positions are passed
        per sample, so position embeddings are looked up per sample.
        """
        ids_BT = torch.zeros(len(self.samples), self.width, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for b, sample in enumerate(self.samples):
            ids_BT[b, self.span(b)] = torch.tensor(sample.input_ids)
            mask_BT[b, self.span(b)] = 1
        arguments = {"input_ids": ids_BT.to(self.device)}
        if self.pad_left:
            arguments["attention_mask"] = mask_BT.to(self.device)
        if len(self.samples) > 1 and "position_ids" in inspect.signature(model.forward).parameters:
            positions = mask_BT.cumsum(dim=1) - 1 if self.pad_left else torch.arange(self.width).expand_as(ids_BT)
            arguments["position_ids"] = positions.clamp(min=0).to(self.device)
        return arguments

    @cached_property
    def n_targets(self) -> list[int]:
        """Each sample's number of targets."""
        return [s.n_targets for s in self.samples]

    @cached_property
    def predictors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample and position, (N,) each, of the logits that predict the targets, one position before them."""
        pairs = [
            (b, t + self.span(b).start - 1)
            for b, sample in enumerate(self.samples)
            for t, is_target in enumerate(sample.is_target)
            if is_target
        ]
        sample_N, position_N = torch.tensor(pairs, device=self.device).T
        return sample_N, position_N

    @cached_property
    def content(self) -> list[torch.Tensor]:
        """Each sample's content positions, relative to its first token."""
        positions = [
            [t for t, is_content in enumerate(s.is_content) if is_content] if s.is_content else range(len(s.input_ids))
            for s in self.samples
        ]
        return [torch.tensor(list(p), dtype=torch.long, device=self.device) for p in positions]

    @cached_property
    def content_targets(self) -> list[torch.Tensor]:
        """Each sample's target numbers with a predictor at a content position."""
        targets = []
        for sample in self.samples:
            predictors = [t - 1 for t, is_target in enumerate(sample.is_target) if is_target]
            numbers = [n for n, t in enumerate(predictors) if not sample.is_content or sample.is_content[t]]
            targets.append(torch.tensor(numbers, dtype=torch.long, device=self.device))
        return targets

    def labels(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """Return each target's label, (N,): its token or, under the rule `predicted`, the most likely token."""
        ids = [i for s in self.samples for i, is_target in zip(s.input_ids, s.is_target, strict=True) if is_target]
        labels_N = torch.tensor(ids, device=self.device)
        predicted = [s.rule == "predicted" for s in self.samples]
        if not any(predicted):
            return labels_N
        use_N = torch.tensor(predicted, device=self.device)[self.predictors[0]]
        return torch.where(use_N, logits_NV.detach().argmax(dim=-1), labels_N)


def sample_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Compute each sample's cross-entropy, the mean or the sum over its targets, (B,) float32 in nats."""
    losses_N, _ = target_losses(model, batch)
    parts = torch.split(losses_N, batch.n_targets)
    return torch.stack([p.sum() if s.is_summed else p.mean() for p, s in zip(parts, batch.samples, strict=True)])


@torch.no_grad()
def losses(model: Any, samples: Sequence[Tokens], batch_tokens: int | None = None) -> torch.Tensor:
    """Return each sample's loss in nats, as `sample_losses`, (S,) float64 on the CPU; without gradients.

    Samples of similar length are batched, at most `batch_tokens` tokens with padding (default: the device's).
    """
    size = budget(batch_tokens, model.device.type, None)
    loss_S = torch.zeros(len(samples), dtype=torch.float64)
    numbered = batches(list(enumerate(samples)), lambda pair: len(pair[1].input_ids), lambda: size)
    for batch in numbered:
        values = sample_losses(model, Batch([sample for _, sample in batch], model.device))
        loss_S[[i for i, _ in batch]] = values.double().cpu()
    return loss_S


def target_losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute each target's cross-entropy, (N,) float32 in nats; return also its label, (N,)."""
    logits_NV = target_logits(model, batch).float()
    labels_N = batch.labels(logits_NV)
    return functional.cross_entropy(logits_NV, labels_N, reduction="none"), labels_N


def target_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Run forward; return the logits that predict each target, (N, V)."""
    with _only_needed_rows(model, batch):
        logits: torch.Tensor = model(**batch.inputs(model), use_cache=False).logits
    narrowed = logits.shape[:2] == (1, sum(batch.n_targets))
    return logits[0] if narrowed else logits[batch.predictors]


@contextmanager
def _only_needed_rows(model: Any, batch: Batch) -> Iterator[None]:
    """Reduce the input of the model's output layer, if known, to the N predictors, as (1, N, H)."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def narrow(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][batch.predictors][None], *inputs[1:])

    hook = head.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        hook.remove()
