"""Scoring, top and attribute, against scores computed by numpy from the stored rows."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from helpers.reference_scores import SEARCH, brute_force_scores, scores_by_key
from helpers.texts import qa_rows, write_jsonl

from lark_store.errors import InputError, NameUnknownError, NothingToScoreError
from lark_store.query.scoring import products


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("method", ["cosine", "dot"])
def test_top_equals_brute_force(scored, method, opponents):
    expected = brute_force_scores(scored, "q101", dot=method == "dot")
    hits = scored.top("q101", k=7, method=method, opponents=opponents, **SEARCH)
    best = sorted(expected.items(), key=lambda item: item[1], reverse=not opponents)[:7]
    assert list(scores_by_key(hits.frame)) == [key for key, _ in best]
    np.testing.assert_allclose(hits.frame["score"], [score for _, score in best], rtol=1e-4, atol=1e-6)
    assert hits.frame["rank"].to_list() == list(range(1, 8))
    assert hits.exact
    assert hits.n_searched == len(expected)


def test_top_respects_sources_and_variants(scored):
    hits = scored.top("q101", k=100, sources=["songs", "medical"], variants=["raw"], **SEARCH)
    assert set(hits.frame["source"]) == {"songs", "medical"}
    assert set(hits.frame["variant"]) == {"raw"}
    assert len(hits) == hits.n_searched == 10


def test_top_shows_texts_and_its_description(scored):
    hits = scored.top("q101", k=3, sources=["finetune"], **SEARCH)
    for row in hits.frame.iter_rows(named=True):
        n = int(row["sample_id"][1:])
        answer = ("yes", "no", "maybe")[n % 3]
        assert row["text"] == f"Context: Seen in {n}.\n\nQuestion: Is organ {n} affected?\n{answer}"
    assert hits.how == (
        "exact small · cosine over 6 sketches at `base`, query as `chatml`; ingest runs 1\n"
        f"against shuffled signs: {hits.n_significant} of 3 hits at q ≤ 0.05"
    )
    assert pl.DataFrame(hits).equals(hits.frame)
    assert "<table" in hits._repr_html_()


def test_query_checkpoint_gives_the_two_stage_dot_product(scored):
    hits = scored.top("q102", k=100, query_checkpoint="epoch-1", **SEARCH)
    expected = brute_force_scores(scored, "q102", checkpoint="base", query_at="epoch-1", dot=True)
    assert hits.method == "dot"
    actual = scores_by_key(hits.frame)
    assert actual.keys() == expected.keys()
    for key, score in expected.items():
        assert actual[key] == pytest.approx(score, rel=1e-3, abs=1e-5)


def test_attribute_equals_brute_force(scored):
    influence = scored.sql("select * from influence where checkpoint = 'base'")
    assert len(influence) == 4 * (6 + 2 * 10)
    for query in ("q100", "q103"):
        expected = brute_force_scores(scored, query)
        mine = influence.filter(query_id=query)
        actual = scores_by_key(mine)
        assert actual.keys() == expected.keys()
        for key, score in expected.items():
            assert actual[key] == pytest.approx(score, rel=1e-4, abs=1e-6)
        for (source, variant), group in mine.group_by("source", "variant"):
            scores = [s for (a, b, _), s in expected.items() if (a, b) == (source, variant)]
            row = scored.sql(
                f"select * from source_influence where checkpoint = 'base' and query_id = '{query}' "
                f"and source = '{source}' and variant = '{variant}'"
            ).row(0, named=True)
            assert group.sort("rank")["score"].is_sorted(descending=True)
            assert row["max"] == pytest.approx(max(scores), rel=1e-4)
            assert row["argmax"] == group.filter(rank=1)["sample_id"].item()
            assert row["mean"] == pytest.approx(np.mean(scores), rel=1e-4, abs=1e-6)
            assert row["std"] == pytest.approx(np.std(scores), rel=1e-3, abs=1e-6)
            assert row["n"] == len(scores)


def test_best_hits_are_kept_over_many_batches(scored_copy, tmp_path):
    scored_copy.source_add("many", write_jsonl(tmp_path / "many.jsonl", qa_rows(150, start=1000)), stage="pretrain")
    scored_copy.ingest(["base"], ["many"], ["chatml"], sketcher="small")
    scored_copy.attribute(["base"], queries="test", sources=["many"], sketcher="small", hits=5)
    expected = {k: s for k, s in brute_force_scores(scored_copy, "q100").items() if k[0] == "many"}
    best = sorted(expected, key=expected.get, reverse=True)[:5]
    rows = scored_copy.sql("select * from influence where source = 'many' and query_id = 'q100' order by rank")
    assert list(scores_by_key(rows)) == best


def test_scoring_is_independent_of_memory_blocks(scored_copy):
    before = scored_copy.sql(
        "select query_id, source, variant, sample_id, score, rank from influence where checkpoint='base'"
    )
    memory = 4 * 1024 * 3  # three queries at a time
    scored_copy.attribute(["base"], queries="test", sketcher="small", hits=99, memory=memory)
    after = scored_copy.sql(
        "select query_id, source, variant, sample_id, score, rank from influence where checkpoint='base'"
    )
    order = ["query_id", "source", "variant", "rank"]
    assert before.sort(order).drop("score").equals(after.sort(order).drop("score"))
    np.testing.assert_allclose(before.sort(order)["score"], after.sort(order)["score"], atol=1e-6)


@pytest.mark.parametrize("null", ["sources", "signs"])
def test_paths_for_many_and_few_queries_agree(scored_copy, tmp_path, monkeypatch, null):
    scored_copy.source_add("many", write_jsonl(tmp_path / "many.jsonl", qa_rows(150, start=1000)), stage="pretrain")
    scored_copy.ingest(["base"], ["many"], ["chatml"], sketcher="small")
    few = scored_copy.top("q100", k=176, null=null, **SEARCH).frame
    monkeypatch.setattr(products, "_FEW", 0)
    monkeypatch.setattr(products, "_BLOCK", 64)
    many = scored_copy.top("q100", k=176, null=null, **SEARCH).frame
    numbers = ["score", "noise", "p_value", "q_value"]
    both = few.join(many, on=["source", "variant", "sample_id"], suffix="_many")
    assert len(both) == len(few) == 176
    for name in numbers:
        np.testing.assert_allclose(both[name], both[f"{name}_many"], rtol=1e-4, atol=1e-6)
    scored_copy.attribute(["base"], queries="test", sources=["many"], sketcher="small", hits=150)
    expected = {k: s for k, s in brute_force_scores(scored_copy, "q103").items() if k[0] == "many"}
    actual = scores_by_key(scored_copy.sql("select * from influence where source = 'many' and query_id = 'q103'"))
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_gpu_scores_equal_cpu_scores(scored):
    cpu, gpu = (scored.top("q101", k=26, device=device, **SEARCH).frame for device in ("cpu", "cuda"))
    assert cpu["sample_id"].to_list() == gpu["sample_id"].to_list()
    np.testing.assert_allclose(cpu["score"], gpu["score"], rtol=1e-4, atol=1e-6)


def test_only_groups_with_added_sketches_are_rescored(scored_copy, tmp_path):
    assert set(scored_copy.attribute(["base"], queries="test", sketcher="small")["status"]) == {"current"}
    new = write_jsonl(tmp_path / "new.jsonl", [{"id": "new", "text": "A new song."}])
    scored_copy.source_add("songs", new, stage="pretrain")
    scored_copy.ingest(["base"], ["songs"], ["raw"], sketcher="small")
    report = scored_copy.attribute(["base"], queries="test", sketcher="small")
    again = report.filter(status="scored").select("source", "variant", "n_samples")
    assert again.rows() == [("songs", "raw", 6)]
    counts = scored_copy.sql(
        "select n, count(*) from source_influence where source='songs' and variant='raw' group by all"
    )
    assert sorted(counts.rows()) == [(5, 4), (6, 4)]  # the other checkpoint keeps its own
    assert scored_copy.sql("select count(*) from score_runs where status = 'superseded'").item() == 1


def test_interrupted_scoring_is_invisible_and_repeated(scored_copy, monkeypatch):
    from lark_store.query.answers import attribute as module

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_source_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            scored_copy.attribute(["base"], queries="test", sketcher="small", method="dot")
    assert scored_copy.sql("select count(*) from influence where method = 'dot'").item() == 0
    scored_copy.attribute(["base"], queries="test", sketcher="small", method="dot")
    rows = scored_copy.sql("select query_id, source, variant, sample_id from influence where method = 'dot'")
    assert len(rows) == 104
    assert rows.is_unique().all()


def test_two_query_variants_need_a_choice_unless_one_is_chatml(scored_copy):
    scored_copy.ingest(["base"], ["test"], ["raw"], sketcher="small")
    assert scored_copy.top("q100", k=1, **SEARCH).query_variant == "chatml"
    assert scored_copy.top("q100", k=1, query_variant="raw", **SEARCH).query_variant == "raw"
    scored_copy.attribute("base", queries="test", query_variant="raw", sketcher="small")
    with pytest.raises(InputError, match="the queries are scored as `chatml`, `raw`"):
        scored_copy.metrics(checkpoint="base", sketcher="small")
    for variant in ("chatml", "raw"):
        means = scored_copy.metrics(checkpoint="base", sketcher="small", query_variant=variant, view="influence")
        stored = scored_copy.sql(
            "select source, variant, avg(max) as mean from source_influence "
            "where checkpoint = 'base' and query_variant = ? group by all",
            [variant],
        )
        assert sorted(means.select("source", "variant").unique().rows()) == sorted(stored.drop("mean").rows())
        both = means.join(stored, on=["source", "variant"])
        np.testing.assert_allclose(both["mean_max_influence"], both["mean"], rtol=1e-6)


def test_unanswerable_queries_give_the_reason(scored_copy):
    with pytest.raises(NameUnknownError, match="did you mean `q100`"):
        scored_copy.top("q100l", **SEARCH)
    with pytest.raises(NameUnknownError, match="did you mean `base`"):
        scored_copy.top("q101", checkpoint="bas", sketcher="small")
    with pytest.raises(NothingToScoreError, match=r"no committed `lark` sketches .*\n\n.* sketches by `small`"):
        scored_copy.top("q101", checkpoint="base", sketcher="lark")
    with pytest.raises(NothingToScoreError, match=r"of `finetune` and `raw` at checkpoint .*\n\n.*`variants=\[NAME\]`"):
        scored_copy.top("q101", checkpoint="base", sources=["finetune"], variants=["raw"], sketcher="small")
    with pytest.raises(InputError, match="no method"):
        scored_copy.top("q101", method="euclid", **SEARCH)
    with pytest.raises(InputError, match="`k` must be between 1 and 1,000,000, not 0"):
        scored_copy.top("q101", k=0, **SEARCH)
    with pytest.raises(InputError, match="stage `query`"):
        scored_copy.attribute(["base"], queries="finetune", sketcher="small")
    with pytest.raises(InputError, match="no view"):
        scored_copy.metrics(view="nice", sketcher="small")
    with pytest.raises(NothingToScoreError, match=r"there are no .* scores"):
        scored_copy.metrics(method="dot", sketcher="small")


def test_metrics_come_from_the_committed_scores(scored):
    figures = scored.metrics(sketcher="small", checkpoint="base")
    phi = scored.sql("select source, variant, avg(max) as m from source_influence where checkpoint='base' group by all")
    mean = figures.filter(metric="mean_max_influence")
    assert {(r["source"], r["variant"]): r["value"] for r in mean.iter_rows(named=True)} == pytest.approx(
        {(r["source"], r["variant"]): r["m"] for r in phi.iter_rows(named=True)}
    )
    assert scored.metrics(sketcher="small", view="dominance")["checkpoint"].unique(maintain_order=True).to_list() == [
        "base",
        "epoch-1",
    ]


def test_comparisons_come_from_the_committed_scores(scored):
    figures = scored.metrics(sketcher="small", view="comparisons")
    assert set(figures["metric"]) == {"difference", "change"}
    changes = figures.filter(metric="change")
    assert set(changes.select("checkpoint", "against_checkpoint").iter_rows()) == {("epoch-1", "base")}
    mean = {
        (r["checkpoint"], r["source"], r["variant"]): r["value"]
        for r in scored.metrics(sketcher="small").filter(metric="mean_max_influence").iter_rows(named=True)
    }
    for row in figures.iter_rows(named=True):
        left = mean[row["checkpoint"], row["source"], row["variant"]]
        against = row["against_checkpoint"] or row["checkpoint"]
        right = mean[against, row["against_source"], row["against_variant"]]
        assert row["value"] == pytest.approx(left - right, abs=1e-6)
        assert 0.125 <= row["p_value"] <= row["q_value"] <= 1  # there are 4 queries
    assert figures.select("source", "against_source").equals(
        scored.metrics(sketcher="small", view="comparisons").select("source", "against_source")
    )
    alone = scored.metrics(sketcher="small", view="comparisons", checkpoint="epoch-1")
    assert set(alone["metric"]) == {"difference"}


def test_show_counts_the_contents(scored):
    overview = scored.show()
    assert overview.checkpoints["name"].to_list() == ["base", "epoch-1"]
    samples = dict(overview.sources.select("name", "samples").iter_rows())
    assert samples == {"finetune": 6, "medical": 5, "songs": 5, "test": 4}
    assert overview.sketches["sketches"].sum() == 60
    assert overview.sketches["bytes"].sum() == 60 * 2048
    assert set(overview.sketches["status"]) == {"done"}
