"""`trak`: projected gradients and their kernel (Park et al. 2023, arXiv:2303.14186).

At each of C checkpoints, φ(z) is the projected gradient of the output function, the sum of log odds over a sample's
targets, f(z) = Σ_n log(p_n / (1 − p_n)); the rows of Φ are the candidates' φ.

    score(q, z) = 1/C Σ_c φ_c(q)ᵀ (Φ_cᵀ Φ_c + λ)⁻¹ φ_c(z)  ·  1/C Σ_c (1 − p_c(z))

p(z) is the mean probability of a sample's targets. The projection is lark-store's OPORP map, unbiased like the paper's
dense matrices; traker's projector needs CUDA. λ is `damping` times the mean eigenvalue of ΦᵀΦ, 0 by default as in the
paper; outside the range of Φᵀ the inverse is 0.

Shape letters: Q queries, N samples, K dimensions of the projection, M targets, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from lark_store.evaluate.baselines.checks import check_model
from lark_store.evaluate.baselines.full_gradients import parameters_of
from lark_store.evaluate.dataset import load
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place
from lark_store.gradients.sketch.sketcher_checks import check_k
from lark_store.modeling.losses import target_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from lark_store.evaluate.baselines.context import BaselineContext, Matrix
    from lark_store.evaluate.baselines.full_gradients import Parameters
    from lark_store.evaluate.dataset import Material
    from lark_store.modeling.losses import Batch
    from lark_store.modeling.tokens import Tokens

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TrakSettings:
    """The projection's dimension, the kernel's damping, and a sketcher to restrict the parameters."""

    k: int = 1024
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    sketcher: str | None = None


def trak(material: Material, context: BaselineContext) -> Matrix:
    """Score by TRAK, (Q, N): `trak[:K][,damping=…][,sketcher=…]@CHECKPOINT+CHECKPOINT`.

    Raises
    ------
    InputError
        k is not a valid number of bins.
    NameUnknownError
    """
    settings = context.settings(TrakSettings)
    oporp = Oporp(settings.k, context.seed)
    context.folders(material)  # a missing checkpoint fails before hours of work
    if settings.k >= len(material.samples) and not settings.damping:
        context.note(
            f"`{context.spec}`: k = {settings.k} is not below the {len(material.samples)} samples, so the kernel "
            "fits each sample alone: set `damping=`"
        )
    kernel, weight_N = np.zeros((len(material.queries), len(material.samples))), np.zeros(len(material.samples))
    for name in context.checkpoints:
        loaded = load(material.store, name, context.device, context.precision, context.attention)
        parameters = parameters_of(material.store, loaded, settings.sketcher)
        placements = place([(n, tuple(p.shape)) for n, p in parameters.chosen], settings.k)
        sketcher = GradientSketcher(oporp, placements, parameters.device)
        with context.preparation.preparing():
            samples = loaded.tokens(material.samples)
            phi_NK, p_N = _projected(parameters, sketcher, samples, context, f"samples at {name}")
            solved_KN = solved(phi_NK, settings.damping)
        phi_QK, _ = _projected(parameters, sketcher, loaded.tokens(material.queries), context, f"queries at {name}")
        kernel += phi_QK @ solved_KN
        weight_N += 1 - p_N
    n = len(context.checkpoints)
    scores: Matrix = kernel / n * (weight_N / n)
    return scores


def check_trak(material: Material, context: BaselineContext) -> None:
    """Check the settings and checkpoints."""
    check_k(check_model(material, context, TrakSettings, several=True).k)


def solved(phi_NK: Floats, damping: float) -> Floats:
    """Return (ΦᵀΦ + λ)⁻¹ Φᵀ, (K, N), computed on the smaller side; without damping, the pseudo-inverse of Φ."""
    n, k = phi_NK.shape
    gram = phi_NK.T @ phi_NK if k <= n else phi_NK @ phi_NK.T
    ridge = damping * float(np.square(phi_NK).sum()) / k
    inverse = np.linalg.pinv(gram + ridge * np.eye(len(gram)), rcond=1e-7, hermitian=True)
    return inverse @ phi_NK.T if k <= n else phi_NK.T @ inverse


def _projected(
    parameters: Parameters, sketcher: GradientSketcher, samples: Sequence[Tokens], context: BaselineContext, label: str
) -> tuple[Floats, Floats]:
    """Return projected gradients of the output function, (N, K), and mean target probabilities, (N,)."""
    rows, probabilities = [], []

    def function(model: Any, batch: Batch) -> torch.Tensor:
        odds_M = log_odds(model, batch)
        probabilities.append(float(odds_M.detach().sigmoid().mean()))
        return odds_M.sum()

    for i, tokens in enumerate(samples):
        out = sketcher.new()
        for (name, _), g in zip(parameters.chosen, parameters.parts(tokens, function), strict=True):
            sketcher.add(name, g.contiguous().view(1, -1), out)
        rows.append(sketcher.finish(out)[0].double().cpu().numpy())
        context.say(label, i + 1, len(samples))
    return np.stack(rows), np.array(probabilities)


def log_odds(model: Any, batch: Batch) -> torch.Tensor:
    """Return log(p / (1 − p)) of each target, (M,): its logit minus the others' log-sum-exp, exact for any p."""
    logits_MV = target_logits(model, batch).float()
    label_M1 = batch.labels(logits_MV)[:, None]
    others_MV = logits_MV.scatter(1, label_M1, float("-inf"))
    return logits_MV.gather(1, label_M1)[:, 0] - others_MV.logsumexp(dim=1)
