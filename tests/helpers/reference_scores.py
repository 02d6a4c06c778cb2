"""Reference scores, computed by brute force."""

from __future__ import annotations

import bm25s
import numpy as np
import polars as pl
from rank_bm25 import BM25Okapi

from helpers.stores import copy_store, read_sketches
from lark_store import Store

SEARCH = {"checkpoint": "base", "sketcher": "small"}


def brute_force_scores(
    store: Store, query: str, *, checkpoint: str = "base", query_at: str = "base", dot: bool = False
) -> dict:
    """Return the score of every sample except queries: (source, variant, sample_id) to score."""
    table = read_sketches(store)
    query_row = table.row(by_predicate=pl.col("row_key") == f"{query_at}/test/chatml/{query}", named=True)
    q = np.asarray(query_row["vector"], dtype=np.float64)
    scores = {}
    for row in table.filter(pl.col("checkpoint") == checkpoint, pl.col("source") != "test").iter_rows(named=True):
        z = np.asarray(row["vector"], dtype=np.float64)
        score = q @ z / len(q)
        if dot:
            score *= query_row["grad_norm"] * row["grad_norm"]
        scores[row["source"], row["variant"], row["sample_id"]] = score
    return scores


def scores_by_key(frame: pl.DataFrame) -> dict:
    return {(r["source"], r["variant"], r["sample_id"]): r["score"] for r in frame.iter_rows(named=True)}


BOTH_CHECKPOINTS = {"checkpoint": ["base", "epoch-1"], "sketcher": "small"}
KEYS = ["source", "variant", "sample_id"]


def unit_sketches(store, checkpoint="base", sources=None, variants=None):
    """Keys and unit sketches (N, K), float64, of the searched samples at a checkpoint; and of all samples, by key."""
    table = read_sketches(store).filter(checkpoint=checkpoint)
    z = np.array(table["vector"].to_list(), np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    every = dict(zip(table.select(KEYS).rows(), z, strict=True))
    searched = {
        key: item
        for key, item in every.items()
        if (key[0] in sources if sources else key[0] != "test") and (not variants or key[1] in variants)
    }
    return list(searched), np.array(list(searched.values())), every


def whitened_scores(store, query, checkpoint="base", **of):
    """q̂ᵀ (C / λ̄ + I)⁻¹ ẑ by K × K algebra."""
    keys, z, every = unit_sketches(store, checkpoint, **of)
    c = z.T @ z / len(z)
    mean = np.trace(c) / min(z.shape)
    scores = np.linalg.solve(c / mean + np.eye(len(c)), every["test", "chatml", query]) @ z.T
    return dict(zip(keys, scores, strict=True))


def centred_scores(store, query, checkpoint="base", **of):
    """cos(q̂ − m, ẑ − m) by numpy, and the squared norm of each variant's mean."""
    keys, z, every = unit_sketches(store, checkpoint, **of)
    means = {v: z[[k[1] == v for k in keys]].mean(axis=0) for v in {k[1] for k in keys}}
    q = every["test", "chatml", query] - means.get("chatml", 0)
    scores = {}
    for key, item in zip(keys, z, strict=True):
        less = item - means[key[1]]
        scores[key] = float(q @ less / np.linalg.norm(q) / np.linalg.norm(less))
    return scores, {v: m @ m for v, m in means.items()}


def sample_texts(store):
    """(source, sample_id) to text of every sample except queries, in the table's order."""
    table = pl.from_arrow(store._db.vectors.table("samples").to_arrow())
    return {
        (r["source"], r["sample_id"]): r["text"] if r["text"] is not None else f"{r['prompt']}\n{r['response']}"
        for r in table.iter_rows(named=True)
        if r["source"] != "test"
    }


def query_text(query):
    n = int(query[1:])
    return f"Context: Seen in {n}.\n\nQuestion: Is organ {n} affected?\n{('yes', 'no', 'maybe')[n % 3]}"


def bm25_tokens(corpus):
    return bm25s.tokenize(list(corpus), stopwords="en", return_ids=False, show_progress=False)


def bm25_scores(store, text, method="bm25"):
    """(source, sample_id) to BM25 score, by the library itself."""
    documents = sample_texts(store)
    if method == "bm25-okapi":
        engine = BM25Okapi(bm25_tokens(documents.values()))
    else:
        engine = bm25s.BM25(method="lucene")
        engine.index(bm25_tokens(documents.values()), show_progress=False)
    return dict(zip(documents, engine.get_scores(bm25_tokens([text])[0]).tolist(), strict=True))


def standardized(scores):
    values = np.array(list(scores.values()))
    return dict(zip(scores, (values - values.mean()) / values.std(), strict=True))


ATTRIBUTION = {"queries": "test", "sketcher": "small"}
HIT_COLUMNS = ["query_id", "source", "variant", "rank", "sample_id", "score"]
SUM_COLUMNS = ["query_id", "source", "variant", "argmax", "n", "max", "mean", "std"]


def score_tables(store, method="cosine"):
    """Both tables at `base` as they can be compared: names alone, and numbers."""
    hits, sums = (
        store.sql(
            f"select {', '.join(names)} from {view} where checkpoint = 'base' and method = ? order by all", [method]
        )
        for view, names in (("influence", HIT_COLUMNS), ("source_influence", SUM_COLUMNS))
    )
    return hits, sums


def assert_scores_close(actual, expected):
    for mine, theirs, numbers in zip(actual, expected, (["score"], ["max", "mean", "std"]), strict=True):
        assert mine.drop(numbers).equals(theirs.drop(numbers))
        for name in numbers:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-6)


def scores_from_scratch(store, path, method="cosine", hits=5):
    """The tables of a full scoring of the same sketches, without a run to extend."""
    from sqlalchemy import delete

    from lark_store.schema.catalog import ScoreRun

    with Store.open(copy_store(store.path, path)) as other:
        with other._db.session() as session:
            session.execute(delete(ScoreRun))
        for name in ("influence", "source_influence"):
            other._db.vectors.table(name).delete("true")
        assert set(other.attribute(["base"], method=method, hits=hits, **ATTRIBUTION)["status"]) == {"scored"}
        return score_tables(other, method)
