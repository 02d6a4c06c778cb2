"""`tensor`: each parameter's gradient is scaled to norm 1. Needs whole gradients, one sample at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lark_store.gradients.corrections.base import Corrector, GradientCorrection

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lark_store.gradients.sketch.placement import Placement


class NormCorrector(Corrector):
    """Scales each parameter's gradient to norm 1; a zero gradient stays zero."""

    whole_only = "scaling a tensor's gradient to norm 1 needs the whole gradient"

    def whole(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Correct one sample's whole gradient of a parameter."""
        return self.whole_like(name, gradient, gradient)

    def whole_like(self, name: str, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Divide a value by the norm of a gradient, which is fixed."""
        import torch

        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        return value if norm == 0 else value.float() / norm


class TensorCorrection(GradientCorrection):
    """Gives each parameter's gradient the norm 1."""

    name = "tensor"
    meaning = "each parameter to norm 1"

    def corrector(self, factors: Mapping[str, Any], damping: float, power: float, device: torch.device) -> Corrector:  # noqa: ARG002
        """Return the corrector; it needs no factors."""
        return NormCorrector()

    def stand_in(self, placements: list[Placement], model: Any, device: torch.device) -> Corrector:  # noqa: ARG002
        """Return the corrector."""
        return NormCorrector()
