"""`Store.scores`: the full matrix equals the scores of `top` for each method."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from helpers.program import lark
from helpers.reference_scores import BOTH_CHECKPOINTS, KEYS, SEARCH, brute_force_scores

from lark_store.errors import InputError, NameUnknownError, NothingToScoreError
from lark_store.query.methods import Method

QUERIES = ["q100", "q101", "q102", "q103"]
SUMS = [{"method": m, "over_checkpoints": o} for m in ("cosine", "dot", "hybrid") for o in ("sum", "lr-weighted")]


def name(options):
    return (
        "-".join(filter(None, (options.get("method"), options.get("over_checkpoints"), options.get("where"))))
        or "default"
    )


@pytest.mark.parametrize(
    "options",
    [
        *({"method": each} for each in ("cosine", "dot", "bm25", "bm25-okapi", "bm25plus", "hybrid")),
        *SUMS,
        {"method": "tracin"},
        {"query_checkpoint": "epoch-1"},
        {"sources": ["songs", "finetune"], "variants": ["chatml"], "where": "n_tokens < 1000 and text is not null"},
    ],
    ids=name,
)
def test_matrix_equals_top(scored, options):
    selection = BOTH_CHECKPOINTS if options in SUMS or options.get("method") == "tracin" else SEARCH
    matrix = scored.scores(**selection, **options)
    assert matrix.query_ids == QUERIES
    assert matrix.samples.equals(matrix.samples.sort(KEYS))
    assert matrix.matrix.shape == (4, len(matrix.samples))
    assert matrix.matrix.dtype == np.float32
    for row, query in zip(matrix.matrix, QUERIES, strict=True):
        hits = scored.top(query, k=99, **selection, **options)
        both = matrix.samples.with_columns(mine=pl.Series(row)).join(hits.frame, on=KEYS, how="full")
        assert len(both) == len(hits) == len(matrix.samples)
        np.testing.assert_allclose(both["mine"], both["score"], rtol=1e-5, atol=1e-7)
        assert (matrix.score, matrix.method) == (hits.score, hits.method)


def test_matrix_equals_brute_force_at_any_memory_limit(scored):
    expected = {query: brute_force_scores(scored, query) for query in QUERIES}
    for memory in (4 * 1024, 1 << 30):
        matrix = scored.scores(memory=memory, **SEARCH)
        for row, query in zip(matrix.matrix, QUERIES, strict=True):
            brute = [expected[query][key] for key in matrix.samples.rows()]
            np.testing.assert_allclose(row, brute, rtol=1e-4, atol=1e-6)


def test_queries_are_returned_in_the_requested_order(scored):
    whole = scored.scores(**SEARCH)
    subset = scored.scores(["q103", "q100"], **SEARCH)
    assert subset.query_ids == ["q103", "q100"]
    np.testing.assert_allclose(subset.matrix, whole.matrix[[3, 0]], atol=1e-6)
    long = subset.frame
    assert long.columns == ["query_id", *KEYS, "score"]
    assert long["query_id"].to_list() == ["q103"] * 26 + ["q100"] * 26
    np.testing.assert_array_equal(long["score"].to_numpy().reshape(2, 26), subset.matrix)
    assert pl.DataFrame(subset).equals(long)


def test_command_prints_the_long_form(scored, scored_path):
    printed = lark("scores q103 q100 -c base --sketcher small -f json", store=scored_path)
    expected = scored.scores(["q103", "q100"], **SEARCH).frame
    assert pl.DataFrame(printed.rows, schema=expected.schema).drop("score").equals(expected.drop("score"))
    np.testing.assert_allclose([row["score"] for row in printed.rows], expected["score"], atol=1e-6)
    assert printed.err == "small · cosine of 26 samples for 2 queries\n"


def test_scores_of_missing_rows_give_the_reason(scored):
    with pytest.raises(NameUnknownError, match="did you mean `q100`"):
        scored.scores(["q101", "q100l"], **SEARCH)
    with pytest.raises(InputError, match=r"scores at one checkpoint.*\n\nhint: sum .*`over_checkpoints=\"sum\"`"):
        scored.scores(**BOTH_CHECKPOINTS)
    with pytest.raises(NothingToScoreError, match="no sketch satisfies `n_tokens < 0`"):
        scored.scores(where="n_tokens < 0", **SEARCH)
    with pytest.raises(InputError, match="no checkpoint is given"):
        scored.scores(checkpoint=[], sketcher="small")


@pytest.mark.parametrize(
    ("method", "over", "label"),
    [
        (None, None, "adam · cosine"),
        ("hybrid", None, "adam · hybrid"),
        ("cosine", "sum", "adam · cosine, sum over base + epoch-1"),
        ("whitened-lr-weighted", None, "adam · whitened, lr-weighted sum over base + epoch-1"),
        ("tracin", "lr-weighted", "adam · tracin over base + epoch-1"),
        ("dot-lr-weighted", None, "adam · tracin over base + epoch-1"),
        ("bm25plus", None, "bm25plus"),  # it looks at no sketches
    ],
)
def test_score_is_named_by_sketcher_method_and_checkpoints(method, over, label):
    result = Method.of(method, over)
    assert result.label("adam", ["base", "epoch-1"]) == label
    assert Method.of(result.name) == result
