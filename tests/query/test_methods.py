"""Each scoring method against its definition, opponents, and queries from outside the store."""

from __future__ import annotations

import re
import shutil

import numpy as np
import polars as pl
import pytest
from helpers.reference_scores import (
    BOTH_CHECKPOINTS,
    KEYS,
    SEARCH,
    bm25_scores,
    brute_force_scores,
    query_text,
    sample_texts,
    scores_by_key,
    standardized,
)
from helpers.stores import copy_store, read_sketches
from helpers.texts import qa_rows, text_rows, write_jsonl
from scipy import stats

from lark_store import Store
from lark_store.errors import InputError, LarkStoreError, NameUnknownError, NothingToScoreError
from lark_store.results import NewText, Progress
from lark_store.stats.running_top_k import Tally
from lark_store.stats.significance import sign_null_p

LONG = "the night train to the old harbour " * 100


@pytest.fixture(scope="module")
def uneven(scored_path, tmp_path_factory):
    """The scored store, with one sample, one query and one source sketched at the second checkpoint only."""
    root = tmp_path_factory.mktemp("uneven")
    with Store.open(copy_store(scored_path, root / "lark.store")) as store:
        store.source_add("songs", write_jsonl(root / "new.jsonl", text_rows(7)), stage="pretrain")
        store.source_add("test", write_jsonl(root / "test.jsonl", qa_rows(1, start=700)), stage="query")
        store.source_add("late", write_jsonl(root / "late.jsonl", text_rows(3, "harbour")), stage="pretrain")
        store.ingest(["epoch-1"], ["songs", "test", "late"], ["chatml"], sketcher="small")
        yield store


def tracin(store, query):
    parts = [
        brute_force_scores(store, query, checkpoint=checkpoint, query_at=checkpoint, dot=True)
        for checkpoint in ("base", "epoch-1")
    ]
    return {key: 2e-4 * (parts[0][key] + parts[1][key]) for key in parts[0].keys() & parts[1].keys()}


def expected_scores(store, method, query):
    if method == "tracin":
        return tracin(store, query)
    cosine = brute_force_scores(store, query)
    if method in {"cosine", "dot"}:
        return cosine if method == "cosine" else brute_force_scores(store, query, dot=True)
    actual = bm25_scores(store, query_text(query), "bm25" if method == "hybrid" else method)
    actual = {key: actual[key[0], key[2]] for key in cosine}
    if method == "hybrid":
        return {
            key: a + b for (key, a), b in zip(standardized(cosine).items(), standardized(actual).values(), strict=True)
        }
    return actual


METHODS = ["cosine", "dot", "tracin", "bm25", "bm25-okapi", "hybrid"]


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_methods_equal_their_definitions(scored, method, opponents):
    hits = scored.top(
        "q101", method=method, opponents=opponents, k=99, **(BOTH_CHECKPOINTS if method == "tracin" else SEARCH)
    )
    expected = expected_scores(scored, method, "q101")
    assert scores_by_key(hits.frame) == pytest.approx(expected, rel=2e-3, abs=2e-5)
    ordered = hits.frame["score"].to_list()
    assert ordered == sorted(ordered, reverse=not opponents)
    assert hits.method == method
    if method == "tracin":
        description = (
            "exact small · tracin over base + epoch-1, over 26 sketches at each, query as `chatml`; ingest runs "
        )
        assert hits.how.startswith(description)
        assert len(hits.ingest_runs) == 10


@pytest.mark.parametrize("method", METHODS)
def test_attribute_and_metrics_of_each_method(scored_copy, method):
    checkpoint = ["base", "epoch-1"] if method == "tracin" else ["base"]
    seen = []
    scored_copy.attribute(
        checkpoint, queries="test", sketcher="small", method=method, hits=99, memory=9_000, on_progress=seen.append
    )
    assert seen[-1] == Progress(f"{checkpoint[-1]}: scoring test by {method}", 104, 104)  # 4 queries × 26 samples
    assert len({step.done for step in seen}) == len(seen) > 1
    assert seen == sorted(seen, key=lambda step: step.done)
    rows = scored_copy.sql("from influence where method = ? and checkpoint = ?", [method, checkpoint[-1]])
    phi = {}
    for query in ("q100", "q101", "q102", "q103"):
        expected = expected_scores(scored_copy, method, query)
        assert scores_by_key(rows.filter(query_id=query)) == pytest.approx(expected, rel=2e-3, abs=2e-5)
        for (source, variant, _), score in expected.items():
            phi.setdefault((source, variant), {}).setdefault(query, []).append(score)
    means = scored_copy.metrics(method=method, sketcher="small", checkpoint=checkpoint[-1]).filter(
        metric="mean_max_influence"
    )
    actual = {(r["source"], r["variant"]): r["value"] for r in means.iter_rows(named=True)}
    best = {key: np.mean([max(scores) for scores in per.values()]) for key, per in phi.items()}
    assert actual == pytest.approx(best, rel=2e-3, abs=2e-5)


def test_tracin_skips_samples_missing_at_a_checkpoint(uneven):
    hits = uneven.top("q100", method="tracin", k=99, **BOTH_CHECKPOINTS)
    assert scores_by_key(hits.frame) == pytest.approx(tracin(uneven, "q100"), rel=2e-3, abs=1e-7)
    assert {"sea-5", "sea-6"}.isdisjoint(hits.frame["sample_id"])
    assert "late" not in set(hits.frame["source"])
    with pytest.raises(NameUnknownError, match="no query `q700`"):
        uneven.top("q700", method="tracin", **BOTH_CHECKPOINTS)
    report = uneven.attribute(BOTH_CHECKPOINTS["checkpoint"], queries="test", sketcher="small", method="tracin")
    assert report.filter(source="songs", variant="chatml").select("n_queries", "n_samples", "checkpoint").rows() == [
        (4, 5, "epoch-1")
    ]
    assert report.filter(source="late")["status"].to_list() == ["empty"]
    assert uneven.top("q700", checkpoint="epoch-1", sketcher="small", sources=["late"]).n_searched == 3


def test_tracin_with_an_unsearched_null_source(scored):
    hits = scored.top("q101", method="tracin", sources=["finetune"], null="songs", k=9, **BOTH_CHECKPOINTS)
    expected = tracin(scored, "q101")
    null = [score for (source, variant, _), score in expected.items() if (source, variant) == ("songs", "chatml")]
    for row in hits.frame.iter_rows(named=True):
        above = sum(score >= expected["finetune", "chatml", row["sample_id"]] for score in null)
        assert row["p_value"] == pytest.approx((1 + above) / (1 + len(null)))


def test_tracin_needs_learning_rates(scored_copy, tmp_path, checkpoints):
    scored_copy.checkpoint_add("bare", shutil.copytree(checkpoints["base"], tmp_path / "bare"))
    scored_copy.ingest(["bare"], ["finetune", "test"], ["chatml"], sketcher="small")
    for checkpoint in (["bare"], ["base", "bare"]):
        with pytest.raises(InputError, match="weights checkpoints by learning rate, but `bare` has none"):
            scored_copy.top("q100", checkpoint=checkpoint, sketcher="small", method="tracin")
        with pytest.raises(InputError, match="`bare` has none"):
            scored_copy.attribute(checkpoint, queries="test", sketcher="small", method="tracin")
    with pytest.raises(InputError, match="`bare` has none"):
        scored_copy.self_influence(checkpoints=["base", "bare"], sketcher="small")
    assert len(scored_copy.self_influence(checkpoints=["bare"], sketcher="small", k=99)) == 6


@pytest.mark.parametrize("method", [None, "cosine", "dot", "bm25", "hybrid"])
def test_other_methods_take_one_checkpoint(scored, method):
    with pytest.raises(InputError, match="scores at one checkpoint, not at `base`, `epoch-1`"):
        scored.top("q100", method=method, **BOTH_CHECKPOINTS)


def test_wrong_methods_and_checkpoints_are_clear_errors(scored):
    with pytest.raises(InputError, match=r"there is no method `cos`\n\nhint: the methods are `cosine`, `dot`, "):
        scored.top("q100", method="cos", **SEARCH)
    with pytest.raises(InputError, match="no checkpoint is given"):
        scored.top("q100", checkpoint=[], sketcher="small")
    with pytest.raises(InputError, match="at the same checkpoints"):
        scored.top("q100", method="tracin", query_checkpoint="epoch-1", **SEARCH)
    for method in ("tracin", "bm25", "hybrid"):
        with pytest.raises(InputError, match="has no trajectory"):
            scored.trajectory("q100", "q0", method=method, sketcher="small")


@pytest.mark.parametrize("null", [None, "songs"])
def test_a_hybrid_shows_its_parts_and_their_ranks(scored, null):
    hits = scored.top("q101", method="hybrid", sources=["medical"], null=null, k=4, **SEARCH)
    cosine = {key: s for key, s in brute_force_scores(scored, "q101").items() if key[0] == "medical"}
    scores = bm25_scores(scored, query_text("q101"))
    parts = {"cosine": cosine, "bm25": {key: scores[key[0], key[2]] for key in cosine}}
    for row in hits.frame.iter_rows(named=True):
        key = tuple(row[name] for name in KEYS)
        for name, part in parts.items():
            assert row[name] == pytest.approx(part[key], rel=1e-3, abs=1e-6)
            assert row[f"{name}_rank"] == 1 + sum(other > part[key] + 1e-6 for other in part.values())
        assert row["noise"] is None


def test_constant_part_adds_nothing(scored):
    hits = scored.top("q101", method="hybrid", where="sample_id = 'sea-1'", k=4, sources=["songs"], **SEARCH)
    assert set(hits.frame["bm25_rank"]) == {1}
    assert hits.frame["score"].abs().to_list() == pytest.approx([1, 1])


def test_lexical_scores_change_with_the_corpus(scored_copy, tmp_path):
    options = {"queries": "test", "sketcher": "small", "method": "bm25"}
    assert set(scored_copy.attribute(["base"], **options)["status"]) == {"scored"}
    assert set(scored_copy.attribute(["base"], **options)["status"]) == {"current"}
    scored_copy.source_add("more", write_jsonl(tmp_path / "more.jsonl", qa_rows(9, start=300)), stage="pretrain")
    assert set(scored_copy.attribute(["base"], **options)["status"]) == {"scored"}
    rows = scored_copy.sql("from influence where method = 'bm25' and query_id = 'q101'")
    assert scores_by_key(rows) == pytest.approx(expected_scores(scored_copy, "bm25", "q101"), rel=1e-4, abs=1e-6)


# --- p- and q-values -----------------------------------------------------------------------------------------------


def shares_within(p, groups):
    """Benjamini–Hochberg in each group, times their number, by scipy."""
    results = {}
    names = sorted(set(groups.values()))
    for name in names:
        mine = [key for key in p if groups[key] == name]
        result = stats.false_discovery_control([p[key] for key in mine], method="bh")
        results |= {key: min(1.0, q * len(names)) for key, q in zip(mine, result, strict=True)}
    return results


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("null", [None, "sources", "songs", "test"])
def test_p_and_q_against_other_sources(scored, null, opponents):
    options = {"opponents": opponents, "k": 99, "null": null, "variants": ["chatml"]}
    hits = scored.top("q101", **options, **SEARCH)
    scores = {key: score for key, score in brute_force_scores(scored, "q101").items() if key[1] == "chatml"}
    against = dict(scores)
    if null == "test":
        table = read_sketches(scored).filter(checkpoint="base", variant="chatml", source="test")
        query_vector = np.array(table.filter(sample_id="q101")["vector"].item(), np.float64)
        for row in table.iter_rows(named=True):
            against["test", "chatml", row["sample_id"]] = (
                np.array(row["vector"], np.float64) @ query_vector / len(query_vector)
            )
    sign = -1 if opponents else 1
    p = {}
    for key, score in scores.items():
        held = [s for k, s in against.items() if (k[0] != key[0] if null in {None, "sources"} else k[0] == null)]
        if key[0] != null:
            p[key] = (1 + sum(sign * s >= sign * score for s in held)) / (1 + len(held))
    q = shares_within(p, {key: key[:2] for key in p})
    assert hits.n_searched == len(scores)
    for row in hits.frame.iter_rows(named=True):
        key = tuple(row[name] for name in KEYS)
        assert row["p_value"] == (pytest.approx(p[key]) if key in p else None)
        assert row["q_value"] == (pytest.approx(q[key]) if key in p else None)
    null_name = {None: "the other sources' samples", "sources": "the other sources' samples"}.get(null, f"`{null}`")
    n = sum(q[key] <= 0.05 for key in q)
    assert hits.how.endswith(f"\nagainst {null_name}: {f'{n} of 16 hits' if n else 'nothing significant'} at q ≤ 0.05")


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("method", ["cosine", "dot"])
def test_p_and_q_against_shuffled_signs(scored, method, opponents):
    hits = scored.top("q101", null="signs", method=method, opponents=opponents, k=99, **SEARCH)
    table = {r["row_key"]: r for r in read_sketches(scored).iter_rows(named=True)}
    query_vector = np.array(table["base/test/chatml/q101"]["vector"], np.float64)
    p = {}
    for key in brute_force_scores(scored, "q101"):
        products = query_vector * np.array(table["/".join(("base", *key))]["vector"], np.float64)
        score = -products.sum() if opponents else products.sum()
        p[key] = float(sign_null_p([score], [np.sqrt(np.square(products).sum())])[0])
    q = shares_within(p, {key: key[:2] for key in p})
    for row in hits.frame.iter_rows(named=True):
        key = tuple(row[name] for name in KEYS)
        assert row["p_value"] == pytest.approx(p[key], rel=2e-2)
        assert row["q_value"] == pytest.approx(q[key], rel=2e-2)
    assert "\nagainst shuffled signs: " in hits.how


@pytest.mark.parametrize("null", ["none", "signs", "sources"])
@pytest.mark.parametrize("sources", [[], ["songs"]])
def test_notes_on_a_null_source(scored, null, sources):
    hits = scored.top("q100", null=null, sources=sources, **SEARCH)
    assert hits.null == null
    tested = null == "signs" or (null == "sources" and not sources)
    assert (hits.frame["p_value"].null_count() == 0) == tested
    assert ("against" in hits.how) == (null != "none")
    if not tested and null != "none":
        assert hits.how.endswith("nothing significant at q ≤ 0.05")
    assert hits.frame.schema["p_value"] == hits.frame.schema["q_value"] == hits.frame.schema["noise"] == pl.Float64


def test_default_null_follows_the_search(scored):
    assert scored.top("q100", **SEARCH).null == "sources"
    assert scored.top("q100", sources=["songs"], **SEARCH).null == "signs"
    assert scored.top("q100", sources=["songs"], method="bm25", **SEARCH).null == "none"


def test_wrong_nulls_are_clear_errors(scored):
    with pytest.raises(NameUnknownError, match=r"no source `song`\n\nhint: did you mean `songs`\?"):
        scored.top("q100", null="song", **SEARCH)
    for method in ("bm25", "hybrid", "tracin"):
        with pytest.raises(InputError, match=f"`{method}` has no signs to shuffle"):
            scored.top("q100", null="signs", method=method, **SEARCH)
    with pytest.raises(NothingToScoreError, match="of `finetune` and `raw`"):
        scored.top("q100", null="finetune", variants=["raw"], **SEARCH)


@pytest.mark.parametrize("method", ["cosine", "dot", "tracin", "bm25", "hybrid"])
def test_noise_is_in_the_scores_unit(scored, method):
    frame = scored.top("q101", method=method, k=99, **(BOTH_CHECKPOINTS if method == "tracin" else SEARCH)).frame
    if method in {"bm25", "hybrid"}:
        assert frame["noise"].null_count() == len(frame)
        return
    noise = {}
    for checkpoint in ("base", "epoch-1") if method == "tracin" else ("base",):
        cosine = brute_force_scores(scored, "q101", checkpoint=checkpoint, query_at=checkpoint)
        dot = brute_force_scores(scored, "q101", checkpoint=checkpoint, query_at=checkpoint, dot=True)
        for key, rho in cosine.items():
            unit = 1 if method == "cosine" else dot[key] / rho * (2e-4 if method == "tracin" else 1)
            noise[key] = noise.get(key, 0) + unit * (1 - rho**2) / np.sqrt(1024)
    for row in frame.iter_rows(named=True):
        assert row["noise"] == pytest.approx(noise[tuple(row[name] for name in KEYS)], rel=1e-2)


# --- commands other than `top` -------------------------------------------------------------------------------------


def test_self_influence_is_the_squared_norm(scored):
    table = read_sketches(scored).filter(pl.col("source") != "test")
    one = scored.self_influence(checkpoints=["base"], sketcher="small", k=99)
    expected = {tuple(r[k] for k in KEYS): r for r in table.filter(checkpoint="base").iter_rows(named=True)}
    assert scores_by_key(one) == pytest.approx({key: r["grad_norm"] ** 2 for key, r in expected.items()}, rel=1e-5)
    assert one["score"].is_sorted(descending=True)
    assert one["rank"].to_list() == list(range(1, 27))
    for row in one.iter_rows(named=True):
        assert row["loss"] == pytest.approx(expected[tuple(row[k] for k in KEYS)]["loss"])
        assert row["text"]
    two = scored.self_influence(checkpoints=["base", "epoch-1"], sketcher="small", k=3, sources=["songs", "finetune"])
    summed = table.group_by(KEYS).agg(
        score=(pl.col("grad_norm").cast(pl.Float64) ** 2).sum() * 2e-4, loss=pl.mean("loss")
    )
    best = summed.filter(pl.col("source") != "medical").sort("score", descending=True).head(3)
    assert two.select(KEYS).equals(best.select(KEYS))
    np.testing.assert_allclose(two["score"], best["score"], rtol=1e-5)
    np.testing.assert_allclose(two["loss"], best["loss"], rtol=1e-5)


def test_self_influence_uses_samples_at_every_checkpoint(uneven):
    rows = uneven.self_influence(checkpoints=["base", "epoch-1"], sources=["songs"], sketcher="small", k=99)
    assert len(rows) == 10
    with pytest.raises(InputError, match="no checkpoint is given"):
        uneven.self_influence(sketcher="small")
    with pytest.raises(InputError, match="`k` must be between 1 and 1,000,000, not 0"):
        uneven.self_influence(checkpoints=["base"], sketcher="small", k=0)
    with pytest.raises(NothingToScoreError, match="of `late` at checkpoint `base`"):
        uneven.self_influence(checkpoints=["base"], sources=["late"], sketcher="small")


@pytest.mark.parametrize("method", ["cosine", "dot"])
def test_ft_pt_values_average_to_the_metrics(scored_copy, method):
    scored_copy.attribute(["base"], queries="test", sketcher="small", method=method)
    metrics = scored_copy.metrics(sketcher="small", checkpoint="base", method=method)
    rows = scored_copy.ft_pt("base", sketcher="small", method=method)
    assert len(rows) == 4 * 4
    pair = ["source", "variant", "against_source", "against_variant"]
    shares = rows.group_by(pair).agg(
        wins=(pl.col("winner") == "finetune").mean(),
        loses=(pl.col("winner") == "pretrain").mean(),
        ratio=pl.mean("ft") / pl.mean("pt"),
        positive=(pl.mean("ft") > 0) & (pl.mean("pt") > 0),
        median=pl.median("ratio"),
        n=pl.count("ratio"),
    )
    assert shares["positive"].sum() > 0
    for row in shares.iter_rows(named=True):
        pair_metrics = metrics.filter(**{name: row[name] for name in pair})
        assert pair_metrics.filter(metric="ft_wins")["value"].item() == row["wins"]
        assert pair_metrics.filter(metric="pt_dominance")["value"].item() == row["loses"]
        ratio = pair_metrics.filter(metric="ft_pt_ratio").row(0, named=True)
        assert ratio["value"] == (pytest.approx(row["ratio"], rel=1e-4) if row["positive"] else None)
        assert ratio["r_median"] == (pytest.approx(row["median"], rel=1e-4) if row["n"] else None)
        assert ratio["n_ratio"] == row["n"]
    for row in rows.iter_rows(named=True):
        scores = brute_force_scores(scored_copy, row["query_id"], dot=method == "dot")
        for value, names in (("ft", pair[:2]), ("pt", pair[2:])):
            group = [s for key, s in scores.items() if key[:2] == tuple(row[n] for n in names)]
            assert row[value] == pytest.approx(max(group), rel=1e-3)


@pytest.mark.parametrize("method", [None, "dot"])
def test_trajectory_holds_the_score_at_each_checkpoint(uneven, method):
    rows = uneven.trajectory("q100", "sea-2", variant="raw", method=method, sketcher="small")
    assert rows["checkpoint"].to_list() == ["base", "epoch-1"]
    assert rows["epoch"].to_list() == [0, 1]
    losses = {r["row_key"]: r["loss"] for r in read_sketches(uneven).iter_rows(named=True)}
    for row in rows.iter_rows(named=True):
        checkpoint = row["checkpoint"]
        hits = uneven.top("q100", checkpoint=checkpoint, method=method, sketcher="small", k=99, null="none").frame
        same = hits.filter(sample_id="sea-2", variant="raw").row(0, named=True)
        assert row["score"] == pytest.approx(same["score"], rel=1e-4)
        assert row["noise"] == pytest.approx(same["noise"], rel=1e-4)
        assert row["sample_loss"] == pytest.approx(losses[f"{checkpoint}/songs/raw/sea-2"])
        assert row["query_loss"] == pytest.approx(losses[f"{checkpoint}/test/chatml/q100"])
    late = uneven.trajectory("q100", "sea-6", sketcher="small")
    assert late.select("checkpoint", "source", "variant").rows() == [("epoch-1", "songs", "chatml")]


def test_trajectory_of_missing_rows_gives_the_reason(uneven):
    with pytest.raises(NameUnknownError, match="no query `q99`"):
        uneven.trajectory("q99", "sea-2", sketcher="small")
    with pytest.raises(NameUnknownError, match="no sample `see-2`\n\nhint: did you mean `sea-2`"):
        uneven.trajectory("q100", "see-2", sketcher="small")
    elsewhere = (
        "sample `sea-2` has no comparable `small` sketch\n\nhint: it is in `songs`; choose one with `source=NAME`"
    )
    with pytest.raises(NothingToScoreError, match=re.escape(elsewhere)):
        uneven.trajectory("q100", "sea-2", source="medical", queries="test", sketcher="small")
    for names, reason in (
        ({"source": "song"}, "no source `song`"),
        ({"variant": "chat"}, "no variant `chat`"),
        ({"queries": "tests"}, "no source `tests`"),
        ({"sketcher": "tiny"}, "no sketcher `tiny`"),
    ):
        with pytest.raises(NameUnknownError, match=reason):
            uneven.trajectory("q100", "sea-2", **({"sketcher": "small"} | names))


@pytest.mark.parametrize("sources", [[], ["medical", "finetune"]])
def test_similar_text_equals_bm25(scored, sources):
    for actual, text in (
        (scored.similar_text("q102", k=7, sources=sources), query_text("q102")),
        (scored.similar_text(text="the night train", k=7, sources=sources), "the night train"),
    ):
        expected = {key: s for key, s in bm25_scores(scored, text).items() if not sources or key[0] in sources}
        best = sorted(expected, key=lambda key: (-expected[key], key))[:7]
        assert actual.select("source", "sample_id").rows() == best
        np.testing.assert_allclose(actual["score"], [expected[key] for key in best], rtol=1e-5)
        assert actual["text"].to_list() == [sample_texts(scored)[key] for key in best]
        assert set(actual["stage"]) <= {"finetune", "pretrain"}
    assert set(scored.similar_text(text="…", k=3)["score"]) == {0.0}


def test_wrong_similar_text_queries_are_clear_errors(scored):
    with pytest.raises(NameUnknownError, match="no query `q999`"):
        scored.similar_text("q999")
    with pytest.raises(NameUnknownError, match="no query `q0`"):  # no query, though a sample
        scored.similar_text("q0")
    with pytest.raises(NameUnknownError, match="no source `song`"):
        scored.similar_text("q100", sources=["song"])
    for options in ({}, {"query": "q100", "text": "x"}):
        with pytest.raises(InputError, match=r"no query is given|can't be combined"):
            scored.similar_text(**options)
    with pytest.raises(InputError, match="`k` must be between 1 and 1,000,000, not 0"):
        scored.similar_text("q100", k=0)


# --- new queries ---------------------------------------------------------------------------------------------------

NEW = {"prompt": "Context: Seen in 102.\n\nQuestion: Is organ 102 affected?", "response": "yes"}


@pytest.mark.parametrize("checkpoint", ["base", "epoch-1"])
@pytest.mark.parametrize("method", [None, "hybrid", "bm25"])
def test_new_text_equals_the_stored_query(scored, checkpoint, method):
    options = {"checkpoint": checkpoint, "sketcher": "small", "method": method, "k": 26}
    stored = scored.top("q102", **options)
    hits = scored.top(new=NewText(**NEW), **options)
    assert scores_by_key(hits.frame) == pytest.approx(scores_by_key(stored.frame), rel=2e-3, abs=2e-4)
    assert hits.frame.columns == stored.frame.columns
    assert hits.query_id == "new"
    assert hits.how.split(";")[0] == stored.how.split(";")[0]


def test_a_new_text_may_be_sketched_at_another_checkpoint(scored):
    options = {"query_checkpoint": "epoch-1", "k": 5, **SEARCH}
    stored, hits = scored.top("q102", **options), scored.top(new=NewText(**NEW), **options)
    assert hits.method == stored.method == "dot"
    assert hits.frame.select(KEYS).equals(stored.frame.select(KEYS))
    np.testing.assert_allclose(hits.frame["score"], stored.frame["score"], rtol=5e-3)
    assert ", query at `epoch-1`, query as `chatml`" in hits.how


@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".csv", ".parquet", ".txt", ""])
def test_a_new_text_from_a_file(scored, tmp_path, ending):
    text = "A song about the sea number 3 and the night train."
    file = tmp_path / f"new{ending}"
    frame = pl.DataFrame({"text": [text, "another"]})
    if ending.lower() == ".jsonl":
        frame.write_ndjson(file)
    elif ending in {".csv", ".parquet"}:
        getattr(frame, f"write_{ending[1:]}")(file)
    else:
        file.write_text(text)  # the whole text, byte for byte: with its line end, if it has one
    options = {"query_variant": "raw", "k": 2, "variants": ["raw"], **SEARCH}
    hits = scored.top(new=NewText(file=file), **options)
    assert hits.frame["sample_id"][0] == "sea-3"
    assert hits.frame["score"][0] == pytest.approx(1, abs=1e-3)
    assert hits.frame.equals(scored.top(new=NewText(text=text), **options).frame)


def test_too_long_new_text_is_cut_like_an_ingest(scored_copy, tmp_path):
    scored_copy.source_add("long", write_jsonl(tmp_path / "a.jsonl", [{"id": "l", "text": LONG}]), stage="pretrain")
    scored_copy.ingest(["base"], ["long"], ["raw"], sketcher="small")
    hits = scored_copy.top(new=NewText(text=LONG), query_variant="raw", sources=["long"], **SEARCH)
    assert hits.frame["score"].to_list() == pytest.approx([1], abs=1e-3)


@pytest.mark.parametrize(
    ("new", "fact"),
    [
        (NewText(), "the new query is incomplete"),
        (NewText(prompt="why?"), "the new query is incomplete"),
        (NewText(response="because"), "the new query is incomplete"),
        (NewText(prompt="", response=""), "the query is empty"),
        (NewText(text=""), "the query is empty"),
        (NewText(text=" \n"), "the query is empty"),
        (NewText(text="x", prompt="a", response="b"), "a new query is given in one form only"),
        (NewText(prompt="a", response=LONG), "the query can't be sketched: "),
        (NewText(text="x", precision="float8"), "float8"),
    ],
    ids=str,
)
def test_invalid_new_text_is_a_clear_error(scored, new, fact):
    with pytest.raises(LarkStoreError, match=fact) as raised:
        scored.top(new=new, **SEARCH)
    assert raised.value.hint


def test_exactly_one_query_is_required(scored, tmp_path):
    for options in ({}, {"query": "q100", "new": NewText(text="x")}):
        with pytest.raises(InputError, match=r"no query is given|can't be combined"):
            scored.top(**options, **SEARCH)
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    (tmp_path / "odd.jsonl").write_text('{"title": "x"}')
    for name, reason in (
        ("bad.jsonl", "line 1, is not JSON"),
        ("none.jsonl", "has no rows"),
        ("bytes.txt", "can't be read as text"),
        ("odd.jsonl", "a row needs `messages`"),
        ("missing.txt", "there is no file"),
        ("", "there is no file"),
    ):
        with pytest.raises(InputError, match=reason) as raised:
            scored.top(new=NewText(file=tmp_path / name), **SEARCH)
        assert raised.value.hint
    with pytest.raises(InputError, match="a new query is given in one form only"):
        scored.top(new=NewText(file=tmp_path / "bad.jsonl", text="x"), **SEARCH)
    with pytest.raises(InputError, match="a new text is sketched at one checkpoint"):
        scored.top(new=NewText(text="x"), method="tracin", **BOTH_CHECKPOINTS)
    for names, reason in (
        ({"query_variant": "chat"}, "no variant `chat`"),
        ({"query_checkpoint": "bas"}, "no checkpoint `bas`"),
        ({"sketcher": "smal"}, "no sketcher `smal`"),
        ({"sources": ["song"]}, "no source `song`"),
    ):
        with pytest.raises(NameUnknownError, match=reason):
            scored.top(new=NewText(text="x"), **(SEARCH | names))


def test_small_deviation_of_a_large_mean_is_precise():
    rng = np.random.default_rng(0)
    scores = (0.9 + 1e-4 * rng.normal(size=(2, 900))).astype(np.float32)
    tally = Tally(2, 3)
    tally.take(np.arange(300), scores[:, :300])
    first, resumed = tally.result(), Tally(2, 3)
    resumed.resume(first.top_codes, first.top_scores, first.mean_Q, first.std_Q, first.n)
    for start in (300, 600):
        resumed.take(np.arange(start, start + 300), scores[:, start : start + 300])
    result = resumed.result()
    np.testing.assert_allclose(result.std_Q, scores.astype(np.float64).std(axis=1), rtol=1e-3)
    np.testing.assert_allclose(result.mean_Q, scores.astype(np.float64).mean(axis=1), rtol=1e-6)
    assert result.n == 900
