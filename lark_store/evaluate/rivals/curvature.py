r"""Products with the Gauss–Newton matrix of the mean loss over samples, exact, of the whole model.

    G = 1/N Σ_z J_zᵀ H_z J_z        H_z = 1/n_z (diag(p) − p pᵀ) for each of n_z targets

J_z are the derivatives of the logits that predict the sample's targets, p their probabilities: H is the Hessian of the
cross-entropy, whatever the labels. J v is worked out forwards, Jᵀ u backwards; G itself is never formed.

Shape letters: Q vectors, N samples, M targets of a batch, V tokens of the vocabulary, P parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lark_store.errors import CheckpointError
from lark_store.evaluate.material import gather
from lark_store.ingest.batches import batches, budget
from lark_store.ingest.checkpoints import first_line
from lark_store.ingest.gradients import is_out_of_memory
from lark_store.ingest.losses import Batch, target_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lark_store.evaluate.material import Material, Text
    from lark_store.evaluate.rivals.gradients import Parameters
    from lark_store.ingest.variants import Tokens

    Parts = dict[str, torch.Tensor]
    Run = Callable[[Parts], torch.Tensor]

_TOGETHER = 1 << 26  # numbers among the logits of all vectors that are taken through the model at once
_PROBES = 8  # random vectors a batch, for the diagonal's mean


def tuned_on(material: Material, most: int | None, seed: int) -> list[Text]:
    """Return the samples whose curvature is taken: of the sources of stage `finetune`, or the candidates.

    They are in the first candidate's variant; of more than `most`, as many are drawn with `seed`.
    """
    store, first = material.store, material.samples[0]
    tuning = store.sql("select name from sources where stage = 'finetune' order by name")["name"].to_list()
    return gather(
        store,
        sources=tuning or list(dict.fromkeys(text.source for text in material.samples)),
        variants=[first.variant],
        queries=material.queries[0].source,
        query_variant=material.queries[0].variant,
        max_samples=most,
        seed=seed,
    ).samples


class _Logits(nn.Module):
    """The logits that predict a batch's targets, as a module whose parameters can be replaced."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the logits, (M, V) float32."""
        return target_logits(self.model, batch).float()


class GaussNewton:
    """The matrix G of some samples, known by its products."""

    def __init__(self, held: Parameters, samples: Sequence[Tokens]) -> None:
        self.held, self.samples = held, samples
        self._logits = _Logits(held.model)
        self._at = {name: p.detach() for name, p in held.chosen}

    def product(self, v_QP: torch.Tensor, some: Sequence[int] | None = None) -> torch.Tensor:
        """Return G v for each v, (Q, P); with `some`, G of these samples alone.

        Raises
        ------
        CheckpointError
            The model has a part without derivatives forwards.
        """
        try:
            return self._product(v_QP, some)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"the model can't be gone through forwards: {first_line(error)}",
                "`cg`, `lissa` and `arnoldi` need derivatives that some kernels lack",
            ) from error

    def _product(self, v_QP: torch.Tensor, some: Sequence[int] | None) -> torch.Tensor:
        samples = self.samples if some is None else [self.samples[i] for i in some]
        made_QP = torch.zeros_like(v_QP)
        for batch in self._batches(samples):
            weight_M1 = self._weights(batch, len(samples))
            run = self._runner(batch)
            with sdpa_kernel(SDPBackend.MATH):  # the only attention that can be gone through forwards
                logits_MV, pull = _pulled(run, self._at)
                p_MV = logits_MV.softmax(dim=-1)

                def through(v: Parts, run: Any = run, w: Any = weight_M1, p: Any = p_MV) -> Any:
                    j_MV = torch.func.jvp(run, (self._at,), (v,))[1]
                    pj_MV = p * j_MV
                    return w * (pj_MV - p * pj_MV.sum(dim=-1, keepdim=True))

                chunk = max(1, _TOGETHER // p_MV.numel())
                for start in range(0, len(v_QP), chunk):
                    parts = self.held.split(v_QP[start : start + chunk])
                    h_CMV = torch.func.vmap(through)({name: v.to(self._at[name].dtype) for name, v in parts.items()})
                    for q, h_MV in enumerate(h_CMV):
                        self._add(pull(h_MV), made_QP[start + q])
        return made_QP

    def diagonal_mean(self, seed: int) -> float:
        """Return the mean of G's diagonal, estimated by random vectors drawn with `seed`.

        With H = L Lᵀ and random signs ε, E ‖Jᵀ L ε‖² is the trace of Jᵀ H J.
        """
        total, generator = 0.0, torch.Generator().manual_seed(seed)
        found_P = torch.zeros(self.held.size, device=self.held.device)
        for batch in self._batches(self.samples):
            logits_MV, pull = _pulled(self._runner(batch), self._at)
            p_MV = logits_MV.softmax(dim=-1)
            weight_M1 = self._weights(batch, len(self.samples))
            for _ in range(_PROBES):
                sign_MV = torch.randint(0, 2, p_MV.shape, generator=generator).to(p_MV) * 2 - 1
                root_MV = p_MV.sqrt() * sign_MV
                u_MV = weight_M1.sqrt() * (root_MV - p_MV * (p_MV.sqrt() * root_MV).sum(dim=-1, keepdim=True))
                self._add(pull(u_MV), found_P.zero_())
                total += float(found_P.double().square().sum()) / _PROBES
        return total / self.held.size

    def _add(self, parts: Parts, to_P: torch.Tensor) -> None:
        for name, part in self.held.split(to_P).items():
            part.add_(parts[name])

    def _batches(self, samples: Sequence[Tokens]) -> Iterator[Batch]:
        size = budget(None, self.held.device.type, None)
        for some in batches(samples, lambda sample: len(sample.input_ids), lambda: size):
            yield Batch(some, self.held.device)

    def _weights(self, batch: Batch, n: int) -> torch.Tensor:
        """Return what each target's share of G is multiplied with, (M, 1)."""
        each = [1 / (count * n) for count in batch.n_targets for _ in range(count)]
        return torch.tensor(each, device=self.held.device)[:, None]

    def _runner(self, batch: Batch) -> Run:
        def run(at: Parts) -> torch.Tensor:
            named = {f"model.{name}": p for name, p in at.items()}
            made: torch.Tensor = torch.func.functional_call(self._logits, named, (batch,))
            return made

        return run


def _pulled(run: Run, at: Parts) -> tuple[torch.Tensor, Callable[[torch.Tensor], Parts]]:
    """Go forward; returns the logits (M, V) and what takes u to Jᵀ u, by parameter."""
    made: Any = torch.func.vjp(run, at)
    logits_MV, pull = made
    return logits_MV.detach(), lambda u_MV: pull(u_MV)[0]
