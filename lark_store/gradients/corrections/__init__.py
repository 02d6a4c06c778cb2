"""Corrections: gradients are rescaled before sketching. One module per correction, and this registry of them.

To add one, write a subclass of `GradientCorrection` in a module of its own and list it in `CORRECTIONS`. Options, help,
messages and the reference of SQL views are generated from the registry.

Many corrections act on the factors of a layer's weight gradient, leftᵀ · right, *before* the product, without a pass
over the gradient: see `Corrector`.

    none, tensor, adam (adam and adam2), kfac, ekfac     the corrections
    base              their interface
    second_moments    factors and correctors of adam
    kronecker         factors and correctors of kfac and ekfac
    linear_layers     the layers corrected by kfac and ekfac
    fisher            the passes of their fits
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.core.text import coded, joined
from lark_store.errors import InputError
from lark_store.gradients.corrections.adam import SECOND_MOMENTS, Adam2Correction, AdamCorrection
from lark_store.gradients.corrections.base import DEFAULT_DAMPING, DEFAULT_POWER, Corrector, Factors, GradientCorrection
from lark_store.gradients.corrections.ekfac import EkfacCorrection
from lark_store.gradients.corrections.kfac import KfacCorrection
from lark_store.gradients.corrections.none import NoCorrection
from lark_store.gradients.corrections.tensor import TensorCorrection

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CORRECTIONS",
    "DEFAULT_DAMPING",
    "DEFAULT_POWER",
    "SECOND_MOMENTS",
    "Corrector",
    "Factors",
    "GradientCorrection",
    "correction_help",
    "factors_for",
    "factors_of_kind",
    "kinds_help",
    "users_by_kind",
]

CORRECTIONS: dict[str, GradientCorrection] = {
    correction.name: correction
    for correction in (
        NoCorrection(),
        TensorCorrection(),
        AdamCorrection(),
        Adam2Correction(),
        KfacCorrection(),
        EkfacCorrection(),
    )
}


def correction_help() -> str:
    """Return the help of `--correction`: all names with their meanings."""
    return f"{joined(_explained(CORRECTIONS.values()), 'or')}."


def _explained(corrections: Iterable[GradientCorrection]) -> list[str]:
    return [f"`{c.name}` ({c.meaning})" if c.meaning else f"`{c.name}`" for c in corrections]


def factors_of_kind(kind: str) -> Factors:
    """Return the factors of a kind."""
    return next(c.factors for c in CORRECTIONS.values() if c.factors is not None and c.factors.kind == kind)


def factors_for(correction: str) -> Factors:
    """Return the factors of a correction.

    Raises
    ------
    InputError
        The correction is unknown or needs no factors.
    """
    factors = CORRECTIONS[correction].factors if correction in CORRECTIONS else None
    if factors is None:
        raise InputError(f"the correction `{correction}` has no factors to fit", f"the kinds are {kinds_help('and')}")
    return factors


def users_by_kind() -> dict[str, list[str]]:
    """Return the names of the corrections by the kind of their factors."""
    users: dict[str, list[str]] = {}
    for correction in CORRECTIONS.values():
        if correction.factors is not None:
            users.setdefault(correction.factors.kind, []).append(correction.name)
    return users


def kinds_help(conjunction: str = "or") -> str:
    """Return all kinds of factors in a sentence, each with its other corrections."""
    kinds = []
    for kind, users in users_by_kind().items():
        others = coded(name for name in users if name != kind)
        kinds.append(f"`{kind}` (also used by {joined(others, 'and')})" if others else f"`{kind}`")
    return joined(kinds, conjunction)
