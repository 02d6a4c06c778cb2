"""BM25 over the store's texts: no model, no sketch.

Shape letters: Q queries, N samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from lark_store.core.words import words
from lark_store.errors import InputError
from lark_store.evaluate.baselines.checks import check_no_settings
from lark_store.modeling.sample import Sample
from lark_store.query.methods import METHODS
from lark_store.query.scoring.bm25 import Lexical

if TYPE_CHECKING:
    from lark_store.evaluate.baselines.context import BaselineContext, Matrix
    from lark_store.evaluate.dataset import Material

_KEYS = ["source", "sample_id"]
_CORPUS = """
    SELECT x.* EXCLUDE (content_sha256, meta)
    FROM samples x JOIN sources s ON s.name = x.source WHERE s.stage <> 'query'"""


def bm25(material: Material, context: BaselineContext) -> Matrix:
    """Score by Lucene's BM25 over the texts of all samples except queries, like the store's `bm25`, (Q, N)."""
    return _scored(material, context, "bm25")


def bm25_okapi(material: Material, context: BaselineContext) -> Matrix:
    """Score by rank-bm25's BM25Okapi, the papers' baseline, (Q, N)."""
    return _scored(material, context, "bm25-okapi")


def bm25plus(material: Material, context: BaselineContext) -> Matrix:
    """Score by BM25+ (Lv & Zhai 2011), where an occurring word counts however long the text is, (Q, N)."""
    return _scored(material, context, "bm25plus")


def check_lexical(material: Material, context: BaselineContext) -> None:
    """Check that the name is plain and the candidates are in the corpus."""
    check_no_settings(context)
    check_corpus(material)


def check_corpus(material: Material) -> None:
    """Check that all candidates are in BM25's corpus.

    Raises
    ------
    InputError
    """
    query_sources = set(material.store.sql("select name from sources where stage = 'query'")["name"])
    if any(text.source in query_sources for text in material.samples):
        raise InputError("candidates of stage `query` are not in BM25's corpus", "choose sources of another stage")


def _lexical(material: Material, engine: str) -> Lexical:
    corpus = material.store.sql(_CORPUS)
    texts = [Sample(**row).whole for row in corpus.drop("source").iter_rows(named=True)]
    return Lexical(engine, corpus.select(_KEYS), METHODS[engine].index(words(texts)))


def _scored(material: Material, context: BaselineContext, engine: str) -> Matrix:
    check_corpus(material)
    lexical = context.preparation.once("index", lambda: _lexical(material, engine))
    candidates = pl.DataFrame([(text.source, text.id) for text in material.samples], _KEYS, orient="row")
    numbered = lexical.documents.with_row_index("_place")
    places = candidates.join(numbered, on=_KEYS, how="left", maintain_order="left")["_place"]
    return np.concatenate([lexical.scores([query.whole])[:, places.to_numpy()] for query in material.queries])
