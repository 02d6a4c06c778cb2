"""Conjugate gradient, LiSSA and Arnoldi iteration for a matrix that is known by its products alone.

All vectors of a block go on together; each stops for itself. Shape letters: Q vectors, P parameters, K basis vectors.
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

_RANK = 1e-6  # of the largest: smaller eigenvalues, and steps, are rounding in float32
_POWER_STEPS = 20


@dataclass(frozen=True)
class Solved:
    """Solutions (Q, P), the largest ‖b − A x‖ / ‖b‖ among them, and the steps that it took."""

    x_QP: torch.Tensor
    residual: float
    steps: int


def conjugate_gradient(
    product: Product, b_QP: torch.Tensor, ridge: float, tolerance: float, most: int, on_step: OnStep
) -> Solved:
    """Solve (G + ridge) x = b for each b (Hestenes & Stiefel 1952), until all residuals are below `tolerance`.

    The residual returned is worked out anew at the end: the one kept on the way drifts.
    """
    x_QP, r_QP = torch.zeros_like(b_QP), b_QP.clone()
    p_QP = r_QP.clone()
    rr_Q1, floor_Q1 = _dot(r_QP, r_QP), tolerance**2 * _dot(b_QP, b_QP)
    steps = 0
    while steps < most and bool((rr_Q1 > floor_Q1).any()):
        a_QP = product(p_QP).add_(p_QP, alpha=ridge)
        alpha_Q1 = torch.where(rr_Q1 > floor_Q1, rr_Q1 / _dot(p_QP, a_QP), 0).to(b_QP.dtype)
        x_QP.addcmul_(alpha_Q1, p_QP)
        r_QP.addcmul_(alpha_Q1, a_QP, value=-1)
        next_Q1 = _dot(r_QP, r_QP)
        p_QP.mul_((next_Q1 / rr_Q1.clamp(min=torch.finfo(torch.float64).tiny)).to(b_QP.dtype)).add_(r_QP)
        rr_Q1, steps = next_Q1, steps + 1
        on_step(steps, _largest(r_QP, b_QP))
    return Solved(x_QP, _largest(b_QP - product(x_QP).add_(x_QP, alpha=ridge), b_QP), steps)


def lissa(
    product: Product,
    b_QP: torch.Tensor,
    ridge: float,
    scale: float,
    tolerance: float,
    most: int,
    on_step: OnStep,
    part: Product | None = None,
) -> Solved:
    """Solve (G + ridge) x = b by x ← x + (b − (G + ridge) x) / scale (Agarwal et al. 2017), until residuals are small.

    With `part`, which multiplies by G of a few samples drawn anew each time, it goes all steps. `scale` is at least the
    largest eigenvalue of G + ridge.

    Raises
    ------
    InputError
        It does not converge: `scale` is too small.
    """
    x_QP, steps, residual = torch.zeros_like(b_QP), 0, 1.0
    while steps < most and (part is not None or residual > tolerance):
        r_QP = (part or product)(x_QP).add_(x_QP, alpha=ridge).neg_().add_(b_QP)
        x_QP.add_(r_QP, alpha=1 / scale)
        steps, residual = steps + 1, _largest(r_QP, b_QP)
        if not residual < 1e6:
            raise InputError(f"LiSSA does not converge with a scale of {scale:.3g}", "say a larger `scale=`")
        on_step(steps, residual)
    return Solved(x_QP, _largest(b_QP - product(x_QP).add_(x_QP, alpha=ridge), b_QP), steps)


def largest_eigenvalue(product: Product, start_P: torch.Tensor) -> float:
    """Return the largest eigenvalue of a matrix without negative ones, from below, by the power method."""
    v_P, found = start_P / start_P.norm(), 0.0
    for _ in range(_POWER_STEPS):
        v_P = product(v_P[None])[0]
        size = float(v_P.norm())
        found = max(found, size)
        if size == 0:
            break
        v_P = v_P / size
    return found


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis (K, P) of a Krylov space; in it a matrix's leading `values` (R,) and `vectors` (K, R)."""

    basis_KP: torch.Tensor
    values_R: torch.Tensor
    vectors_KR: torch.Tensor

    def project(self, g_P: torch.Tensor) -> torch.Tensor:
        """Return v_i · g / √λ_i for each eigenvector, (R,): dot products of these are g_qᵀ G⁻¹ g_z on their span."""
        found: torch.Tensor = (self.basis_KP @ g_P).double() @ self.vectors_KR / self.values_R.sqrt()
        return found


def arnoldi(product: Product, start_P: torch.Tensor, rank: int, steps: int, on_step: Callable[[int], None]) -> Basis:
    """Find the `rank` leading eigenvectors of a symmetric matrix by `steps` products (Arnoldi 1951).

    Each new vector is made orthogonal to all before it, twice; fewer eigenvectors come back where the matrix has a
    smaller rank or the space is exhausted.
    """
    steps = min(steps, len(start_P))
    basis_KP = start_P.new_empty(steps, len(start_P))
    basis_KP[0] = start_P / start_P.norm()
    h_KK = torch.zeros(steps, steps, dtype=torch.float64)
    made, largest = steps, 0.0
    for k in range(steps):
        w_P = product(basis_KP[k][None])[0]
        largest = max(largest, float(w_P.norm()))
        for _ in range(2):
            on_K = basis_KP[: k + 1] @ w_P
            h_KK[: k + 1, k] += on_K.double().cpu()
            w_P = w_P - on_K @ basis_KP[: k + 1]
        on_step(k + 1)
        rest = float(w_P.norm())
        if rest <= _RANK * largest or k + 1 == steps:
            made = k + 1
            break
        basis_KP[k + 1] = w_P / rest
    h_KK = h_KK[:made, :made]
    values_K, vectors_KK = torch.linalg.eigh((h_KK.triu() + h_KK.triu(1).T).to(start_P.device))
    kept = [i for i in range(made - 1, -1, -1) if values_K[i] > _RANK * values_K[-1]][:rank]
    return Basis(basis_KP[:made], values_K[kept], vectors_KK[:, kept])


def _dot(a_QP: torch.Tensor, b_QP: torch.Tensor) -> torch.Tensor:
    """Return the dot product of each pair, (Q, 1) float64."""
    return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in zip(a_QP, b_QP, strict=True)])[:, None]


def _largest(r_QP: torch.Tensor, b_QP: torch.Tensor) -> float:
    """Return the largest ‖r‖ / ‖b‖; 0 where b is 0."""
    size_Q1 = _dot(b_QP, b_QP)
    return float(torch.where(size_Q1 > 0, _dot(r_QP, r_QP) / size_Q1, 0).max().sqrt())
