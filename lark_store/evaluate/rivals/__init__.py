"""Rivals of the store's scores, by name: other methods, and negative controls that know nothing of influence.

A rival is a function of a `Material` and of what it is `Given`; it returns a matrix (Q, N), higher = more helpful. To
add one, put it into `RIVALS`.

    lexical     bm25, bm25plus
    hidden      repsim, encoder: cosines of representations
    cka         cka: alignment of gradients, matrix by matrix
    trak        trak: projected gradients and their kernel
    arnoldi     arnoldi: the leading eigenvectors of the curvature
    inverse     cg, lissa: the curvature's inverse, slow and exact
    controls    random, length, same

    given       what a rival is given; settings from its name
    gradients   whole gradients of one model, some at a time
    curvature   products with the Gauss–Newton matrix
    solvers     conjugate gradient, LiSSA, Arnoldi for any such product
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.evaluate.rivals.arnoldi import arnoldi
from lark_store.evaluate.rivals.cka import cka
from lark_store.evaluate.rivals.controls import length, random, same
from lark_store.evaluate.rivals.given import Given
from lark_store.evaluate.rivals.hidden import encoder, repsim
from lark_store.evaluate.rivals.inverse import cg, lissa
from lark_store.evaluate.rivals.lexical import bm25, bm25plus
from lark_store.evaluate.rivals.trak import trak

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.evaluate.material import Material
    from lark_store.evaluate.rivals.given import Matrix

__all__ = ["RIVALS", "Given"]

RIVALS: dict[str, Callable[[Material, Given], Matrix]] = {
    "bm25": bm25,
    "bm25plus": bm25plus,
    "repsim": repsim,
    "encoder": encoder,
    "cka": cka,
    "trak": trak,
    "arnoldi": arnoldi,
    "cg": cg,
    "lissa": lissa,
    "random": random,
    "length": length,
    "same": same,
}
