"""`kfac`: gradients times a power of the inverse curvature, by K-FAC; see `kronecker`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lark_store.gradients.corrections.base import Corrector, Factors, GradientCorrection

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lark_store.gradients.corrections.base import FitPass
    from lark_store.gradients.corrections.kronecker import Kronecker
    from lark_store.gradients.paths.hooks import NamedParameters
    from lark_store.gradients.sketch.placement import Placement


class KfacFactors(Factors):
    """The second moments A and S of each linear layer's inputs and output gradients."""

    kind = "kfac"
    noun = "K-FAC factors"
    recipe: ClassVar = {
        "curvature": "of each sample's mean loss, labels drawn from the model; A a mean over positions, S samples"
    }

    def passes(self) -> tuple[type[FitPass], ...]:
        """Return the only pass of a fit."""
        from lark_store.gradients.corrections.fisher import CurvatureSums

        return (CurvatureSums,)

    def parse(self, tensors: dict[str, torch.Tensor]) -> dict[str, Kronecker]:
        """Return each weight's factors."""
        from lark_store.gradients.corrections.fisher import kronecker_of

        return {name: kronecker_of(tensors, name) for name in {key.rpartition("/")[0] for key in tensors}}


class KfacCorrection(GradientCorrection):
    """Multiplies gradients by (G + λ)^(−power), with K-FAC's G."""

    name = "kfac"
    meaning = "the curvature G, linear layers only"
    factors: ClassVar[Factors | None] = KfacFactors()
    powers = (0.5, 1)
    has_values: ClassVar[bool] = False  # eigenvalues beside the eigenvectors

    def parameters(self, model: Any, parameters: NamedParameters) -> NamedParameters:
        """Return the weights of linear layers.

        Raises
        ------
        InputError
            There are none.
        """
        from lark_store.gradients.corrections.linear_layers import linear_weights

        return linear_weights(model, parameters)

    def corrector(self, factors: Mapping[str, Any], damping: float, power: float, device: torch.device) -> Corrector:
        """Build the corrector from the factors of all sketched layers."""
        from lark_store.gradients.corrections.kronecker import curvature_corrector

        return curvature_corrector(factors, damping, power, device)

    def stand_in(self, placements: list[Placement], model: Any, device: torch.device) -> Corrector:
        """Return a corrector of the same cost, from identity matrices."""
        from lark_store.gradients.corrections.kronecker import identity_corrector

        return identity_corrector(placements, model, device, has_values=self.has_values)
