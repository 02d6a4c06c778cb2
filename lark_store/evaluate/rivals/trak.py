"""`trak`: projected gradients and their kernel (Park et al. 2023, arXiv:2303.14186).

At each of C checkpoints φ(z) is the projected gradient of the output function, the sum over a sample's targets of their
log odds, f(z) = Σ_n log(p_n / (1 − p_n)); Φ has the candidates' φ as its rows.

    score(q, z) = 1/C Σ_c φ_c(q)ᵀ (Φ_cᵀ Φ_c + λ)⁻¹ φ_c(z)  ·  1/C Σ_c (1 − p_c(z))

p(z) is the mean probability of a sample's targets. The projection is lark-store's own OPORP map, whose dot products are
as unbiased as those of the paper's dense matrices; traker's projector needs CUDA. λ is `damping` times the mean
eigenvalue of ΦᵀΦ, none by default as in the paper; on a space that Φ does not reach the inverse is 0.

Shape letters: Q queries, N samples, K dimensions of the projection, M targets, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from lark_store.evaluate.material import load
from lark_store.evaluate.rivals.gradients import parameters_of
from lark_store.ingest.losses import target_logits
from lark_store.ingest.oporp import GradientSketcher, Oporp, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from lark_store.evaluate.material import Material
    from lark_store.evaluate.rivals.given import Given, Matrix
    from lark_store.evaluate.rivals.gradients import Parameters
    from lark_store.ingest.losses import Batch
    from lark_store.ingest.variants import Tokens

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Projection:
    """The projection's dimensions, the kernel's damping, and a sketcher whose parameters alone are taken."""

    k: int = 1024
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    sketcher: str | None = None


def trak(material: Material, given: Given) -> Matrix:
    """Score by TRAK, (Q, N): `trak[:K][,damping=…][,sketcher=…]@CHECKPOINT+CHECKPOINT`.

    Raises
    ------
    InputError
        k is none of the map's.
    NameUnknownError
    """
    how = given.settings(Projection)
    oporp = Oporp(how.k, given.seed)
    given.folders(material)  # a checkpoint that is not there is named before the first one's hours
    if how.k >= len(material.samples) and not how.damping:
        given.note(
            f"`{given.spec}`: k = {how.k} is not below the {len(material.samples)} samples, so the kernel fits each of "
            "them alone: say a `damping=`"
        )
    kernel, weight_N = np.zeros((len(material.queries), len(material.samples))), np.zeros(len(material.samples))
    for name in given.checkpoints:
        loaded = load(material.store, name, given.device, given.precision)
        held = parameters_of(material.store, loaded, how.sketcher)
        sketcher = GradientSketcher(oporp, place([(n, tuple(p.shape)) for n, p in held.chosen], how.k), held.device)
        phi_QK, _ = _projected(held, sketcher, loaded.tokens(material.queries), given, f"queries at {name}")
        phi_NK, p_N = _projected(held, sketcher, loaded.tokens(material.samples), given, f"samples at {name}")
        kernel += phi_QK @ solved(phi_NK, how.damping)
        weight_N += 1 - p_N
    n = len(given.checkpoints)
    made: Matrix = kernel / n * (weight_N / n)
    return made


def solved(phi_NK: Floats, damping: float) -> Floats:
    """Return (ΦᵀΦ + λ)⁻¹ Φᵀ, (K, N), worked out on the smaller side; without damping the pseudo-inverse of Φ."""
    n, k = phi_NK.shape
    gram = phi_NK.T @ phi_NK if k <= n else phi_NK @ phi_NK.T
    ridge = damping * float(np.square(phi_NK).sum()) / k
    inverse = np.linalg.pinv(gram + ridge * np.eye(len(gram)), rcond=1e-7, hermitian=True)
    return inverse @ phi_NK.T if k <= n else phi_NK.T @ inverse


def _projected(
    held: Parameters, sketcher: GradientSketcher, samples: Sequence[Tokens], given: Given, what: str
) -> tuple[Floats, Floats]:
    """Return the projected gradients of the output function, (N, K), and the mean probability of the targets, (N,)."""
    rows, seen = [], []

    def function(model: Any, batch: Batch) -> torch.Tensor:
        odds_M = log_odds(model, batch)
        seen.append(float(odds_M.detach().sigmoid().mean()))
        return odds_M.sum()

    for i, tokens in enumerate(samples):
        out = sketcher.new()
        for (name, _), g in zip(held.chosen, held.parts(tokens, function), strict=True):
            sketcher.add(name, g.contiguous().view(1, -1), out)
        rows.append(sketcher.finish(out)[0].double().cpu().numpy())
        given.say(what, i + 1, len(samples))
    return np.stack(rows), np.array(seen)


def log_odds(model: Any, batch: Batch) -> torch.Tensor:
    """Return log(p / (1 − p)) of each target, (M,): its logit less the others' log-sum-exp, exact for any p."""
    logits_MV = target_logits(model, batch).float()
    label_M1 = batch.labels(logits_MV)[:, None]
    others_MV = logits_MV.scatter(1, label_M1, float("-inf"))
    return logits_MV.gather(1, label_M1)[:, 0] - others_MV.logsumexp(dim=1)
