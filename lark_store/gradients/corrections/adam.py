"""`adam` and `adam2`: gradients in the geometry of Adam's step.

One Adam step on a sample z moves the weights by −η V^(−1/2) ∇L(z), where V holds the second moments of the training
gradients. It changes a query's loss by −η ⟨V^(−1/4) ∇L(q), V^(−1/4) ∇L(z)⟩: with both sides scaled by V^(−1/4), a dot
product of gradients is the influence of a real step. `adam2` scales by V^(−1/2), which whitens each coordinate. For the
approximation of V see `lark_store.gradients.corrections.second_moments`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lark_store.gradients.corrections.base import DEFAULT_DAMPING, Corrector, Factors, GradientCorrection

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lark_store.gradients.corrections.base import FitPass
    from lark_store.gradients.corrections.second_moments import Moments
    from lark_store.gradients.sketch.placement import Placement

SECOND_MOMENTS = "adam"  # the factors' kind


class SecondMoments(Factors):
    """The means of the squared gradients, as means of each matrix's rows and columns."""

    kind = SECOND_MOMENTS
    noun = "second moments"
    recipe: ClassVar = {"moments": "means over samples of the squared gradient of each one's mean loss"}
    in_optimizer = True

    def passes(self) -> tuple[type[FitPass], ...]:
        """Return the only pass of a fit."""
        from lark_store.gradients.corrections.second_moments import MomentPass

        return (MomentPass,)

    def parse(self, tensors: dict[str, torch.Tensor]) -> dict[str, Moments]:
        """Return each parameter's second moments."""
        from lark_store.gradients.corrections.second_moments import moments_in

        return moments_in(tensors)


class AdamCorrection(GradientCorrection):
    """Scales gradients by V^(−1/4)."""

    name = "adam"
    meaning = "Adam's geometry, V^(−1/4)"
    factors = SecondMoments()
    exponent: ClassVar[float] = 0.25  # of 1 / V

    def corrector(self, factors: Mapping[str, Any], damping: float, power: float, device: torch.device) -> Corrector:  # noqa: ARG002
        """Build the corrector from second moments."""
        from lark_store.gradients.corrections.second_moments import moment_corrector

        return moment_corrector(factors, self.exponent, damping, device)

    def stand_in(self, placements: list[Placement], model: Any, device: torch.device) -> Corrector:  # noqa: ARG002
        """Return a corrector of the same cost, from second moments of 1."""
        import torch

        from lark_store.gradients.corrections.second_moments import Moments

        moments = {p.name: Moments.of(torch.ones(p.shape)) for p in placements}
        return self.corrector(moments, DEFAULT_DAMPING, 0.0, device)


class Adam2Correction(AdamCorrection):
    """Scales gradients by V^(−1/2)."""

    name = "adam2"
    meaning = "V^(−1/2)"
    exponent = 0.5
