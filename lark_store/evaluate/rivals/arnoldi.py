"""`arnoldi`: influence on the leading eigenvectors of the curvature alone (Schioppa et al. 2022, arXiv:2112.03052).

    score(q, z) = Σ_i (v_i · g_q) (v_i · g_z) / λ_i        over the RANK largest eigenvalues λ_i of G

G is the Gauss–Newton matrix over the fine-tuning samples, whose eigenvectors are found by Arnoldi iteration. What
gradients have outside their span counts for nothing, however large it is.

Shape letters: Q queries, N samples, K basis vectors, R eigenvectors, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import psutil
import torch
from pydantic import Field

from lark_store.errors import InputError
from lark_store.evaluate.rivals import solvers
from lark_store.evaluate.rivals.curvature import GaussNewton, tuned_on
from lark_store.evaluate.rivals.gradients import parameters_of

if TYPE_CHECKING:
    from lark_store.evaluate.material import Material
    from lark_store.evaluate.rivals.given import Given, Matrix

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Leading:
    """How many eigenvectors, found in how many `steps` (default: twice as many); `samples`, `sketcher` as of `cg`."""

    rank: Count = 20
    steps: Count | None = None
    samples: Count | None = None
    sketcher: str | None = None


def arnoldi(material: Material, given: Given) -> Matrix:
    """Score in the space of the curvature's leading eigenvectors, (Q, N): `arnoldi:RANK[,steps=…]@CHECKPOINT`.

    Raises
    ------
    InputError
        The basis does not fit into memory, or there are fewer steps than eigenvectors.
    NameUnknownError
    """
    how = given.settings(Leading)
    steps = how.steps or 2 * how.rank
    if steps < how.rank:
        raise InputError(f"`{given.spec}`: {steps} steps find no {how.rank} eigenvectors", "say more `steps=`")
    loaded = given.loaded(material)
    held = parameters_of(material.store, loaded, how.sketcher)
    _check_memory(given, steps, held.size)
    matrix = GaussNewton(held, loaded.tokens(tuned_on(material, how.samples, given.seed)))
    start_P = torch.randn(held.size, generator=torch.Generator().manual_seed(given.seed)).to(held.device)
    basis = solvers.arnoldi(
        matrix.product, start_P, how.rank, steps, lambda step: given.say("eigenvectors", step, steps)
    )
    made = []
    for texts in (material.queries, material.samples):
        rows = []
        for i, tokens in enumerate(loaded.tokens(texts)):
            rows.append(basis.project(held.gradient(tokens)))
            given.say("scores", i + 1, len(texts))
        made.append(torch.stack(rows))
    given.note(
        f"`{given.spec}`: {len(basis.values_R)} eigenvalues from {float(basis.values_R[0]):.3g} to "
        f"{float(basis.values_R[-1]):.3g}, G of {len(matrix.samples)} samples and {held.size} parameters"
    )
    return (made[0] @ made[1].T).cpu().numpy()


def _check_memory(given: Given, steps: int, size: int) -> None:
    needed, free = 4 * steps * size, psutil.virtual_memory().available
    if needed > 0.8 * free:
        raise InputError(
            f"`{given.spec}`: {steps} vectors of {size} parameters take {needed / 1e9:.0f} GB, of which "
            f"{free / 1e9:.0f} are free",
            "say a smaller rank, fewer `steps=`, or a `sketcher=` of fewer parameters",
        )
