"""What a gradient is multiplied by before it is sketched: the geometry of the optimizer that trains with it.

One step of Adam on a sample z moves the weights by −η V^(−1/2) ∇L(z), where V holds the second moments of the training
gradients. So it changes a query's loss by −η ⟨V^(−1/4) ∇L(q), V^(−1/4) ∇L(z)⟩: scaled so on both sides, the dot product
of two gradients is the influence of a real step. Adafactor's approximation keeps of a matrix's V (L, R) the means of
its rows and columns, and V_lr ≈ R_l C_r / mean(R). A scale that is an outer product need not touch the gradient: a
layer's weight gradient is a product leftᵀ · right of its input and output gradient, and each takes its own share
*before* they are multiplied, so no pass over the gradient is added.

- `adam`: V^(−1/4) on the gradient, the geometry of Adam's step
- `adam2`: V^(−1/2), which whitens each coordinate
- `tensor`: each parameter's gradient scaled to norm 1; it takes the gradient whole, one sample at a time
- `kfac` and `ekfac`: the model's curvature, in `lark_store.ingest.curvature`

A vector (a norm's weight, a bias) has no rows and columns: its V is kept number by number. Of a stack of matrices (the
experts of a mixture) each is factored by itself, as Adafactor does.

Shape letters: L and R rows and columns of a matrix, T tokens, B samples, H a vector's coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

CORRECTIONS = ("none", "tensor", "adam", "adam2", "kfac", "ekfac")
POWERS = {"adam": 0.25, "adam2": 0.5}  # of 1 / V
SECOND_MOMENTS, KFAC, EKFAC = "adam", "kfac", "ekfac"  # the kinds of factors
FACTORS = {"adam": SECOND_MOMENTS, "adam2": SECOND_MOMENTS, "kfac": KFAC, "ekfac": EKFAC}  # what a correction needs
CURVATURES = (KFAC, EKFAC)
IN_WORDS = {SECOND_MOMENTS: "second moments", KFAC: "K-FAC factors", EKFAC: "EK-FAC factors"}
DEFAULT_DAMPING = 0.1
ALL, CONTENT = "all", "content"  # a sketcher's `positions`
NORM_1 = "a tensor's gradient that is scaled to norm 1 must be there whole"


@dataclass(frozen=True)
class Moments:
    """A parameter's second moments: means over the rows (…, L) and columns (…, R) of a matrix; all, (H,), of a vector.

    `rows` are the means over each row's numbers, `columns` those over each column's, None for a vector.
    """

    rows: torch.Tensor
    columns: torch.Tensor | None = None

    @classmethod
    def of(cls, squares: torch.Tensor) -> Moments:
        """Return those of a parameter's squared gradient."""
        if squares.dim() < 2:
            return cls(squares.double())
        return cls(squares.mean(dim=-1).double(), squares.mean(dim=-2).double())

    def plus(self, other: Moments) -> Moments:
        """Return the sum."""
        columns = None if self.columns is None or other.columns is None else self.columns + other.columns
        return Moments(self.rows + other.rows, columns)

    def over(self, n: int) -> Moments:
        """Return them divided by a number, on the CPU."""
        return Moments((self.rows / n).cpu(), None if self.columns is None else (self.columns / n).cpu())

    def wide(self) -> Moments:
        """Return them in float64."""
        return Moments(self.rows.double(), None if self.columns is None else self.columns.double())

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Tell whether they are those of a parameter of this shape."""
        if self.columns is None:
            return len(shape) < 2 and tuple(self.rows.shape) == shape
        return (*self.rows.shape, self.columns.shape[-1]) == shape and self.columns.shape[:-1] == shape[:-2]

    def scale(self, power: float, damping: float, floor: float) -> Scale:
        """Return V^(−power), with `damping` times the mean added to V; `floor` is the mean where there is none.

        The rows and columns of a matrix are damped each; a matrix that had no gradient at all has the floor for both.
        """
        mean = self.rows.mean(dim=-1, keepdim=True)
        rest = torch.where(mean > 0, damping * mean, floor)
        rows = self.rows + rest
        if self.columns is None:
            return Scale(rows.pow(-power).float())
        columns = self.columns + rest
        return Scale((rows / rows.mean(dim=-1, keepdim=True)).pow(-power).float(), columns.pow(-power).float())


@dataclass(frozen=True)
class Scale:
    """What a gradient is multiplied by: a matrix's rows by `left`, its columns by `right`; a vector by `left` alone."""

    left: torch.Tensor
    right: torch.Tensor | None = None

    def to(self, device: torch.device) -> Scale:
        """Return it on a device."""
        return Scale(self.left.to(device), None if self.right is None else self.right.to(device))

    def whole(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return a parameter's whole gradient, scaled."""
        if self.right is None:
            return gradient.float() * self.left
        return (gradient.float() * self.left[..., :, None]).mul_(self.right[..., None, :])


class Corrector:
    """Corrects gradients, whole or by the factors that they are made of; without arguments it changes nothing.

    `by_product`: a matrix's factors are not corrected each, but as they are multiplied, by `product`.
    """

    by_product = False

    def __init__(self, scales: Mapping[str, Scale] | None = None, *, norm_1: bool = False) -> None:
        self.scales = scales or {}
        self.norm_1 = norm_1
        self.whole_only = NORM_1 if norm_1 else None  # why a gradient can't be corrected by its factors

    def whole(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Return a parameter's whole gradient, of one sample."""
        if self.norm_1:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            return gradient if norm == 0 else gradient.float() / norm
        scale = self.scales.get(name)
        return gradient if scale is None else scale.whole(gradient)

    def left(self, name: str, left_TL: torch.Tensor) -> torch.Tensor:
        """Return what takes the place of the left factor, (T, L), of a matrix's gradient leftᵀ · right."""
        scale = self.scales.get(name)
        return left_TL if scale is None else _scaled(left_TL, scale.left)

    def right(self, name: str, right_TR: torch.Tensor) -> torch.Tensor:
        """Return what takes the place of the right factor, (T, R)."""
        scale = self.scales.get(name)
        return right_TR if scale is None or scale.right is None else _scaled(right_TR, scale.right)

    def product(self, name: str, left_TL: torch.Tensor, right_TR: torch.Tensor) -> torch.Tensor:
        """Return a matrix's whole gradient leftᵀ · right, (L, R)."""
        return self.left(name, left_TL).T @ self.right(name, right_TR)

    def rows(self, name: str, index_T: torch.Tensor, values_TR: torch.Tensor) -> torch.Tensor:
        """Return what takes the place of values that are added to the rows `index_T` of a matrix."""
        scale = self.scales.get(name)
        if scale is None or scale.right is None:
            return values_TR
        return values_TR * scale.left[index_T][:, None] * scale.right

    def vector(self, name: str, sums_BH: torch.Tensor) -> torch.Tensor:
        """Return samples' gradients of a vector, (B, H)."""
        scale = self.scales.get(name)
        return sums_BH if scale is None else sums_BH * scale.left


def _scaled(factor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    wide = factor.float() if factor.dtype == torch.float16 else factor  # scales may be larger than float16 holds
    return wide * scale.to(wide.dtype)


def corrector_of(moments: Mapping[str, Moments], kind: str, damping: float, device: torch.device) -> Corrector:
    """Return the corrector `adam` or `adam2` for these second moments."""
    n = sum(each.rows.numel() for each in moments.values())
    floor = sum(float(each.rows.sum()) for each in moments.values()) / max(1, n) or 1.0
    return Corrector({name: each.scale(POWERS[kind], damping, floor).to(device) for name, each in moments.items()})
