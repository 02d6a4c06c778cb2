"""`gdp` and `ekfac-full`: dot products of full gradients, plain or in EK-FAC's curvature; no sketch.

    gdp           g_q · g_z
    ekfac-full    g_qᵀ (G + λ)⁻¹ g_z, with EK-FAC's G (George et al. 2018, arXiv:1806.03884)

EK-FAC is fitted to the samples of `cg`'s G: those of stage `finetune`. λ is the damping times the mean of G's diagonal
over the chosen parameters, as in the correction `ekfac`.

Shape letters: Q queries, P parameters.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from lark_store.errors import InputError
from lark_store.evaluate.baselines.checks import check_model
from lark_store.evaluate.baselines.full_gradients import influence, open_model
from lark_store.evaluate.baselines.gauss_newton import curvature_texts
from lark_store.gradients.corrections import CORRECTIONS, factors_for
from lark_store.modeling.encoded import UnusableSampleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.evaluate.baselines.context import BaselineContext, Matrix
    from lark_store.evaluate.baselines.full_gradients import Parameters
    from lark_store.evaluate.dataset import Material
    from lark_store.gradients.corrections import Corrector
    from lark_store.modeling.tokens import Tokens

EKFAC = "ekfac"
_VECTORS = 3  # per query: g, its corrected copy, and the intermediates of a rotation


@dataclass(frozen=True)
class GdpSettings:
    """The parameters to use: those of a `sketcher` (default: all)."""

    sketcher: str | None = None


@dataclass(frozen=True)
class EkfacSettings:
    """Damping, the number of `samples` of G, and a `sketcher` to restrict the parameters (default: linear layers)."""

    damping: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    samples: Annotated[int, Field(ge=1)] | None = None
    sketcher: str | None = None


def gdp(material: Material, context: BaselineContext) -> Matrix:
    """Score by the dot product of full gradients, (Q, N): `gdp[:SKETCHER]@CHECKPOINT`.

    Raises
    ------
    InputError, NameUnknownError
    """
    loaded, parameters = open_model(material, context, context.settings(GdpSettings).sketcher)
    return influence(parameters, context.tokens(loaded, material), lambda g_QP: g_QP, 1, context)


def check_gdp(material: Material, context: BaselineContext) -> None:
    """Check the settings and the checkpoint."""
    check_model(material, context, GdpSettings)


def ekfac_full(material: Material, context: BaselineContext) -> Matrix:
    """Score by EK-FAC of full gradients, (Q, N): `ekfac-full:DAMPING[,samples=…][,sketcher=…]@CHECKPOINT`.

    Raises
    ------
    InputError
        No sample of G has a gradient.
    NameUnknownError
    """
    settings = context.settings(EkfacSettings)
    loaded, parameters = open_model(material, context, settings.sketcher, correction=EKFAC)

    def fitted() -> Corrector:
        texts = curvature_texts(material, settings.samples, context.seed)
        return fit(parameters, loaded.tokens(texts), settings.damping, context)

    corrector = context.preparation.once("factors", fitted)

    def solve(g_QP: torch.Tensor) -> torch.Tensor:
        rows = [
            torch.cat([corrector.whole(name, g).flatten() for name, g in parameters.split(g_P).items()]) for g_P in g_QP
        ]
        return torch.stack(rows)

    return influence(parameters, context.tokens(loaded, material), solve, _VECTORS, context)


def check_ekfac_full(material: Material, context: BaselineContext) -> None:
    """Check the settings and the checkpoint."""
    check_model(material, context, EkfacSettings)


def fit(parameters: Parameters, samples: Sequence[Tokens], damping: float, context: BaselineContext) -> Corrector:
    """Fit EK-FAC to the samples; return the corrector (G + λ)⁻¹ of the chosen parameters."""
    factors, result, n = factors_for(EKFAC), None, 0
    for number, kind in enumerate(factors.passes()):
        fit_pass = kind(parameters.model, parameters.device, result)
        try:
            for i, tokens in enumerate(samples):
                with suppress(UnusableSampleError):
                    fit_pass.take(tokens, context.seed + i)
                context.say(f"fit, pass {number + 1}", i + 1, len(samples))
            n = fit_pass.n
            if not n:
                raise InputError(f"`{context.spec}`: no sample has a gradient", "choose another variant")
            result = fit_pass.result()
        finally:
            fit_pass.close()
    assert result is not None
    parsed = factors.parse(result)
    context.note(f"`{context.spec}`: EK-FAC of {n} samples and {parameters.size} parameters")
    chosen = {name: parsed[name] for name, _ in parameters.chosen}
    return CORRECTIONS[EKFAC].corrector(chosen, damping, 1.0, parameters.device)
