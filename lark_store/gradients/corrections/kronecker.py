"""Curvature corrections: gradients times a power of (G + λ)⁻¹, with G the Gauss–Newton matrix of the loss.

Influence functions estimate how a query's loss changes when a sample is left out of training: g_qᵀ (G + λ)⁻¹ g_z. A
layer's weight gradient is a sum over positions of output gradients and inputs, Σ_t δ_t x_tᵀ. K-FAC (Martens & Grosse
2015, arXiv:1503.05671) assumes the two are independent:

    G ≈ A ⊗ S        A = E_t[x xᵀ], a mean over positions        S = E_z[Σ_t δ δᵀ], a mean over samples

EK-FAC (George et al. 2018, arXiv:1806.03884) keeps the eigenvectors Q_A and Q_S and measures G's diagonal along them,

    Λ = E_z[(Q_Sᵀ (Σ_t δ_t x_tᵀ) Q_A)²]

A sample's loss is the mean over its targets. Its Gauss–Newton matrix is the Fisher matrix with labels drawn from the
model. N independent labels contribute 1/N² each and 1/N together, so δ is the gradient of Σ_n ℓ_n / √N. G is the mean
over samples.

**Damping** is one λ for all sketched layers: `damping` times the mean of G's diagonal over all of them. A huge damping
thus gives a multiple of the plain gradient. EK-FAC adds λ to Λ. K-FAC splits it (factored Tikhonov damping),

    (A + π √λ I) ⊗ (S + √λ / π I)        π² = mean eigenvalue of A / mean eigenvalue of S

**Power** p is the exponent of the inverse. With 1/2 on both sides, the dot product of two sketches is
g_qᵀ (G + λ)⁻¹ g_z. With 1, each gradient gets the whole inverse. This is for samples and queries at different
checkpoints, each with its own G: g_qᵀ (G_q + λ_q)⁻¹ (G_z + λ_z)⁻¹ g_z, the influence over two stages of training. All
results are in parameter coordinates, so gradients of two checkpoints can be multiplied.

In merged attention projections, S (queries, keys, values) or A (attention output) has one block per head. Only weights
of linear layers are corrected; biases, norms, embeddings and the output head are not sketched.

Shape letters: L and R rows and columns of a weight, J blocks of a side, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lark_store.gradients.corrections.base import Corrector
from lark_store.gradients.corrections.linear_layers import linears_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lark_store.gradients.sketch.placement import Placement


# --- factors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kronecker:
    """A layer's curvature: blocks `rows` (J, L/J, L/J) and `columns` (J, R/J, R/J) for the sides of its weight.

    The blocks are second moments (K-FAC) or, with `values` Λ (L, R), eigenvectors in columns (EK-FAC).
    """

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Tell whether the factors belong to a weight of this shape."""
        sides = (self.rows, self.columns)
        square = all(side.dim() == 3 and side.shape[1] == side.shape[2] for side in sides)
        matches = square and tuple(side.shape[0] * side.shape[1] for side in sides) == shape
        return matches and (self.values is None or tuple(self.values.shape) == shape)

    def diagonal(self) -> float:
        """Return the sum of G's diagonal."""
        if self.values is not None:
            return float(self.values.sum(dtype=torch.float64))
        return _trace(self.rows) * _trace(self.columns)

    @property
    def numel(self) -> int:
        """L·R, the weight's coordinates."""
        return int(self.rows.shape[0] * self.rows.shape[1] * self.columns.shape[0] * self.columns.shape[1])


def _trace(blocks: torch.Tensor) -> float:
    return float(blocks.diagonal(dim1=1, dim2=2).sum(dtype=torch.float64))


def damping_of(factors: Mapping[str, Kronecker], damping: float) -> float:
    """Return λ: `damping` times the mean of G's diagonal over all layers, or times 1 if the mean is 0."""
    n = sum(layer.numel for layer in factors.values())
    return damping * (sum(layer.diagonal() for layer in factors.values()) / max(1, n) or 1.0)


def eigen(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues (J, N), clamped at 0, and eigenvectors (J, N, N) of symmetric blocks, in float64.

    Runs on CUDA for CUDA tensors, else on the CPU.
    """
    wide = (blocks if blocks.is_cuda else blocks.cpu()).double()
    values, vectors = torch.linalg.eigh(wide)
    return values.clamp(min=0), vectors


def inverse_power(blocks: torch.Tensor, ridge: float, power: float) -> torch.Tensor:
    """Return (blocks + ridge)^(−power), symmetric, in the blocks' dtype."""
    values, vectors = eigen(blocks)
    return ((vectors * (values + ridge).pow(-power)[:, None]) @ vectors.mT).to(blocks.dtype)


def by_blocks(values_TX: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Multiply values (T, X) by a block-diagonal matrix with blocks (J, X/J, X/J), in float32 or float64."""
    wide = values_TX if values_TX.dtype in (torch.float32, torch.float64) else values_TX.float()
    blocks = blocks.to(wide.dtype)
    if len(blocks) == 1:
        return wide @ blocks[0]
    parts = torch.unflatten(wide, 1, (len(blocks), -1)).transpose(0, 1)
    return torch.bmm(parts, blocks).transpose(0, 1).flatten(1)


# --- correctors ----------------------------------------------------------------------------------------------------


class KfacCorrector(Corrector):
    """Multiplies a weight's gradient from both sides, factor by factor or whole."""

    def __init__(self, roots: Mapping[str, Kronecker]) -> None:
        self.roots = roots

    def whole(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Correct one sample's whole gradient of a weight."""
        right = by_blocks(gradient, self.roots[name].columns)
        return by_blocks(right.T, self.roots[name].rows).T.contiguous()

    def left(self, name: str, left_TL: torch.Tensor, matrix_T: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """Correct the left factor."""
        return _narrowed(by_blocks(left_TL, self.roots[name].rows), left_TL)

    def right(self, name: str, right_TR: torch.Tensor, matrix_T: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """Correct the right factor."""
        return _narrowed(by_blocks(right_TR, self.roots[name].columns), right_TR)


class EkfacCorrector(Corrector):
    """Rotates a weight's gradient into the eigenbasis, scales it there and rotates it back.

    The forward rotation applies to the gradient's factors. The backward rotation costs L·R·(L + R) multiplications
    per sample and weight (L·R·(l + R) with heads of size l), more than the gradient itself.
    """

    by_product = True

    def __init__(self, bases: Mapping[str, Kronecker]) -> None:
        """Take eigenvectors with the scale along them as `values`."""
        self.bases = bases

    def whole(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Correct one sample's whole gradient of a weight."""
        base = self.bases[name]
        return _scaled_along(by_blocks(by_blocks(gradient, base.columns).T, base.rows).T, base)

    def product(self, name: str, left_TL: torch.Tensor, right_TR: torch.Tensor) -> torch.Tensor:
        """Return a weight's corrected gradient leftᵀ · right, (L, R)."""
        base = self.bases[name]
        return _scaled_along(by_blocks(left_TL, base.rows).T @ by_blocks(right_TR, base.columns), base)


def _scaled_along(along_LR: torch.Tensor, base: Kronecker) -> torch.Tensor:
    """Return Q_L (s ⊙ along) Q_Rᵀ."""
    assert base.values is not None
    right = by_blocks(along_LR * base.values.to(along_LR.dtype), base.columns.mT)
    return by_blocks(right.T, base.rows.mT).T.contiguous()


def _narrowed(wide: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Cast to bfloat16 if `like` is bfloat16; float16 could overflow."""
    return wide.to(torch.bfloat16) if like.dtype == torch.bfloat16 else wide


def curvature_corrector(
    factors: Mapping[str, Kronecker], damping: float, power: float, device: torch.device
) -> Corrector:
    """Build the corrector (G + λ)^(−power) from the K-FAC or EK-FAC factors of all sketched layers."""
    total, corrected = damping_of(factors, damping), {}
    exact = True
    for name, layer in factors.items():
        if layer.values is not None:
            scale = (layer.values + total).pow(-power)
            corrected[name] = Kronecker(layer.rows.to(device), layer.columns.to(device), scale.to(device))
            continue
        exact = False
        row_ridge, column_ridge = _split_damping(layer, total)
        rows = inverse_power(layer.rows.to(device), row_ridge, power)
        columns = inverse_power(layer.columns.to(device), column_ridge, power)
        corrected[name] = Kronecker(rows.to(device), columns.to(device))
    return EkfacCorrector(corrected) if exact else KfacCorrector(corrected)


def _split_damping(factors: Kronecker, total: float) -> tuple[float, float]:
    """Split λ into a product of ridges for rows and columns, in the ratio of their mean eigenvalues."""
    means = [_trace(side) / (side.shape[0] * side.shape[1]) for side in (factors.rows, factors.columns)]
    ratio = (means[0] / means[1]) ** 0.5 if min(means) > 0 else 1.0
    return total**0.5 * ratio, total**0.5 / ratio


def identity_corrector(
    placements: list[Placement], model: Any, device: torch.device, *, has_values: bool
) -> KfacCorrector | EkfacCorrector:
    """Return a corrector of identity matrices, with the cost of a real one; with `has_values`, of EK-FAC."""
    blocks = {linear.name: linear.blocks for linear in linears_of(model)}
    factors = {}
    for p in placements:
        rows, columns = (
            torch.eye(size // blocks[p.name][side], device=device).repeat(blocks[p.name][side], 1, 1)
            for side, size in zip(("rows", "columns"), p.shape, strict=True)
        )
        factors[p.name] = Kronecker(rows, columns, torch.ones(p.shape, device=device) if has_values else None)
    return EkfacCorrector(factors) if has_values else KfacCorrector(factors)
