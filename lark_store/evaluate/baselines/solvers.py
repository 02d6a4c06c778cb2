"""Conjugate gradient, LiSSA and Arnoldi iteration for a matrix given by its products.

The vectors of a block advance together; each stops on its own. Shape letters: Q vectors, P parameters, K basis vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    Product = Callable[[torch.Tensor], torch.Tensor]
    OnStep = Callable[[int, float], None]  # steps done, the largest residual so far

_ROUNDING = 1e-6  # of the largest: smaller eigenvalues and steps are float32 rounding
_POWER_STEPS = 20


@dataclass(frozen=True)
class Solved:
    """Solutions (Q, P), their largest residual ‖b − A x‖ / ‖b‖, the number of steps, and whether they sufficed."""

    x_QP: torch.Tensor
    residual: float
    steps: int
    is_converged: bool


@dataclass(frozen=True)
class Stop:
    """When to stop: all residuals below `tolerance`, or after `max_steps`.

    With `change`, in place of the tolerance: once the last step moved no x by more than this share of its length.
    """

    tolerance: float
    max_steps: int
    change: float | None = None

    def is_reached(self, residual: float, change: float) -> bool:
        """Tell whether the solution is good enough."""
        return residual <= self.tolerance if self.change is None else change <= self.change


def conjugate_gradient(
    product: Product, b_QP: torch.Tensor, ridge: float, tolerance: float, max_steps: int, on_step: OnStep
) -> Solved:
    """Solve (G + ridge) x = b for each b (Hestenes & Stiefel 1952), until all residuals are below `tolerance`.

    The returned residual is recomputed at the end: the running one drifts.
    """
    x_QP, r_QP = torch.zeros_like(b_QP), b_QP.clone()
    p_QP = r_QP.clone()
    rr_Q1, floor_Q1 = _dot(r_QP, r_QP), tolerance**2 * _dot(b_QP, b_QP)
    steps = 0
    while steps < max_steps and bool((rr_Q1 > floor_Q1).any()):
        a_QP = product(p_QP).add_(p_QP, alpha=ridge)
        alpha_Q1 = torch.where(rr_Q1 > floor_Q1, rr_Q1 / _dot(p_QP, a_QP), 0).to(b_QP.dtype)
        x_QP.addcmul_(alpha_Q1, p_QP)
        r_QP.addcmul_(alpha_Q1, a_QP, value=-1)
        next_Q1 = _dot(r_QP, r_QP)
        p_QP.mul_((next_Q1 / rr_Q1.clamp(min=torch.finfo(torch.float64).tiny)).to(b_QP.dtype)).add_(r_QP)
        rr_Q1, steps = next_Q1, steps + 1
        on_step(steps, _largest(r_QP, b_QP))
    residual = _largest(b_QP - product(x_QP).add_(x_QP, alpha=ridge), b_QP)
    return Solved(x_QP, residual, steps, is_converged=residual <= 2 * tolerance)


def lissa(
    product: Product,
    b_QP: torch.Tensor,
    ridge: float,
    scale: float,
    stop: Stop,
    on_step: OnStep,
    part: Product | None = None,
) -> Solved:
    """Solve (G + ridge) x = b by x ← x + (b − (G + ridge) x) / scale (Agarwal et al. 2017), until `stop`.

    `part` multiplies by G of a few samples, drawn anew in each call; with it, the residual of a step is noise, and all
    steps are made unless `stop` has a change. `scale` is at least the largest eigenvalue of G + ridge.

    Raises
    ------
    InputError
        LiSSA does not converge: `scale` is too small.
    """
    x_QP, steps, is_reached = torch.zeros_like(b_QP), 0, False
    has_test = part is None or stop.change is not None
    while steps < stop.max_steps and not (has_test and is_reached):
        r_QP = (part or product)(x_QP).add_(x_QP, alpha=ridge).neg_().add_(b_QP)
        x_QP.add_(r_QP, alpha=1 / scale)
        steps, residual = steps + 1, _largest(r_QP, b_QP)
        is_reached = stop.is_reached(residual, _largest(r_QP, x_QP) / scale)
        if not residual < 1e6:
            raise InputError(f"LiSSA does not converge with a scale of {scale:.3g}", "raise `scale=`")
        on_step(steps, residual)
    residual = _largest(b_QP - product(x_QP).add_(x_QP, alpha=ridge), b_QP)
    is_converged = residual <= 2 * stop.tolerance if stop.change is None else is_reached
    return Solved(x_QP, residual, steps, is_converged)


def largest_eigenvalue(product: Product, start_P: torch.Tensor) -> float:
    """Return a lower bound of a positive semi-definite matrix's largest eigenvalue, by the power method."""
    v_P, largest = start_P / start_P.norm(), 0.0
    for _ in range(_POWER_STEPS):
        v_P = product(v_P[None])[0]
        size = float(v_P.norm())
        largest = max(largest, size)
        if size == 0:
            break
        v_P = v_P / size
    return largest


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis (K, P) of a Krylov space, and a matrix's leading eigenpairs in it: (R,) and (K, R)."""

    basis_KP: torch.Tensor
    values_R: torch.Tensor
    vectors_KR: torch.Tensor

    def project(self, g_P: torch.Tensor) -> torch.Tensor:
        """Return v_i · g / √λ_i for each eigenvector, (R,); dot products of these are g_qᵀ G⁻¹ g_z on their span."""
        projected_R: torch.Tensor = (self.basis_KP @ g_P).double() @ self.vectors_KR / self.values_R.sqrt()
        return projected_R


def arnoldi(product: Product, start_P: torch.Tensor, rank: int, steps: int, on_step: Callable[[int], None]) -> Basis:
    """Find the `rank` leading eigenvectors of a symmetric matrix with `steps` products (Arnoldi 1951).

    Each new vector is orthogonalised twice against all before it. Returns fewer eigenvectors if the matrix has a
    smaller rank or the space is exhausted.
    """
    steps = min(steps, len(start_P))
    basis_KP = start_P.new_empty(steps, len(start_P))
    basis_KP[0] = start_P / start_P.norm()
    h_KK = torch.zeros(steps, steps, dtype=torch.float64)
    size, largest = steps, 0.0
    for k in range(steps):
        w_P = product(basis_KP[k][None])[0]
        largest = max(largest, float(w_P.norm()))
        for _ in range(2):
            on_K = basis_KP[: k + 1] @ w_P
            h_KK[: k + 1, k] += on_K.double().cpu()
            w_P = w_P - on_K @ basis_KP[: k + 1]
        on_step(k + 1)
        rest = float(w_P.norm())
        if rest <= _ROUNDING * largest or k + 1 == steps:
            size = k + 1
            break
        basis_KP[k + 1] = w_P / rest
    h_KK = h_KK[:size, :size]
    values_K, vectors_KK = torch.linalg.eigh((h_KK.triu() + h_KK.triu(1).T).to(start_P.device))
    leading = [i for i in range(size - 1, -1, -1) if values_K[i] > _ROUNDING * values_K[-1]][:rank]
    return Basis(basis_KP[:size], values_K[leading], vectors_KK[:, leading])


def _dot(a_QP: torch.Tensor, b_QP: torch.Tensor) -> torch.Tensor:
    """Return the dot product of each pair, (Q, 1) float64."""
    return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in zip(a_QP, b_QP, strict=True)])[:, None]


def _largest(r_QP: torch.Tensor, b_QP: torch.Tensor) -> float:
    """Return the largest ‖r‖ / ‖b‖; 0 where b is 0."""
    size_Q1 = _dot(b_QP, b_QP)
    return float(torch.where(size_Q1 > 0, _dot(r_QP, r_QP) / size_Q1, 0).max().sqrt())
