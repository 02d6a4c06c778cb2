"""`ekfac`: K-FAC with the diagonal of the curvature measured along its eigenvectors; see `kronecker`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lark_store.gradients.corrections.kfac import KfacCorrection, KfacFactors

if TYPE_CHECKING:
    from lark_store.gradients.corrections.base import FitPass


class EkfacFactors(KfacFactors):
    """The eigenvectors of A and S, and the curvature's diagonal along them."""

    kind = "ekfac"
    noun = "EK-FAC factors"
    recipe: ClassVar = {
        "curvature": "of each sample's mean loss, labels drawn from the model; eigenvalues along those of A and S"
    }
    starts_from = "kfac"

    def passes(self) -> tuple[type[FitPass], ...]:
        """Return the passes of a fit: second moments, then eigenvalues."""
        from lark_store.gradients.corrections.fisher import CurvatureSums, EigenvalueSums

        return CurvatureSums, EigenvalueSums


class EkfacCorrection(KfacCorrection):
    """Multiplies gradients by (G + λ)^(−power), with EK-FAC's G."""

    name = "ekfac"
    meaning = "the same, with G measured along its eigenvectors"
    factors = EkfacFactors()
    has_values = True
