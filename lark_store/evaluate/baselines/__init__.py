"""Baselines for the store's scores, by name: other methods, and negative controls unrelated to influence.

A baseline is a function of a `Material` and a `BaselineContext`; it returns a matrix (Q, N), higher = more helpful. To
add one, write it with its check in a module of its own and list it in `BASELINES`.

    lexical, representations, dot_products, cka, trak, arnoldi, exact_inverse, measured, controls     the baselines

    base             the interface
    checks           shared by the checks of a baseline's name before any computation
    cache            slow scores on disk
    preparation      the time of a score, and the results that trials share
    context          the context of a baseline; settings from its name
    full_gradients   full gradients of one model, a few at a time
    gauss_newton     products with the Gauss–Newton matrix
    solvers          conjugate gradient, LiSSA, Arnoldi for any matrix–vector product
"""

from __future__ import annotations

from lark_store.evaluate.baselines.arnoldi import arnoldi, check_arnoldi
from lark_store.evaluate.baselines.base import Baseline
from lark_store.evaluate.baselines.cka import check_cka, cka
from lark_store.evaluate.baselines.context import BaselineContext
from lark_store.evaluate.baselines.controls import check_length, check_random, length, random, same, same_values
from lark_store.evaluate.baselines.dot_products import check_ekfac_full, check_gdp, ekfac_full, gdp
from lark_store.evaluate.baselines.exact_inverse import cg, check_cg, check_lissa, lissa
from lark_store.evaluate.baselines.lexical import bm25, bm25_okapi, bm25plus, check_lexical
from lark_store.evaluate.baselines.measured import eif
from lark_store.evaluate.baselines.representations import check_encoder, check_repsim, encoder, repsim
from lark_store.evaluate.baselines.trak import check_trak, trak

__all__ = ["BASELINES", "Baseline", "BaselineContext"]

BASELINES: dict[str, Baseline] = {
    "bm25": Baseline("Lucene's BM25 of the texts", bm25, check_lexical),
    "bm25-okapi": Baseline("rank-bm25's BM25Okapi of the texts", bm25_okapi, check_lexical),
    "bm25plus": Baseline("BM25+ of the texts", bm25plus, check_lexical),
    "repsim": Baseline("cosine of the model's representations", repsim, check_repsim, is_across=True),
    "encoder": Baseline("cosine of a sentence encoder's representations", encoder, check_encoder),
    "gdp": Baseline("dot product of full gradients", gdp, check_gdp, is_slow=True),
    "ekfac-full": Baseline("EK-FAC of full gradients", ekfac_full, check_ekfac_full, is_slow=True),
    "cka": Baseline("alignment of gradients, matrix by matrix", cka, check_cka, is_slow=True),
    "trak": Baseline("projected gradients and their kernel", trak, check_trak, is_slow=True),
    "arnoldi": Baseline("the leading eigenvectors of the curvature", arnoldi, check_arnoldi, is_slow=True),
    "cg": Baseline("the inverse curvature, by conjugate gradient", cg, check_cg, is_slow=True),
    "lissa": Baseline("the inverse curvature, by LiSSA", lissa, check_lissa, is_slow=True),
    "eif": Baseline("measured influence, stored by `eif`", eif, eif),
    "random": Baseline("random numbers: a negative control", random, check_random),
    "length": Baseline("the sample's length: a negative control", length, check_length),
    "same": Baseline("an equal metadata value: a negative control", same, same_values),
}
