"""`arnoldi`: influence in the span of the curvature's leading eigenvectors (Schioppa et al. 2022, arXiv:2112.03052).

    score(q, z) = Σ_i (v_i · g_q) (v_i · g_z) / λ_i        over the RANK largest eigenvalues λ_i of G

G is the Gauss–Newton matrix over the fine-tuning samples; Arnoldi iteration finds its eigenvectors. Gradient components
outside their span are ignored, however large.

Shape letters: Q queries, N samples, K basis vectors, R eigenvectors, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import psutil
import torch
from pydantic import Field

from lark_store.errors import InputError
from lark_store.evaluate.baselines import solvers
from lark_store.evaluate.baselines.checks import check_model
from lark_store.evaluate.baselines.full_gradients import open_model
from lark_store.evaluate.baselines.gauss_newton import GaussNewton, curvature_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.evaluate.baselines.context import BaselineContext, Matrix
    from lark_store.evaluate.dataset import Material
    from lark_store.modeling.tokens import Tokens

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class ArnoldiSettings:
    """The number of eigenvectors and of `steps` (default: twice `rank`); `samples` and `sketcher` as in `cg`."""

    rank: Count = 20
    steps: Count | None = None
    samples: Count | None = None
    sketcher: str | None = None


def arnoldi(material: Material, context: BaselineContext) -> Matrix:
    """Score in the space of the curvature's leading eigenvectors, (Q, N): `arnoldi:RANK[,steps=…]@CHECKPOINT`.

    Raises
    ------
    InputError
        The basis does not fit into memory, or `steps` is below `rank`.
    NameUnknownError
    """
    settings = context.settings(ArnoldiSettings)
    steps = arnoldi_steps(context, settings)
    loaded, parameters = open_model(material, context, settings.sketcher)
    _check_memory(context, steps, parameters.size)

    def leading() -> solvers.Basis:
        texts = loaded.tokens(curvature_texts(material, settings.samples, context.seed))
        generator = torch.Generator().manual_seed(context.seed)
        start_P = torch.randn(parameters.size, generator=generator).to(parameters.device)
        product, rank = GaussNewton(parameters, texts).product, settings.rank
        basis = solvers.arnoldi(product, start_P, rank, steps, lambda step: context.say("eigenvectors", step, steps))
        context.note(
            f"`{context.spec}`: {len(basis.values_R)} eigenvalues from {float(basis.values_R[0]):.3g} to "
            f"{float(basis.values_R[-1]):.3g}, G of {len(texts)} samples and {parameters.size} parameters"
        )
        return basis

    basis = context.preparation.once("basis", leading)

    def projected(texts: Sequence[Tokens]) -> torch.Tensor:
        rows = []
        for i, tokens in enumerate(texts):
            rows.append(basis.project(parameters.gradient(tokens)))
            context.say("scores", i + 1, len(texts))
        return torch.stack(rows)

    queries, samples = context.tokens(loaded, material)
    with context.preparation.candidates():
        projected_NR = projected(samples)
    return (projected(queries) @ projected_NR.T).cpu().numpy()


def check_arnoldi(material: Material, context: BaselineContext) -> None:
    """Check the settings and the checkpoint."""
    arnoldi_steps(context, check_model(material, context, ArnoldiSettings))


def arnoldi_steps(context: BaselineContext, settings: ArnoldiSettings) -> int:
    """Return the number of Arnoldi steps.

    Raises
    ------
    InputError
        There are fewer steps than eigenvectors.
    """
    steps = settings.steps or 2 * settings.rank
    if steps < settings.rank:
        raise InputError(f"`{context.spec}`: {steps} steps can't find {settings.rank} eigenvectors", "raise `steps=`")
    return steps


def _check_memory(context: BaselineContext, steps: int, size: int) -> None:
    needed, free = 4 * steps * size, psutil.virtual_memory().available
    if needed > 0.8 * free:
        raise InputError(
            f"`{context.spec}`: {steps} vectors of {size} parameters take {needed / 1e9:.0f} GB, but only "
            f"{free / 1e9:.0f} are free",
            "lower the rank or `steps=`, or choose a `sketcher=` of fewer parameters",
        )
