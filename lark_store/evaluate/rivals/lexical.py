"""BM25 over the texts, as the store reads them: no model, no sketch.

Shape letters: Q queries, N samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from lark_store.errors import InputError
from lark_store.query.lexical import BM25S, Lexical, words

if TYPE_CHECKING:
    from lark_store.evaluate.material import Material
    from lark_store.evaluate.rivals.given import Given, Matrix

_CORPUS = """
    SELECT x.source, x.sample_id, coalesce(x.text, x.prompt || chr(10) || x.response) AS text
    FROM samples x JOIN sources s ON s.name = x.source WHERE s.stage <> 'query'"""


def bm25(material: Material, given: Given) -> Matrix:
    """Score by Lucene's BM25 over the texts of all samples that are no query, as the store's `bm25` does, (Q, N)."""
    del given
    return _scored(material, "bm25")


def bm25plus(material: Material, given: Given) -> Matrix:
    """Score by BM25+ (Lv & Zhai 2011), in which a word that occurs counts however long the text is, (Q, N)."""
    del given
    return _scored(material, "bm25plus")


def _scored(material: Material, engine: str) -> Matrix:
    import bm25s

    corpus = material.store.sql(_CORPUS)
    index = bm25s.BM25(**BM25S[engine])
    index.index(words(corpus["text"].to_list()), show_progress=False)
    keys = ["source", "sample_id"]
    wanted = pl.DataFrame([(text.source, text.id) for text in material.samples], keys, orient="row")
    numbered = corpus.select(keys).with_row_index("_place")
    places = wanted.join(numbered, on=keys, how="left", maintain_order="left")["_place"]
    if places.null_count():
        raise InputError("candidates of stage `query` are not in BM25's corpus", "name sources of another stage")
    lexical = Lexical(engine, corpus.select(keys), index)
    return np.concatenate([lexical.scores([query.whole])[:, places.to_numpy()] for query in material.queries])
