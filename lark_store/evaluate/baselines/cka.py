"""`cka`: linear CKA of gradients (Kornblith et al. 2019, arXiv:1905.00414), matrix by matrix.

    CKA(A, B) = ‖Aᵀ B‖² / (‖Aᵀ A‖ ‖Bᵀ B‖)        Frobenius norms; A, B the gradients of one weight matrix

and a score is the mean over all matrices. In a gradient (L, R) the shorter side plays the role of CKA's examples and
the longer side its features, so ‖Aᵀ B‖² = ⟨A Aᵀ, B Bᵀ⟩ is a dot product of small matrices; rows are not centred. Bao et
al. (2025, arXiv:2505.05017) treat the whole gradient as one example, which without centring is the squared cosine.

A score lies between 0 and 1 and has no sign: helpful and harmful samples look alike.

Shape letters: Q queries, N samples, L and R rows and columns of a matrix, D numbers of all A Aᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lark_store.evaluate.baselines.checks import check_model
from lark_store.evaluate.baselines.full_gradients import MEMORY_LIMIT, open_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.evaluate.baselines.context import BaselineContext, Matrix
    from lark_store.evaluate.dataset import Material


@dataclass(frozen=True)
class CkaSettings:
    """The parameters to use: those of a `sketcher` (default: all)."""

    sketcher: str | None = None


def cka(material: Material, context: BaselineContext) -> Matrix:
    """Score by the linear CKA of gradients, (Q, N): `cka[:SKETCHER]@CHECKPOINT`.

    Raises
    ------
    InputError, NameUnknownError
    """
    settings = context.settings(CkaSettings)
    loaded, parameters = open_model(material, context, settings.sketcher)
    queries, samples = context.tokens(loaded, material)
    scores = np.empty((len(queries), len(samples)), np.float32)
    width = sum(min(p.flatten(1).shape) ** 2 for _, p in parameters.chosen if p.dim() > 1)
    size = max(1, MEMORY_LIMIT // (4 * max(1, width)))
    for start in range(0, len(queries), size):
        block = slice(start, min(start + size, len(queries)))
        query_QD = torch.stack([aligned(parameters.parts(tokens)) for tokens in queries[block]])
        for i, tokens in enumerate(samples):
            with context.preparation.candidates(-(-len(queries) // size)):
                aligned_D = aligned(parameters.parts(tokens))
            scores[block, i] = (query_QD @ aligned_D).cpu().numpy()
            context.say("scores", start * len(samples) + (i + 1) * (block.stop - start), scores.size)
    return scores


def check_cka(material: Material, context: BaselineContext) -> None:
    """Check the settings and the checkpoint."""
    check_model(material, context, CkaSettings)


def aligned(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a vector (D,) float32 whose dot product with another sample's is their mean CKA; skips 1-D parameters."""
    matrices = [g.flatten(1).float() for g in gradients if g.dim() > 1]
    wide = [g if g.shape[0] <= g.shape[1] else g.T for g in matrices]
    grams = [torch.nn.functional.normalize((g @ g.T).flatten(), dim=0) for g in wide]
    vector: torch.Tensor = torch.cat(grams) / len(grams) ** 0.5
    return vector
