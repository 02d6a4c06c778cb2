"""Whitened and centred scores equal dense algebra; their statistics are read once, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.reference_scores import (
    SEARCH,
    brute_force_scores,
    centred_scores,
    scores_by_key,
    unit_sketches,
    whitened_scores,
)
from helpers.texts import qa_rows, write_jsonl

from lark_store.errors import InputError
from lark_store.query.scoring import geometry
from lark_store.query.select.rows import Rows
from lark_store.results import NewText

SOME = [{}, {"sources": ["songs", "medical"]}, {"variants": ["raw"]}, {"sources": ["finetune"], "variants": ["chatml"]}]


@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("method", ["whitened", "centred"])
def test_scores_equal_dense_algebra(scored, method, options):
    expected = (
        whitened_scores(scored, "q101", **options)
        if method == "whitened"
        else centred_scores(scored, "q101", **options)[0]
    )
    assert scores_by_key(scored.top("q101", method=method, k=99, **options, **SEARCH).frame) == pytest.approx(
        expected, abs=2e-5
    )
    plain = brute_force_scores(scored, "q101")
    assert max(abs(expected[key] - plain[key]) for key in expected) > 0.01  # it is another score than the cosine


def test_with_more_rows_than_bins_the_mean_is_over_the_bins(store, tmp_path):
    store.sketcher_add("few", k=256)
    store.source_add("many", write_jsonl(tmp_path / "many.jsonl", qa_rows(300, start=1000)), stage="pretrain")
    store.ingest(["base"], ["many", "test"], ["chatml"], sketcher="few")
    hits = store.top("q101", checkpoint="base", sketcher="few", method="whitened", k=300)
    assert scores_by_key(hits.frame) == pytest.approx(whitened_scores(store, "q101"), abs=1e-4)


@pytest.mark.parametrize("method", ["whitened", "centred"])
def test_many_queries_equal_single_ones(scored, method):
    matrix = scored.scores(method=method, **SEARCH)
    for row, query in zip(matrix.matrix, matrix.query_ids, strict=True):
        hits = scores_by_key(scored.top(query, method=method, k=99, **SEARCH).frame)
        np.testing.assert_allclose(row, [hits[key] for key in matrix.samples.rows()], atol=1e-5)


def test_null_only_rows_do_not_change_scores(scored):
    for method in ("whitened", "centred"):
        options = {"sources": ["finetune"], "method": method, "k": 99, **SEARCH}
        alone, held = (scored.top("q101", null=null, **options) for null in ("none", "songs"))
        assert scores_by_key(held.frame) == pytest.approx(scores_by_key(alone.frame), abs=1e-6)
        assert held.frame["p_value"].null_count() == 0
    null = [score for key, score in null_scores(scored).items() if key[:2] == ("songs", "chatml")]
    for row in held.frame.iter_rows(named=True):
        above = sum(score >= row["score"] for score in null)
        assert row["p_value"] == pytest.approx((1 + above) / (1 + len(null)))


def null_scores(store):
    """Centred scores of all samples as chatml, by the mean of `finetune` alone."""
    keys, z, every = unit_sketches(store, variants=["chatml"])
    mean = z[[key[0] == "finetune" for key in keys]].mean(axis=0)
    q = every["test", "chatml", "q101"] - mean
    less = z - mean
    return dict(zip(keys, less @ q / np.linalg.norm(q) / np.linalg.norm(less, axis=1), strict=True))


def test_low_memory_estimates_c_from_a_noted_sample(scored, monkeypatch):
    assert scored.scores(method="whitened", **SEARCH).notes == ("whitened by the 26 searched samples",)
    memory = 32 * 9**2
    matrix = scored.scores(method="whitened", memory=memory, **SEARCH)
    assert matrix.notes == ("whitened by 9 of the 26 searched samples, drawn with seed 0: no more fit into memory",)
    drawn = np.sort(np.random.default_rng(0).choice(26, 9, replace=False))
    _, _, every = unit_sketches(scored)
    z = np.array([every[key] for key in matrix.samples.rows()])  # sorted by their keys
    c = z[drawn].T @ z[drawn] / 9
    mean = np.trace(c) / 26
    q = np.array([every["test", "chatml", query] for query in matrix.query_ids])
    expected = np.linalg.solve(c / mean + np.eye(len(c)), q.T).T @ z.T
    np.testing.assert_allclose(matrix.matrix, expected, atol=2e-5)
    monkeypatch.setattr(geometry, "n_fitted", lambda n, memory: min(n, 26) if memory else 1)
    whole = scored.scores(method="whitened", memory=memory, **SEARCH)  # the system is made in blocks of a row
    np.testing.assert_allclose(whole.matrix, scored.scores(method="whitened", **SEARCH).matrix, atol=1e-6)


@pytest.fixture
def passes(monkeypatch):
    """How many rows each pass over the sketches reads."""
    results = []
    stream = Rows.stream

    def counted(self, *args, **kwargs):
        results.append(len(self))
        yield from stream(self, *args, **kwargs)

    monkeypatch.setattr(Rows, "stream", counted)
    return results


@pytest.mark.parametrize(("method", "first", "then"), [("whitened", [26] * 3, [26]), ("centred", [26] * 2, [26])])
def test_statistics_are_cached_until_rows_change(scored_copy, tmp_path, passes, method, first, then):
    for query, expected in (("q100", first), ("q101", then), ("q102", then)):
        passes.clear()
        scored_copy.top(query, method=method, **SEARCH)
        assert passes == expected
    scored_copy.source_add("songs", write_jsonl(tmp_path / "n.jsonl", qa_rows(3, start=50)), stage="pretrain")
    scored_copy.ingest(["base"], ["songs"], ["raw"], sketcher="small")
    passes.clear()
    hits = scored_copy.top("q101", method=method, k=99, **SEARCH)
    assert passes == [29] * len(first)
    expected = whitened_scores(scored_copy, "q101") if method == "whitened" else centred_scores(scored_copy, "q101")[0]
    assert scores_by_key(hits.frame) == pytest.approx(expected, abs=2e-5)


def test_centred_answer_reports_the_removed_share(scored):
    hits = scored.top("q101", method="centred", **SEARCH)
    shares = centred_scores(scored, "q101")[1]
    held = f"{shares['chatml']:.1%} of `chatml` (16 samples), {shares['raw']:.1%} of `raw` (10 samples)"
    assert hits.notes == (f"means subtracted at `base`, as shares of the squared norm: {held}",)
    assert hits.how.endswith(f"\nnote: {hits.notes[0]}")


def test_row_equal_to_its_variants_mean_has_no_score(scored):
    hits = scored.top("q101", method="centred", where="source = 'songs' and sample_id = 'sea-1'", **SEARCH)
    assert hits.frame["score"].to_list() == [0, 0]


def test_noise_is_known_for_centred_and_not_for_whitened(scored):
    frame = scored.top("q101", method="centred", k=99, **SEARCH).frame
    np.testing.assert_allclose(frame["noise"], (1 - frame["score"].to_numpy() ** 2) / np.sqrt(1024), rtol=1e-3)
    assert scored.top("q101", method="whitened", **SEARCH).frame["noise"].null_count() == 10


@pytest.mark.parametrize("method", ["whitened", "centred"])
def test_new_text_as_query(scored, method):
    new = NewText("Context: Seen in 102.\n\nQuestion: Is organ 102 affected?", "yes")
    options = {"method": method, "k": 26, **SEARCH}
    assert scores_by_key(scored.top(new=new, **options).frame) == pytest.approx(
        scores_by_key(scored.top("q102", **options).frame), abs=1e-3
    )


def test_unsupported_options_are_a_clear_error(scored):
    with pytest.raises(InputError, match="`centred` needs queries and samples at the same checkpoints"):
        scored.top("q100", method="centred", query_checkpoint="epoch-1", **SEARCH)
    for method in ("whitened", "centred"):
        with pytest.raises(InputError, match="has no signs to shuffle"):
            scored.top("q100", method=method, null="signs", **SEARCH)
        with pytest.raises(InputError, match="has no approximate search"):
            scored.top("q100", method=method, approximate=True, **SEARCH)


@pytest.mark.parametrize("method", ["whitened", "centred"])
def test_attribute_rescores_groups_changed_by_other_samples(scored_copy, method):
    options = {"queries": "test", "sketcher": "small", "method": method}
    assert set(scored_copy.attribute(["base"], **options)["status"]) == {"scored"}
    assert set(scored_copy.attribute(["base"], **options)["status"]) == {"current"}
    rows = scored_copy.sql("from influence where method = ? and query_id = 'q102'", [method])
    expected = whitened_scores(scored_copy, "q102") if method == "whitened" else centred_scores(scored_copy, "q102")[0]
    assert scores_by_key(rows) == pytest.approx(expected, abs=2e-5)
    scored_copy.sample_remove("songs", ["sea-1"])
    assert set(scored_copy.attribute(["base"], **options)["status"]) == {"scored"}
    rows = scored_copy.sql("from influence where method = ? and query_id = 'q102'", [method])
    expected = whitened_scores(scored_copy, "q102") if method == "whitened" else centred_scores(scored_copy, "q102")[0]
    assert scores_by_key(rows) == pytest.approx(expected, abs=2e-5)
    assert scored_copy.db_check().is_empty()
