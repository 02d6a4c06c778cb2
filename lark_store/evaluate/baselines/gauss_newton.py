r"""Exact products with the Gauss–Newton matrix of the mean loss over samples, for the whole model.

    G = 1/N Σ_z J_zᵀ H_z J_z        H_z = 1/n_z (diag(p) − p pᵀ) for each of n_z targets

J_z are the derivatives of the logits predicting the sample's targets, p their probabilities; H is the Hessian of the
cross-entropy for any labels. J v uses forward mode, Jᵀ u reverse mode; G itself is never formed.

Shape letters: Q vectors, N samples, M targets of a batch, V tokens of the vocabulary, P parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lark_store.errors import CheckpointError
from lark_store.evaluate.dataset import gather
from lark_store.gradients.paths.hooks import is_out_of_memory
from lark_store.modeling.batching import batches, budget
from lark_store.modeling.checkpoints import first_line
from lark_store.modeling.losses import Batch, target_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lark_store.evaluate.baselines.full_gradients import Parameters
    from lark_store.evaluate.dataset import Material, Text
    from lark_store.modeling.tokens import Tokens

    Parts = dict[str, torch.Tensor]
    Run = Callable[[Parts], torch.Tensor]

_MAX_LOGITS = 1 << 26  # logits of all vectors in one forward pass
_PROBES = 8  # random vectors per batch, for the diagonal's mean


def curvature_texts(material: Material, max_samples: int | None, seed: int) -> list[Text]:
    """Return the samples of the curvature: of the sources of stage `finetune`, or the candidates.

    They use the first candidate's variant; at most `max_samples` are drawn with `seed`.
    """
    store, first = material.store, material.samples[0]
    tuning = store.sql("select name from sources where stage = 'finetune' order by name")["name"].to_list()
    return gather(
        store,
        sources=tuning or list(dict.fromkeys(text.source for text in material.samples)),
        variants=[first.variant],
        queries=material.queries[0].source,
        query_variant=material.queries[0].variant,
        max_samples=max_samples,
        seed=seed,
    ).samples


class _Logits(nn.Module):
    """The logits predicting a batch's targets, as a module with replaceable parameters."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the logits, (M, V) float32."""
        return target_logits(self.model, batch).float()


class GaussNewton:
    """The matrix G of samples, available through its products."""

    def __init__(self, parameters: Parameters, samples: Sequence[Tokens]) -> None:
        self.parameters, self.samples = parameters, samples
        self._logits = _Logits(parameters.model)
        self._values = {name: p.detach() for name, p in parameters.chosen}

    def product(self, v_QP: torch.Tensor, indices: Sequence[int] | None = None) -> torch.Tensor:
        """Return G v for each v, (Q, P); with `indices`, G of these samples alone.

        Raises
        ------
        CheckpointError
            A part of the model lacks forward-mode derivatives.
        """
        try:
            return self._product(v_QP, indices)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"the model has no forward-mode derivatives: {first_line(error)}",
                "use another baseline: `cg`, `lissa` and `arnoldi` need derivatives which some kernels lack",
            ) from error

    def _product(self, v_QP: torch.Tensor, indices: Sequence[int] | None) -> torch.Tensor:
        samples = self.samples if indices is None else [self.samples[i] for i in indices]
        result_QP = torch.zeros_like(v_QP)
        for batch in self._batches(samples):
            weight_M1 = self._weights(batch, len(samples))
            run = self._runner(batch)
            with sdpa_kernel(SDPBackend.MATH):  # the only attention with forward-mode derivatives
                logits_MV, pull = _forward(run, self._values)
                p_MV = logits_MV.softmax(dim=-1)

                def hessian_product(v: Parts, run: Any = run, w: Any = weight_M1, p: Any = p_MV) -> Any:
                    j_MV = torch.func.jvp(run, (self._values,), (v,))[1]
                    pj_MV = p * j_MV
                    return w * (pj_MV - p * pj_MV.sum(dim=-1, keepdim=True))

                chunk = max(1, _MAX_LOGITS // p_MV.numel())
                for start in range(0, len(v_QP), chunk):
                    parts = self.parameters.split(v_QP[start : start + chunk])
                    parts = {name: v.to(self._values[name].dtype) for name, v in parts.items()}
                    h_CMV = torch.func.vmap(hessian_product)(parts)
                    for q, h_MV in enumerate(h_CMV):
                        self._add(pull(h_MV), result_QP[start + q])
        return result_QP

    def diagonal_mean(self, seed: int) -> float:
        """Estimate the mean of G's diagonal with random vectors drawn with `seed`.

        With H = L Lᵀ and random signs ε, E ‖Jᵀ L ε‖² is the trace of Jᵀ H J.
        """
        total, generator = 0.0, torch.Generator().manual_seed(seed)
        gradient_P = torch.zeros(self.parameters.size, device=self.parameters.device)
        for batch in self._batches(self.samples):
            logits_MV, pull = _forward(self._runner(batch), self._values)
            p_MV = logits_MV.softmax(dim=-1)
            weight_M1 = self._weights(batch, len(self.samples))
            for _ in range(_PROBES):
                sign_MV = torch.randint(0, 2, p_MV.shape, generator=generator).to(p_MV) * 2 - 1
                root_MV = p_MV.sqrt() * sign_MV
                u_MV = weight_M1.sqrt() * (root_MV - p_MV * (p_MV.sqrt() * root_MV).sum(dim=-1, keepdim=True))
                self._add(pull(u_MV), gradient_P.zero_())
                total += float(gradient_P.double().square().sum()) / _PROBES
        return total / self.parameters.size

    def _add(self, parts: Parts, to_P: torch.Tensor) -> None:
        for name, part in self.parameters.split(to_P).items():
            part.add_(parts[name])

    def _batches(self, samples: Sequence[Tokens]) -> Iterator[Batch]:
        size = budget(None, self.parameters.device.type, None)
        for batch in batches(samples, lambda sample: len(sample.input_ids), lambda: size):
            yield Batch(batch, self.parameters.device)

    def _weights(self, batch: Batch, n: int) -> torch.Tensor:
        """Return each target's weight in G, (M, 1)."""
        weights = [1 / (count * n) for count in batch.n_targets for _ in range(count)]
        return torch.tensor(weights, device=self.parameters.device)[:, None]

    def _runner(self, batch: Batch) -> Run:
        def run(values: Parts) -> torch.Tensor:
            by_name = {f"model.{name}": p for name, p in values.items()}
            logits: torch.Tensor = torch.func.functional_call(self._logits, by_name, (batch,))
            return logits

        return run


def _forward(run: Run, values: Parts) -> tuple[torch.Tensor, Callable[[torch.Tensor], Parts]]:
    """Run the model; return the logits (M, V) and the function from u to Jᵀ u, by parameter."""
    result: Any = torch.func.vjp(run, values)
    logits_MV, pull = result
    return logits_MV.detach(), lambda u_MV: pull(u_MV)[0]
