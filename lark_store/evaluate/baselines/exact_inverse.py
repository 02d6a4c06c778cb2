r"""`cg` and `lissa`: influence with the exact Gauss–Newton matrix, g_qᵀ (G + λ)⁻¹ g_z (Koh & Liang 2017).

A slow reference on small models for K-FAC, EK-FAC and plain gradients. λ is the damping times the mean of G's diagonal,
as in the corrections `kfac` and `ekfac`; random vectors estimate the mean.

`cg` solves by conjugate gradient and `lissa` by LiSSA. They stop when all residuals ‖b − (G + λ) x‖ / ‖b‖ are below the
tolerance, or after `steps`; a note reports the final residual. LiSSA with `change` runs until its solution stays.

Shape letters: Q queries, N samples, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field

from lark_store.evaluate.baselines import solvers
from lark_store.evaluate.baselines.checks import check_model
from lark_store.evaluate.baselines.full_gradients import influence, open_model
from lark_store.evaluate.baselines.gauss_newton import GaussNewton, curvature_texts

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.evaluate.baselines.context import BaselineContext, Matrix
    from lark_store.evaluate.dataset import Material

    Solve = Callable[[GaussNewton, torch.Tensor, float], solvers.Solved]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
_VECTORS = 8  # per query: b, x, r, p, A p, and the intermediates of a product


@dataclass(frozen=True)
class InverseSettings:
    """Settings of the inverse: G is the mean over `samples` samples (default: all of stage `finetune`).

    `sketcher` restricts the parameters to those of a sketcher.
    """

    damping: Positive = 0.1
    tolerance: Positive = 1e-3
    steps: Count = 500
    samples: Count | None = None
    sketcher: str | None = None

    @property
    def target(self) -> str:
        """The bound at which the steps end."""
        return f"{self.tolerance:.0e}"


@dataclass(frozen=True)
class LissaSettings(InverseSettings):
    """Settings of LiSSA: each step draws `batch` samples (default: all) and is divided by `scale`.

    With `change`, it stops by the relative change of the solution in a step, not by the residual.
    """

    batch: Count | None = None
    scale: Positive | None = None
    change: Positive | None = None

    @property
    def target(self) -> str:
        """The bound at which the steps end."""
        return super().target if self.change is None else f"a change of {self.change:.0e}"


def cg(material: Material, context: BaselineContext) -> Matrix:
    """Score by conjugate gradient, (Q, N): `cg[:DAMPING][,tolerance=…][,steps=…][,samples=…][,sketcher=…]@CHECKPOINT`.

    Raises
    ------
    InputError, NameUnknownError
    """
    settings = context.settings(InverseSettings)

    def solve(matrix: GaussNewton, b_QP: torch.Tensor, ridge: float) -> solvers.Solved:
        return solvers.conjugate_gradient(
            matrix.product, b_QP, ridge, settings.tolerance, settings.steps, _stepping(context, settings.steps)
        )

    return _scores(material, context, settings, solve)


def lissa(material: Material, context: BaselineContext) -> Matrix:
    """Score by LiSSA, (Q, N): `lissa:DAMPING@CHECKPOINT` with the settings of `cg`, `batch=…`, `scale=…`, `change=…`.

    Without a scale, the power method finds one.

    Raises
    ------
    InputError
        LiSSA does not converge.
    NameUnknownError
    """
    settings = context.settings(LissaSettings)
    stop = solvers.Stop(settings.tolerance, settings.steps, settings.change)
    rng = np.random.default_rng(context.seed)

    def solve(matrix: GaussNewton, b_QP: torch.Tensor, ridge: float) -> solvers.Solved:
        n = len(matrix.samples)

        def part(v_QP: torch.Tensor) -> torch.Tensor:
            assert settings.batch is not None
            return matrix.product(v_QP, rng.choice(n, min(settings.batch, n), replace=False).tolist())

        part_product = part if settings.batch else None

        def eigenvalue() -> float:
            start_P = torch.randn(b_QP.shape[1], generator=torch.Generator().manual_seed(context.seed)).to(b_QP)
            return solvers.largest_eigenvalue(part_product or matrix.product, start_P)

        scale = settings.scale or context.preparation.once("eigenvalue", eigenvalue) + ridge
        on_step = _stepping(context, settings.steps)
        return solvers.lissa(matrix.product, b_QP, ridge, scale, stop, on_step, part_product)

    return _scores(material, context, settings, solve)


def check_cg(material: Material, context: BaselineContext) -> None:
    """Check the settings and the checkpoint."""
    check_model(material, context, InverseSettings)


def check_lissa(material: Material, context: BaselineContext) -> None:
    """Check the settings and the checkpoint."""
    check_model(material, context, LissaSettings)


def _stepping(context: BaselineContext, max_steps: int) -> solvers.OnStep:
    return lambda step, residual: context.say(f"residual {residual:.1e}", step, max_steps)


def _scores(material: Material, context: BaselineContext, settings: InverseSettings, solve: Solve) -> Matrix:
    loaded, parameters = open_model(material, context, settings.sketcher)

    def curvature() -> tuple[GaussNewton, float]:
        texts = curvature_texts(material, settings.samples, context.seed)
        matrix = GaussNewton(parameters, loaded.tokens(texts))
        return matrix, settings.damping * (matrix.diagonal_mean(context.seed) or 1.0)

    matrix, ridge = context.preparation.once("curvature", curvature)
    solutions: list[solvers.Solved] = []

    def solved(b_QP: torch.Tensor) -> torch.Tensor:
        solution = solve(matrix, b_QP, ridge)
        solutions.append(replace(solution, x_QP=b_QP[:0]))
        return solution.x_QP

    scores = influence(parameters, context.tokens(loaded, material), solved, _VECTORS, context)
    residual = max(each.residual for each in solutions)
    context.note(
        f"`{context.spec}`: λ = {ridge:.3g}, G of {len(matrix.samples)} samples and {parameters.size} parameters; "
        f"residual {residual:.1e} after {max(each.steps for each in solutions)} steps"
        + ("" if all(each.is_converged for each in solutions) else f", not below {settings.target}: raise `steps=`")
    )
    return scores
