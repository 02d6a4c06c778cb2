"""`cka`: linear CKA of gradients (Kornblith et al. 2019, arXiv:1905.00414), matrix by matrix.

    CKA(A, B) = ‖Aᵀ B‖² / (‖Aᵀ A‖ ‖Bᵀ B‖)        Frobenius norms; A, B the gradients of one weight matrix

and a score is the mean over all matrices. In a gradient (L, R) the shorter side stands for CKA's examples, the longer
for its features, so ‖Aᵀ B‖² = ⟨A Aᵀ, B Bᵀ⟩ is a dot product of small matrices; rows are not centred. Bao et al. (2025,
arXiv:2505.05017) take the whole gradient for one example: uncentred that is no more than the squared cosine.

It is from 0 to 1 and has no sign: what helps and what harms look alike.

Shape letters: Q queries, N samples, L and R rows and columns of a matrix, D numbers of all A Aᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lark_store.evaluate.rivals.gradients import HELD, parameters_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.evaluate.material import Material
    from lark_store.evaluate.rivals.given import Given, Matrix


@dataclass(frozen=True)
class Taken:
    """Which parameters: those of a `sketcher` (default: all)."""

    sketcher: str | None = None


def cka(material: Material, given: Given) -> Matrix:
    """Score by the linear CKA of gradients, (Q, N): `cka[:SKETCHER]@CHECKPOINT`.

    Raises
    ------
    InputError, NameUnknownError
    """
    how = given.settings(Taken)
    loaded = given.loaded(material)
    held = parameters_of(material.store, loaded, how.sketcher)
    queries, samples = loaded.tokens(material.queries), loaded.tokens(material.samples)
    made = np.empty((len(queries), len(samples)), np.float32)
    width = sum(min(p.flatten(1).shape) ** 2 for _, p in held.chosen if p.dim() > 1)
    size = max(1, HELD // (4 * max(1, width)))
    for start in range(0, len(queries), size):
        block = slice(start, min(start + size, len(queries)))
        query_QD = torch.stack([aligned(held.parts(tokens)) for tokens in queries[block]])
        for i, tokens in enumerate(samples):
            made[block, i] = (query_QD @ aligned(held.parts(tokens))).cpu().numpy()
            given.say("scores", start * len(samples) + (i + 1) * (block.stop - start), made.size)
    return made


def aligned(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what the dot product of two samples' is their mean CKA, (D,) float32; vectors are left out."""
    matrices = [g.flatten(1).float() for g in gradients if g.dim() > 1]
    wide = [g if g.shape[0] <= g.shape[1] else g.T for g in matrices]
    grams = [torch.nn.functional.normalize((g @ g.T).flatten(), dim=0) for g in wide]
    made: torch.Tensor = torch.cat(grams) / len(grams) ** 0.5
    return made
