"""BM25 over the texts, as the store reads them: no model, no sketch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from lark_store.evaluate.material import Material
    from lark_store.evaluate.rivals.given import Given, Matrix


def bm25(material: Material, given: Given) -> Matrix:
    """Score by Lucene's BM25 (Robertson & Zaragoza 2009), as the store's `similar_text` does, (Q, N)."""
    del given
    return _scored(material, "bm25")


def bm25plus(material: Material, given: Given) -> Matrix:
    """Score by BM25+ (Lv & Zhai 2011, δ = 1), in which a word that occurs counts however long the text is, (Q, N)."""
    del given
    return _scored(material, "bm25plus")


def _scored(material: Material, engine: str) -> Matrix:
    sources = list(dict.fromkeys(text.source for text in material.samples))
    keys = pl.DataFrame([(t.source, t.id) for t in material.samples], ["source", "sample_id"], orient="row")
    n = len(keys) + 1_000_000  # a source's samples may not all be candidates
    rows = []
    for query in material.queries:
        found = material.store.similar_text(text=query.whole, k=n, sources=sources, method=engine)
        scores = keys.join(
            found.select("source", "sample_id", "score"), on=["source", "sample_id"], how="left", maintain_order="left"
        )
        rows.append(scores["score"].to_numpy())
    return np.stack(rows)
