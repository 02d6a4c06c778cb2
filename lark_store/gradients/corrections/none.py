"""`none`: gradients as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lark_store.gradients.corrections.base import Corrector, GradientCorrection

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lark_store.gradients.sketch.placement import Placement


class NoCorrection(GradientCorrection):
    """Leaves gradients unchanged."""

    name = "none"

    def corrector(self, factors: Mapping[str, Any], damping: float, power: float, device: torch.device) -> Corrector:  # noqa: ARG002
        """Return the corrector without effect."""
        return Corrector()

    def stand_in(self, placements: list[Placement], model: Any, device: torch.device) -> Corrector:  # noqa: ARG002
        """Return the corrector without effect."""
        return Corrector()
