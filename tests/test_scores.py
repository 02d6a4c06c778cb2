"""`Store.scores`: the whole matrix is what `top` shows, method by method."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from test_cli import lark
from test_query import brute_force

from lark_store.errors import InputError, NameUnknownError, NothingToScoreError

KEYS = ["source", "variant", "sample_id"]
ASK = {"checkpoint": "base", "sketcher": "small"}
BOTH = {"checkpoint": ["base", "epoch-1"], "sketcher": "small"}
QUERIES = ["q100", "q101", "q102", "q103"]
SUMS = [{"method": m, "over_checkpoints": o} for m in ("cosine", "dot", "hybrid") for o in ("sum", "lr-weighted")]


def name(how):
    return "-".join(filter(None, (how.get("method"), how.get("over_checkpoints"), how.get("where")))) or "default"


@pytest.mark.parametrize(
    "how",
    [
        *({"method": each} for each in ("cosine", "dot", "bm25", "bm25-okapi", "bm25plus", "hybrid")),
        *SUMS,
        {"method": "tracin"},
        {"query_checkpoint": "epoch-1"},
        {"sources": ["songs", "finetune"], "variants": ["chatml"], "where": "n_tokens < 1000 and text is not null"},
    ],
    ids=name,
)
def test_the_matrix_is_what_top_shows(scored, how):
    at = BOTH if how in SUMS or how.get("method") == "tracin" else ASK
    found = scored.scores(**at, **how)
    assert found.query_ids == QUERIES
    assert found.samples.equals(found.samples.sort(KEYS))
    assert found.matrix.shape == (4, len(found.samples))
    assert found.matrix.dtype == np.float32
    for row, query in zip(found.matrix, QUERIES, strict=True):
        hits = scored.top(query, k=99, **at, **how)
        both = found.samples.with_columns(mine=pl.Series(row)).join(hits.frame, on=KEYS, how="full")
        assert len(both) == len(hits) == len(found.samples)
        np.testing.assert_allclose(both["mine"], both["score"], rtol=1e-5, atol=1e-7)
        assert (found.score, found.method) == (hits.score, hits.method)


def test_the_matrix_is_that_of_brute_force_whatever_the_memory(scored):
    expected = {query: brute_force(scored, query) for query in QUERIES}
    for memory in (4 * 1024, 1 << 30):
        found = scored.scores(memory=memory, **ASK)
        for row, query in zip(found.matrix, QUERIES, strict=True):
            brute = [expected[query][key] for key in found.samples.rows()]
            np.testing.assert_allclose(row, brute, rtol=1e-4, atol=1e-6)


def test_the_queries_are_those_asked_for_in_their_order(scored):
    whole = scored.scores(**ASK)
    some = scored.scores(["q103", "q100"], **ASK)
    assert some.query_ids == ["q103", "q100"]
    np.testing.assert_allclose(some.matrix, whole.matrix[[3, 0]], atol=1e-6)
    long = some.frame
    assert long.columns == ["query_id", *KEYS, "score"]
    assert long["query_id"].to_list() == ["q103"] * 26 + ["q100"] * 26
    np.testing.assert_array_equal(long["score"].to_numpy().reshape(2, 26), some.matrix)
    assert pl.DataFrame(some).equals(long)


def test_the_command_prints_the_long_form(scored, scored_path):
    printed = lark("scores q103 q100 -c base --sketcher small -f json", store=scored_path)
    expected = scored.scores(["q103", "q100"], **ASK).frame
    assert pl.DataFrame(printed.rows, schema=expected.schema).drop("score").equals(expected.drop("score"))
    np.testing.assert_allclose([row["score"] for row in printed.rows], expected["score"], atol=1e-6)
    assert printed.err == "small · cosine of 26 samples for 2 queries\n"


def test_scores_of_what_is_not_there_say_why(scored):
    with pytest.raises(NameUnknownError, match="did you mean `q100`"):
        scored.scores(["q101", "q100l"], **ASK)
    with pytest.raises(InputError, match=r"looks at one checkpoint.*\n\nhint: `--over-checkpoints sum`"):
        scored.scores(**BOTH)
    with pytest.raises(NothingToScoreError, match="no sketch satisfies `n_tokens < 0`"):
        scored.scores(where="n_tokens < 0", **ASK)
    with pytest.raises(InputError, match="no checkpoint is named"):
        scored.scores(checkpoint=[], sketcher="small")
