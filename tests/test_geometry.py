"""Whitened and centred scores are those of dense algebra, and what they need is read once and bounded."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import qa_rows, write_jsonl
from test_query import as_dict, brute_force, sketches

from lark_store.errors import InputError
from lark_store.query import geometry
from lark_store.query.rows import Rows
from lark_store.schema.records import NewText

ASK = {"checkpoint": "base", "sketcher": "small"}
BOTH = {"checkpoint": ["base", "epoch-1"], "sketcher": "small"}
KEYS = ["source", "variant", "sample_id"]


def unit(store, at="base", sources=None, variants=None):
    """Keys and unit sketches (N, K), float64, of the samples at a checkpoint that are searched; and of all, by key."""
    table = sketches(store).filter(checkpoint=at)
    z = np.array(table["vector"].to_list(), np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    every = dict(zip(table.select(KEYS).rows(), z, strict=True))
    searched = {
        key: each
        for key, each in every.items()
        if (key[0] in sources if sources else key[0] != "test") and (not variants or key[1] in variants)
    }
    return list(searched), np.array(list(searched.values())), every


def whitened(store, query, at="base", **of):
    """q̂ᵀ (C / λ̄ + I)⁻¹ ẑ by K × K algebra."""
    keys, z, every = unit(store, at, **of)
    c = z.T @ z / len(z)
    mean = np.trace(c) / min(z.shape)
    scores = np.linalg.solve(c / mean + np.eye(len(c)), every["test", "chatml", query]) @ z.T
    return dict(zip(keys, scores, strict=True))


def centred(store, query, at="base", **of):
    """cos(q̂ − m, ẑ − m) by numpy, and the share of the square that each variant's mean holds."""
    keys, z, every = unit(store, at, **of)
    means = {v: z[[k[1] == v for k in keys]].mean(axis=0) for v in {k[1] for k in keys}}
    q = every["test", "chatml", query] - means.get("chatml", 0)
    scores = {}
    for key, each in zip(keys, z, strict=True):
        less = each - means[key[1]]
        scores[key] = float(q @ less / np.linalg.norm(q) / np.linalg.norm(less))
    return scores, {v: m @ m for v, m in means.items()}


SOME = [{}, {"sources": ["songs", "medical"]}, {"variants": ["raw"]}, {"sources": ["finetune"], "variants": ["chatml"]}]


@pytest.mark.parametrize("of", SOME, ids=str)
@pytest.mark.parametrize("method", ["whitened", "centred"])
def test_scores_are_those_of_dense_algebra(scored, method, of):
    expected = whitened(scored, "q101", **of) if method == "whitened" else centred(scored, "q101", **of)[0]
    assert as_dict(scored.top("q101", method=method, k=99, **of, **ASK).frame) == pytest.approx(expected, abs=2e-5)
    plain = brute_force(scored, "q101")
    assert max(abs(expected[key] - plain[key]) for key in expected) > 0.01  # it is another score than the cosine


def test_with_more_rows_than_bins_the_mean_is_over_the_bins(store, tmp_path):
    store.sketcher_add("few", k=256)
    store.source_add("many", write_jsonl(tmp_path / "many.jsonl", qa_rows(300, start=1000)), stage="pretrain")
    store.ingest(["base"], ["many", "test"], ["chatml"], sketcher="few")
    hits = store.top("q101", checkpoint="base", sketcher="few", method="whitened", k=300)
    assert as_dict(hits.frame) == pytest.approx(whitened(store, "q101"), abs=1e-4)


@pytest.mark.parametrize("method", ["whitened", "centred"])
def test_many_queries_get_what_one_gets(scored, method):
    found = scored.scores(method=method, **ASK)
    for row, query in zip(found.matrix, found.query_ids, strict=True):
        hits = as_dict(scored.top(query, method=method, k=99, **ASK).frame)
        np.testing.assert_allclose(row, [hits[key] for key in found.samples.rows()], atol=1e-5)


def test_rows_that_are_there_as_a_null_alone_do_not_change_the_scores(scored):
    for method in ("whitened", "centred"):
        of = {"sources": ["finetune"], "method": method, "k": 99, **ASK}
        alone, held = (scored.top("q101", null=null, **of) for null in ("none", "songs"))
        assert as_dict(held.frame) == pytest.approx(as_dict(alone.frame), abs=1e-6)
        assert held.frame["p_value"].null_count() == 0
    null = [score for key, score in null_scores(scored).items() if key[:2] == ("songs", "chatml")]
    for row in held.frame.iter_rows(named=True):
        above = sum(score >= row["score"] for score in null)
        assert row["p_value"] == pytest.approx((1 + above) / (1 + len(null)))


def null_scores(store):
    """Centred scores of all samples as chatml, by the mean of `finetune` alone."""
    keys, z, every = unit(store, variants=["chatml"])
    mean = z[[key[0] == "finetune" for key in keys]].mean(axis=0)
    q = every["test", "chatml", "q101"] - mean
    less = z - mean
    return dict(zip(keys, less @ q / np.linalg.norm(q) / np.linalg.norm(less, axis=1), strict=True))


def test_with_little_memory_c_is_made_of_a_seeded_sample_and_the_answer_says_so(scored, monkeypatch):
    assert scored.scores(method="whitened", **ASK).notes == ("whitened by the 26 samples searched",)
    memory = 32 * 9**2
    found = scored.scores(method="whitened", memory=memory, **ASK)
    assert found.notes == ("whitened by 9 of the 26 samples searched, drawn with seed 0: no more fit into memory",)
    drawn = np.sort(np.random.default_rng(0).choice(26, 9, replace=False))
    _, _, every = unit(scored)
    z = np.array([every[key] for key in found.samples.rows()])  # sorted by their keys
    c = z[drawn].T @ z[drawn] / 9
    mean = np.trace(c) / 26
    q = np.array([every["test", "chatml", query] for query in found.query_ids])
    expected = np.linalg.solve(c / mean + np.eye(len(c)), q.T).T @ z.T
    np.testing.assert_allclose(found.matrix, expected, atol=2e-5)
    monkeypatch.setattr(geometry, "n_fitted", lambda n, memory: min(n, 26) if memory else 1)
    whole = scored.scores(method="whitened", memory=memory, **ASK)  # the system is made in blocks of a row
    np.testing.assert_allclose(whole.matrix, scored.scores(method="whitened", **ASK).matrix, atol=1e-6)


@pytest.fixture
def passes(monkeypatch):
    """How many rows each pass over the sketches reads."""
    found = []
    stream = Rows.stream

    def counted(self, *args, **kwargs):
        found.append(len(self))
        yield from stream(self, *args, **kwargs)

    monkeypatch.setattr(Rows, "stream", counted)
    return found


@pytest.mark.parametrize(("method", "first", "then"), [("whitened", [26] * 3, [26]), ("centred", [26] * 2, [26])])
def test_what_the_rows_give_is_remembered_until_they_change(scored_copy, tmp_path, passes, method, first, then):
    for query, expected in (("q100", first), ("q101", then), ("q102", then)):
        passes.clear()
        scored_copy.top(query, method=method, **ASK)
        assert passes == expected
    scored_copy.source_add("songs", write_jsonl(tmp_path / "n.jsonl", qa_rows(3, start=50)), stage="pretrain")
    scored_copy.ingest(["base"], ["songs"], ["raw"], sketcher="small")
    passes.clear()
    made = scored_copy.top("q101", method=method, k=99, **ASK)
    assert passes == [29] * len(first)
    expected = whitened(scored_copy, "q101") if method == "whitened" else centred(scored_copy, "q101")[0]
    assert as_dict(made.frame) == pytest.approx(expected, abs=2e-5)


def test_a_centred_answer_says_what_was_taken_out(scored):
    hits = scored.top("q101", method="centred", **ASK)
    shares = centred(scored, "q101")[1]
    held = f"{shares['chatml']:.1%} of `chatml` (16 samples), {shares['raw']:.1%} of `raw` (10 samples)"
    assert hits.notes == (f"taken out at `base`, the mean's share of the squared norm: {held}",)
    assert hits.how.endswith(f"\nnote: {hits.notes[0]}")


def test_a_row_that_is_its_variants_mean_has_no_score(scored):
    hits = scored.top("q101", method="centred", where="source = 'songs' and sample_id = 'sea-1'", **ASK)
    assert hits.frame["score"].to_list() == [0, 0]


def test_the_noise_of_a_centred_cosine_is_a_cosines_and_of_a_whitened_none_is_known(scored):
    frame = scored.top("q101", method="centred", k=99, **ASK).frame
    np.testing.assert_allclose(frame["noise"], (1 - frame["score"].to_numpy() ** 2) / np.sqrt(1024), rtol=1e-3)
    assert scored.top("q101", method="whitened", **ASK).frame["noise"].null_count() == 10


@pytest.mark.parametrize("method", ["whitened", "centred"])
def test_a_new_text_is_asked_with(scored, method):
    new = NewText("Context: Seen in 102.\n\nQuestion: Is organ 102 affected?", "yes")
    of = {"method": method, "k": 26, **ASK}
    assert as_dict(scored.top(new=new, **of).frame) == pytest.approx(as_dict(scored.top("q102", **of).frame), abs=1e-3)


def test_what_does_not_go_with_them_says_so(scored):
    with pytest.raises(InputError, match="`centred` takes queries and samples from the same checkpoints"):
        scored.top("q100", method="centred", query_checkpoint="epoch-1", **ASK)
    for method in ("whitened", "centred"):
        with pytest.raises(InputError, match="has no signs to shuffle"):
            scored.top("q100", method=method, null="signs", **ASK)
        with pytest.raises(InputError, match="has no approximate search"):
            scored.top("q100", method=method, approximate=True, **ASK)


@pytest.mark.parametrize("method", ["whitened", "centred"])
def test_attribute_scores_again_what_other_samples_change(scored_copy, method):
    how = {"queries": "test", "sketcher": "small", "method": method}
    assert set(scored_copy.attribute(["base"], **how)["status"]) == {"scored"}
    assert set(scored_copy.attribute(["base"], **how)["status"]) == {"current"}
    made = scored_copy.sql("from influence where method = ? and query_id = 'q102'", [method])
    expected = whitened(scored_copy, "q102") if method == "whitened" else centred(scored_copy, "q102")[0]
    assert as_dict(made) == pytest.approx(expected, abs=2e-5)
    scored_copy.sample_remove("songs", ["sea-1"])
    assert set(scored_copy.attribute(["base"], **how)["status"]) == {"scored"}
    made = scored_copy.sql("from influence where method = ? and query_id = 'q102'", [method])
    expected = whitened(scored_copy, "q102") if method == "whitened" else centred(scored_copy, "q102")[0]
    assert as_dict(made) == pytest.approx(expected, abs=2e-5)
    assert scored_copy.db_check().is_empty()
