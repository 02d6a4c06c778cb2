"""The interface of a correction: a subclass of `GradientCorrection`, with one entry in the registry.

Nothing here imports torch, so `lark-store sketcher add` and the options' help know all corrections at once. A variant's
module imports torch in its methods, or in modules of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lark_store.gradients.paths.hooks import NamedParameters
    from lark_store.gradients.sketch.placement import Placement
    from lark_store.modeling.tokens import Tokens

    Tensors = dict[str, torch.Tensor]

DEFAULT_DAMPING = 0.1
DEFAULT_POWER = 0.5


class Corrector:
    """Corrects gradients, whole or factor by factor. This one changes nothing.

    `by_product`: a matrix's factors can't be corrected separately, only through `product`. `whole_only`: the reason if
    only whole gradients can be corrected.

    Shape letters: L and R rows and columns of a matrix, T tokens, B samples, H a vector's coordinates.
    """

    by_product: ClassVar[bool] = False
    whole_only: ClassVar[str | None] = None

    def whole(self, name: str, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Correct one sample's whole gradient of a parameter."""
        return gradient

    def whole_like(self, name: str, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Rescale another value of a parameter's shape as `whole` rescales this gradient.

        The map is symmetric: ⟨whole(g), v⟩ = ⟨g, whole_like(v, g)⟩.
        """
        return self.whole(name, value)

    def left(self, name: str, left_TL: torch.Tensor, matrix_T: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """Correct the left factor (T, L) of a matrix's gradient leftᵀ · right.

        Of a stack of matrices, `matrix_T` has the number of each row's matrix.
        """
        return left_TL

    def right(self, name: str, right_TR: torch.Tensor, matrix_T: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """Correct the right factor, (T, R)."""
        return right_TR

    def product(self, name: str, left_TL: torch.Tensor, right_TR: torch.Tensor) -> torch.Tensor:
        """Return a matrix's corrected gradient leftᵀ · right, (L, R)."""
        return self.left(name, left_TL).T @ self.right(name, right_TR)

    def rows(self, name: str, index_T: torch.Tensor, values_TR: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Correct values to add to the rows `index_T` of a matrix."""
        return values_TR

    def vector(self, name: str, sums_BH: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Correct samples' gradients of a vector, (B, H)."""
        return sums_BH


class FitPass(Protocol):
    """One pass over the samples: `sums` over the `n` usable samples, and a result."""

    label: str

    def __init__(self, model: Any, device: torch.device, before: Tensors | None = None) -> None: ...

    @property
    def n(self) -> int:
        """The number of usable samples."""
        ...

    @property
    def sums(self) -> Tensors:
        """The contents of a draft."""
        ...

    def take(self, tokens: Tokens, seed: int) -> None:
        """Add a sample; on UnusableSampleError, nothing is added."""
        ...

    def restore(self, sums: Tensors, n: int) -> None:
        """Resume from a draft's sums."""
        ...

    def result(self) -> Tensors:
        """Return the input of the next pass, or the factors: tensors named `parameter/part`, on the CPU."""
        ...

    def close(self) -> None:
        """Release the model."""
        ...


class ParameterFactors(Protocol):
    """One parameter's factors."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Tell whether the factors belong to a parameter of this shape."""
        ...


class Factors:
    """Statistics of a model's gradients at a checkpoint, fitted to samples and stored once per checkpoint.

    `kind` names them in the catalog, `noun` in messages. `recipe` describes the measurement, for the catalog.
    `starts_from` names the kind whose factors equal the first pass's result. `in_optimizer`: Adam's state has them.
    """

    kind: ClassVar[str]
    noun: ClassVar[str]
    recipe: ClassVar[dict[str, str]]
    starts_from: ClassVar[str | None] = None
    in_optimizer: ClassVar[bool] = False

    def passes(self) -> tuple[type[FitPass], ...]:
        """Return the passes of a fit, in order."""
        raise NotImplementedError

    def parse(self, tensors: Tensors) -> Mapping[str, ParameterFactors]:
        """Return each parameter's factors from stored tensors.

        Raises
        ------
        KeyError
            A tensor is missing.
        """
        raise NotImplementedError


class GradientCorrection:
    """A correction of gradients before sketching.

    `name` is its name in `--correction`, `meaning` its help. `factors` are the statistics it needs, None for none; a
    correction with factors has a damping. `powers` are the exponents it accepts, none for most.
    """

    name: ClassVar[str]
    meaning: ClassVar[str] = ""
    factors: ClassVar[Factors | None] = None
    powers: ClassVar[tuple[float, ...]] = ()

    def parameters(self, model: Any, parameters: NamedParameters) -> NamedParameters:  # noqa: ARG002
        """Return the supported ones of a model's parameters.

        Raises
        ------
        InputError
            It supports none of them.
        """
        return parameters

    def corrector(self, factors: Mapping[str, Any], damping: float, power: float, device: torch.device) -> Corrector:
        """Build the corrector from the sketched parameters' factors."""
        raise NotImplementedError

    def stand_in(self, placements: list[Placement], model: Any, device: torch.device) -> Corrector:
        """Return a corrector of the same cost, to measure time and memory before factors exist."""
        raise NotImplementedError
