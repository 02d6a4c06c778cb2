"""Second moments: the factors of `adam` and `adam2`, their corrector, and their measurement.

As in Adafactor, the second moments V (L, R) of a matrix are approximated by the means of its rows and columns,
V_lr ≈ R_l C_r / mean(R). Such a scale is an outer product, and a layer's weight gradient is a product leftᵀ · right. So
each factor is scaled before the product, without a pass over the gradient. The V of a vector (a norm's weight, a bias)
is stored in full. A stack of matrices (mixture experts) is factored matrix by matrix, as in Adafactor.

The pass runs one sample at a time through the hooks, so it supports any model and keeps one parameter's gradient in
memory.

Shape letters: L and R rows and columns of a matrix, T tokens, B samples, H a vector's coordinates, S one sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lark_store.gradients.corrections.base import Corrector
from lark_store.gradients.paths.hooks import HookPath, choose_parameters
from lark_store.modeling.encoded import UnusableSampleError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lark_store.gradients.paths.hooks import NamedParameters
    from lark_store.modeling.tokens import Tokens

ROWS, COLUMNS = "rows", "columns"  # suffixes of tensor names


# --- factors and corrector -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """A parameter's second moments.

    Of a matrix, `rows` (…, L) and `columns` (…, R) are means over each row and each column. Of a vector, `rows` (H,)
    holds all of them and `columns` is None.
    """

    rows: torch.Tensor
    columns: torch.Tensor | None = None

    @classmethod
    def of(cls, squares: torch.Tensor) -> Moments:
        """Reduce a parameter's squared gradient."""
        if squares.dim() < 2:
            return cls(squares.double())
        return cls(squares.mean(dim=-1).double(), squares.mean(dim=-2).double())

    def plus(self, moments: Moments) -> Moments:
        """Return the sum."""
        columns = None if self.columns is None or moments.columns is None else self.columns + moments.columns
        return Moments(self.rows + moments.rows, columns)

    def over(self, n: int) -> Moments:
        """Return the moments divided by n, on the CPU."""
        return Moments((self.rows / n).cpu(), None if self.columns is None else (self.columns / n).cpu())

    def wide(self) -> Moments:
        """Return the moments in float64."""
        return Moments(self.rows.double(), None if self.columns is None else self.columns.double())

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Tell whether the moments belong to a parameter of this shape."""
        if self.columns is None:
            return len(shape) < 2 and tuple(self.rows.shape) == shape
        return (*self.rows.shape, self.columns.shape[-1]) == shape and self.columns.shape[:-1] == shape[:-2]

    def scale(self, power: float, damping: float, floor: float) -> Scale:
        """Return V^(−power) after adding `damping` times the mean to V, or `floor` where the mean is 0.

        Rows and columns of a matrix are damped separately.
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
    """A gradient's scale: `left` for a matrix's rows or a vector, `right` for a matrix's columns."""

    left: torch.Tensor
    right: torch.Tensor | None = None

    def to(self, device: torch.device) -> Scale:
        """Return the scale on a device."""
        return Scale(self.left.to(device), None if self.right is None else self.right.to(device))

    def whole(self, gradient: torch.Tensor) -> torch.Tensor:
        """Scale a parameter's whole gradient."""
        if self.right is None:
            return gradient.float() * self.left
        return (gradient.float() * self.left[..., :, None]).mul_(self.right[..., None, :])


class ScaleCorrector(Corrector):
    """Multiplies gradients by a scale per parameter; parameters without one stay unchanged."""

    def __init__(self, scales: Mapping[str, Scale]) -> None:
        self.scales = scales

    def whole(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Correct one sample's whole gradient of a parameter."""
        scale = self.scales.get(name)
        return gradient if scale is None else scale.whole(gradient)

    def left(self, name: str, left_TL: torch.Tensor, matrix_T: torch.Tensor | None = None) -> torch.Tensor:
        """Correct the left factor (T, L) of a matrix's gradient leftᵀ · right."""
        scale = self.scales.get(name)
        return left_TL if scale is None else _scaled(left_TL, _of_matrix(scale.left, matrix_T))

    def right(self, name: str, right_TR: torch.Tensor, matrix_T: torch.Tensor | None = None) -> torch.Tensor:
        """Correct the right factor, (T, R)."""
        scale = self.scales.get(name)
        if scale is None or scale.right is None:
            return right_TR
        return _scaled(right_TR, _of_matrix(scale.right, matrix_T))

    def rows(self, name: str, index_T: torch.Tensor, values_TR: torch.Tensor) -> torch.Tensor:
        """Correct values to add to the rows `index_T` of a matrix."""
        scale = self.scales.get(name)
        if scale is None or scale.right is None:
            return values_TR
        return values_TR * scale.left[index_T][:, None] * scale.right

    def vector(self, name: str, sums_BH: torch.Tensor) -> torch.Tensor:
        """Correct samples' gradients of a vector, (B, H)."""
        scale = self.scales.get(name)
        return sums_BH if scale is None else sums_BH * scale.left


def _of_matrix(scale: torch.Tensor, matrix_T: torch.Tensor | None) -> torch.Tensor:
    """Return a matrix's scale or, of a stack, the scale for each row's matrix."""
    return scale if matrix_T is None else scale[matrix_T]


def _scaled(factor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    wide = factor.float() if factor.dtype == torch.float16 else factor  # scales may overflow float16
    return wide * scale.to(wide.dtype)


def moment_corrector(
    moments: Mapping[str, Moments], power: float, damping: float, device: torch.device
) -> ScaleCorrector:
    """Build the corrector of scales V^(−power)."""
    n = sum(m.rows.numel() for m in moments.values())
    floor = sum(float(m.rows.sum()) for m in moments.values()) / max(1, n) or 1.0
    return ScaleCorrector({name: m.scale(power, damping, floor).to(device) for name, m in moments.items()})


# --- measurement ---------------------------------------------------------------------------------------------------


def tensors_of(moments: Mapping[str, Moments]) -> dict[str, torch.Tensor]:
    """Convert second moments to named tensors of the same dtype."""
    tensors = {}
    for name, parameter in moments.items():
        tensors[f"{name}/{ROWS}"] = parameter.rows
        if parameter.columns is not None:
            tensors[f"{name}/{COLUMNS}"] = parameter.columns
    return tensors


def moments_in(tensors: Mapping[str, torch.Tensor]) -> dict[str, Moments]:
    """Convert named tensors to second moments in float64."""
    names = {key.rpartition("/")[0] for key in tensors}
    return {name: Moments(tensors[f"{name}/{ROWS}"], tensors.get(f"{name}/{COLUMNS}")).wide() for name in names}


class MomentSums:
    """Sums samples' squared gradients over rows and columns; a sample counts after `commit`."""

    def __init__(self, parameters: NamedParameters, device: torch.device) -> None:
        self.device, self.corrector = device, Corrector()
        self.n = 0
        self._shapes = {name: tuple(p.shape) for name, p in parameters}
        self._sums: dict[str, Moments] = {}
        self._sample: dict[str, Moments] = {}

    def new(self) -> torch.Tensor:
        """Return an accumulator for a sample's squared norm, (1,)."""
        return torch.zeros(1, dtype=torch.float64, device=self.device)

    def add(self, name: str, gradient_SN: torch.Tensor, out: torch.Tensor) -> None:
        """Add a parameter's whole gradient, (1, P)."""
        squares = gradient_SN.view(self._shapes[name]).float().square()
        out += squares.sum(dtype=torch.float64)
        self._sample[name] = Moments.of(squares)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Return the gradient's norm, (1, 1)."""
        return out.sqrt().view(1, 1)

    def commit(self, *, keep: bool) -> None:
        """Add the sample to the sums, or drop it."""
        sample, self._sample = self._sample, {}
        if not keep:
            return
        self.n += 1
        for name, squares in sample.items():
            total = self._sums.get(name)
            self._sums[name] = squares if total is None else total.plus(squares)

    def sums(self) -> dict[str, Moments]:
        """Return the sums over the samples, for parameters with a gradient."""
        return self._sums

    def restore(self, sums: dict[str, Moments], n: int) -> None:
        """Resume from sums over `n` samples."""
        self.n = n
        self._sums = {
            name: Moments(total.rows.to(self.device), None if total.columns is None else total.columns.to(self.device))
            for name, total in sums.items()
        }

    def means(self) -> dict[str, Moments]:
        """Return the means over the samples, on the CPU; zero for parameters without a gradient."""
        empty = {name: Moments.of(torch.zeros(shape)) for name, shape in self._shapes.items() if name not in self._sums}
        return {name: total.over(self.n) for name, total in self._sums.items()} | empty


class MomentPass:
    """The only pass of a fit of second moments."""

    label = "second moments"

    def __init__(self, model: Any, device: torch.device, before: object = None) -> None:  # noqa: ARG002
        parameters = choose_parameters(model, None, None)
        self._moments = MomentSums(parameters, device)
        self._path = HookPath(model, parameters, self._moments)

    @property
    def n(self) -> int:
        """The number of usable samples."""
        return self._moments.n

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """The contents of a draft."""
        return tensors_of(self._moments.sums())

    def take(self, tokens: Tokens, seed: int) -> None:  # noqa: ARG002
        """Add a sample; on UnusableSampleError, nothing is added."""
        outcome = self._path.sketch([tokens])[0]
        self._moments.commit(keep=not isinstance(outcome, UnusableSampleError))
        if isinstance(outcome, UnusableSampleError):
            raise outcome

    def restore(self, sums: dict[str, torch.Tensor], n: int) -> None:
        """Resume from a draft's sums."""
        self._moments.restore(moments_in(sums), n)

    def result(self) -> dict[str, torch.Tensor]:
        """Return the means as tensors, on the CPU."""
        return tensors_of(self._moments.means())

    def close(self) -> None:
        """Release the model."""
        self._path.close()
