r"""`cg` and `lissa`: influence by the exact Gauss–Newton matrix, g_qᵀ (G + λ)⁻¹ g_z (Koh & Liang 2017).

The slow truth on a small model, with which K-FAC, EK-FAC and the plain gradient can be compared. λ is the damping times
the mean of G's diagonal, as it is of the corrections `kfac` and `ekfac`; the mean is estimated by random vectors.

`cg` solves by conjugate gradient and `lissa` by LiSSA. They stop when all residuals ‖b − (G + λ) x‖ / ‖b‖ are below the
tolerance, or after `steps`, and a note says which residual is left.

Shape letters: Q queries, N samples, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field

from lark_store.evaluate.rivals import solvers
from lark_store.evaluate.rivals.curvature import GaussNewton, tuned_on
from lark_store.evaluate.rivals.gradients import influence, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.evaluate.material import Material
    from lark_store.evaluate.rivals.given import Given, Matrix

    Solve = Callable[[GaussNewton, torch.Tensor, float], solvers.Solved]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
_VECTORS = 8  # a query holds b, x, r, p, A p, and what a product makes on the way


@dataclass(frozen=True)
class Inverse:
    """How the inverse is found: `samples` is how many G is the mean over (default: all of stage `finetune`).

    `sketcher` names one whose parameters alone are taken.
    """

    damping: Positive = 0.1
    tolerance: Positive = 1e-3
    steps: Count = 500
    samples: Count | None = None
    sketcher: str | None = None


@dataclass(frozen=True)
class Lissa(Inverse):
    """The same; `batch` samples are drawn for each step (default: all), `scale` is what a step is divided by."""

    batch: Count | None = None
    scale: Positive | None = None


def cg(material: Material, given: Given) -> Matrix:
    """Score by conjugate gradient, (Q, N): `cg[:DAMPING][,tolerance=…][,steps=…][,samples=…][,sketcher=…]@CHECKPOINT`.

    Raises
    ------
    InputError, NameUnknownError
    """
    how = given.settings(Inverse)

    def solve(matrix: GaussNewton, b_QP: torch.Tensor, ridge: float) -> solvers.Solved:
        return solvers.conjugate_gradient(
            matrix.product, b_QP, ridge, how.tolerance, how.steps, _stepping(given, how.steps)
        )

    return _scores(material, given, how, solve)


def lissa(material: Material, given: Given) -> Matrix:
    """Score by LiSSA, (Q, N): `lissa:DAMPING@CHECKPOINT` with the settings of `cg`, and `batch=…` and `scale=…`.

    The scale is found by the power method where none is given.

    Raises
    ------
    InputError
        It does not converge.
    NameUnknownError
    """
    how = given.settings(Lissa)
    rng = np.random.default_rng(given.seed)

    def solve(matrix: GaussNewton, b_QP: torch.Tensor, ridge: float) -> solvers.Solved:
        n = len(matrix.samples)

        def part(v_QP: torch.Tensor) -> torch.Tensor:
            assert how.batch is not None
            return matrix.product(v_QP, rng.choice(n, min(how.batch, n), replace=False).tolist())

        some = part if how.batch else None
        start_P = torch.randn(b_QP.shape[1], generator=torch.Generator().manual_seed(given.seed)).to(b_QP)
        scale = how.scale or solvers.largest_eigenvalue(some or matrix.product, start_P) + ridge
        return solvers.lissa(
            matrix.product, b_QP, ridge, scale, how.tolerance, how.steps, _stepping(given, how.steps), some
        )

    return _scores(material, given, how, solve)


def _stepping(given: Given, most: int) -> solvers.OnStep:
    return lambda step, residual: given.say(f"residual {residual:.1e}", step, most)


def _scores(material: Material, given: Given, how: Inverse, solve: Solve) -> Matrix:
    loaded = given.loaded(material)
    held = parameters_of(material.store, loaded, how.sketcher)
    matrix = GaussNewton(held, loaded.tokens(tuned_on(material, how.samples, given.seed)))
    ridge = how.damping * (matrix.diagonal_mean(given.seed) or 1.0)
    found: list[solvers.Solved] = []

    def solved(b_QP: torch.Tensor) -> torch.Tensor:
        made = solve(matrix, b_QP, ridge)
        found.append(solvers.Solved(b_QP[:0], made.residual, made.steps))
        return made.x_QP

    both = (loaded.tokens(material.queries), loaded.tokens(material.samples))
    scores = influence(held, both, solved, _VECTORS, given)
    residual = max(each.residual for each in found)
    given.note(
        f"`{given.spec}`: λ = {ridge:.3g}, G of {len(matrix.samples)} samples and {held.size} parameters; residual "
        f"{residual:.1e} after {max(each.steps for each in found)} steps"
        + ("" if residual <= 2 * how.tolerance else f", not below {how.tolerance:.0e}: say more `steps=`")
    )
    return scores
