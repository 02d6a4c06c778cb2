"""Evaluations: figures checked by hand, a perfect scorer, kills and reruns, the command line."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers.facts import HALF_SETS, fact_rows
from helpers.forked import run_forked
from helpers.program import lark
from helpers.stores import store_label
from helpers.texts import text_rows, write_jsonl
from scipy import stats

from lark_store import Store, evaluate
from lark_store.errors import InputError, NameUnknownError, NothingToScoreError, StoreBusyError
from lark_store.evaluate.baselines import BASELINES, BaselineContext
from lark_store.evaluate.dataset import gather, load
from lark_store.evaluate.evaluation import tabulated
from lark_store.evaluate.kinds.facts import draw_pools, rank_metrics, same_answer
from lark_store.evaluate.kinds.lds import members
from lark_store.evaluate.optimizer_step import Stepper, gradient, second_moments
from lark_store.evaluate.progress_log import journal
from lark_store.evaluate.retrain import Start
from lark_store.evaluate.scorers import Scorer
from lark_store.modeling.losses import losses
from lark_store.stats import ranks
from lark_store.stats.ranks import auc


def perfect(losses_MQ, member_MN):
    """A score whose sums over half sets are −loss: the solution of a linear system with more samples than half sets."""
    return Scorer("perfect", lambda _: np.linalg.lstsq(member_MN.astype(float), -losses_MQ, rcond=None)[0].T)


def journal_of(folder):
    (path,) = folder.glob("lds-*.jsonl")
    return path


def losses_in(folder):
    rows = pl.read_ndjson(journal_of(folder).read_bytes().split(b"\n", 1)[1])
    return np.array(rows["values"].to_list())


# --- retraining ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_charts")
def test_exact_score_has_lds_1_and_random_score_about_0(facts_store, tmp_path):
    evaluate.lds(facts_store, ["random"], out=tmp_path / "out", **HALF_SETS)
    truth = perfect(losses_in(tmp_path / "out"), members(12, 6, 0))
    random = [Scorer(f"random {i}", lambda _, i=i: np.random.default_rng(i).normal(size=(5, 12))) for i in range(40)]
    evaluation = evaluate.lds(facts_store, [truth, *random], out=tmp_path / "out", **HALF_SETS)
    table = evaluation.table.filter(measure="lds")
    assert table["value"][0] == pytest.approx(1)
    assert abs(table["value"][1:].mean()) < 0.2
    assert (table["difference"][1:] < 0).all()
    assert losses_in(tmp_path / "out").shape == (6, 5)  # nothing was trained again


def test_half_sets_are_halves_and_stable_when_more_are_drawn():
    few, many = members(11, 3, 7), members(11, 9, 7)
    assert (many[:3] == few).all()
    assert set(many.sum(axis=1)) == {5}
    assert len(np.unique(many, axis=0)) == 9
    assert not (members(11, 3, 8) == few).all()


@pytest.mark.usefixtures("without_charts")
def test_more_half_sets_and_seeds_extend_existing_results(facts_store, tmp_path):
    evaluate.lds(facts_store, ["length"], out=tmp_path, **HALF_SETS | {"half_sets": 3})
    before = losses_in(tmp_path)
    evaluation = evaluate.lds(facts_store, ["length"], out=tmp_path, seeds=2, **HALF_SETS | {"half_sets": 4})
    after = losses_in(tmp_path)
    assert (after[:3] == before).all()
    assert len(after) == 8
    assert evaluation.table.select("measure", "method").rows() == [
        ("lds", "length"), ("lds of one seed", "length"), ("lds of one seed", "another seed (ceiling)")
    ]  # fmt: skip
    ceiling = evaluation.values.filter(method="another seed (ceiling)").sort("query_id")["value"]
    two = after.reshape(2, 4, 5)
    assert ceiling.to_list() == pytest.approx([stats.spearmanr(*two[:, :, q]).statistic for q in range(5)])


@pytest.mark.usefixtures("without_charts")
def test_seeds_train_differently_and_are_averaged(facts_store, tmp_path):
    scores = np.random.default_rng(3).normal(size=(5, 12))
    options = HALF_SETS | {"half_sets": 7, "epochs": 2}
    evaluation = evaluate.lds(facts_store, [Scorer("own", lambda _: scores)], out=tmp_path, seeds=3, **options)
    loss_SMQ = losses_in(tmp_path).reshape(3, 7, 5)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(loss_SMQ[one] - loss_SMQ[other]).max(axis=1).min() > 1e-4  # in every half set
    summed = scores @ members(12, 7, 0).T
    values = evaluation.values.filter(method="own").sort("trial", "query_id", nulls_last=False)
    by_hand = [stats.spearmanr(summed[q], -loss_SMQ.mean(axis=0)[:, q]).statistic for q in range(5)]
    assert values.filter(measure="lds")["value"].to_list() == pytest.approx(by_hand)
    of_one = values.filter(measure="lds of one seed")
    for seed in range(3):
        by_hand = [stats.spearmanr(summed[q], -loss_SMQ[seed][:, q]).statistic for q in range(5)]
        assert of_one.filter(trial=seed)["value"].to_list() == pytest.approx(by_hand)


def test_parameter_without_gradient_is_unchanged(facts_store):
    loaded = load(facts_store, "base", "cpu")
    model = loaded.model
    model.register_parameter("unused", torch.nn.Parameter(torch.full((3, 2), 0.5)))
    subset = loaded.tokens([text(facts_store, "finetune", "f0-0"), text(facts_store, "finetune", "f1-0")])
    start = Start(model)
    index = [name for name, _ in start.chosen].index("unused")
    moments = second_moments(start, subset, lambda _: None)
    assert torch.equal(moments[index], torch.zeros(3, 2))
    one, other = (gradient(start, [item]) for item in subset)
    for i, (name, _) in enumerate(start.chosen):
        torch.testing.assert_close(moments[i], (one[i] ** 2 + other[i] ** 2) / 2, msg=name)
    stepper, last = Stepper(model, 1e-2, moments), start.chosen[-1][1].detach()
    before = last.clone()
    stepper._step(gradient(start, subset))
    assert torch.equal(model.unused.detach(), torch.full((3, 2), 0.5))
    assert not torch.equal(last, before)


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize(("targets", "told"), [("text", 0), ("predicted", 1)])
def test_training_on_own_predictions_is_noted(facts_store, tmp_path, targets, told):
    facts_store.variant_add("v", template="raw", targets=targets)
    evaluation = evaluate.lds(facts_store, ["length"], out=tmp_path, variants=["v"], **HALF_SETS | {"half_sets": 3})
    notes = [note for note in evaluation.notes if "the model's own predictions" in note]
    assert len(notes) == told
    assert all(note.startswith("12 of 12 samples") for note in notes)


KILLED = """
import os, signal, sys
from lark_store import Store, evaluate
from lark_store.evaluate.progress_log import Journal
write = Journal.write
def torn(self, row):
    if len(self.done) == 2:
        self._file.write(b'{"piece": "seed 0, half')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, row)
Journal.write = torn
with Store.open(sys.argv[1]) as store:
    evaluate.lds(store, ["length"], checkpoint="base", half_sets=4, learning_rate=1e-3, out=sys.argv[2])
"""


@pytest.mark.usefixtures("without_charts")
def test_killed_evaluation_resumes_with_equal_results(facts_store, facts_path, tmp_path):
    undisturbed = evaluate.lds(
        facts_store, ["length", "small:cosine@base"], out=tmp_path / "whole", **HALF_SETS | {"half_sets": 4}
    )
    assert run_forked(KILLED, facts_path, tmp_path / "cut") == -signal.SIGKILL
    assert journal_of(tmp_path / "cut").read_bytes().endswith(b"half")
    evaluation = evaluate.lds(
        facts_store, ["length", "small:cosine@base"], out=tmp_path / "cut", **HALF_SETS | {"half_sets": 4}
    )
    assert journal_of(tmp_path / "cut").read_bytes() == journal_of(tmp_path / "whole").read_bytes()
    assert evaluation.values.equals(undisturbed.values)


def test_two_evaluations_do_not_share_a_journal(tmp_path):
    with journal(tmp_path, "lds", {"a": 1}), pytest.raises(StoreBusyError), journal(tmp_path, "lds", {"a": 1}):
        pass
    with journal(tmp_path, "lds", {"a": 1}) as one, journal(tmp_path, "lds", {"a": 2}) as other:
        one.add("x", [1.0])
        assert not other.done


# --- facts ---------------------------------------------------------------------------------------------------------


def test_rank_metrics_match_hand_computation():
    score = np.array([[0.9, 0.5, 0.5, 0.1], [0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4]])
    own = np.array([[False, True, False, True], [True, False, False, True], [False] * 4])
    every = np.ones_like(own)
    result = rank_metrics(score, own, every, (1, 3))
    assert result["mrr"].tolist()[:2] == [1 / 3, 1.0]  # of two 0.5, the own one comes last
    assert result["recall@1"].tolist()[:2] == [0.0, 1.0]
    assert result["recall@3"].tolist()[:2] == [0.5, 0.5]
    assert all(np.isnan(values[2]) for values in result.values())
    few = every.copy()
    few[0, 0] = False
    assert rank_metrics(score, own, few, (1,))["mrr"][0] == 0.5


@pytest.mark.usefixtures("without_charts")
def test_oracle_score_finds_all_facts(facts_store, tmp_path):
    evaluation = evaluate.facts(
        facts_store, ["same:fact", "same:relation", "length"], key="fact", at=(1, 2), out=tmp_path
    )
    table = evaluation.table.rows_by_key(["measure", "method"], named=True, unique=True)
    assert table["mrr", "same:fact"]["value"] == 1
    assert table["recall@2", "same:fact"]["value"] == 1
    assert table["mrr", "same:fact"]["n_queries"] == 4
    assert table["mrr", "length"]["difference"] == table["mrr", "length"]["value"] - 1
    # `river`: facts 0, 2, 4, of whose 6 statements a query's own 2 come last; those of 1 and 3 at the very end
    assert table["mrr", "same:relation"]["value"] == pytest.approx((1 / 5 + 1 / 5 + 1 / 11 + 1 / 11) / 4)
    assert evaluation.notes == ["skipped 1 of 5 queries without an own sample among the candidates"]


@pytest.mark.usefixtures("without_charts")
def test_store_scores_equal_top(facts_store, tmp_path):
    evaluation = evaluate.facts(facts_store, ["small:cosine@base+epoch-1", "bm25"], key="fact", at=(3,), out=tmp_path)
    mrr = evaluation.values.filter(measure="mrr", method="small:cosine@base+epoch-1").sort("query_id")["value"]
    expected = []
    for i in range(4):
        frames = [
            facts_store.top(f"q{i}", checkpoint=name, sketcher="small", k=100).frame for name in ("base", "epoch-1")
        ]
        total = pl.concat(frames).group_by("sample_id").agg(pl.col("score").sum()).sort("score", descending=True)
        own = total["sample_id"].str.starts_with(f"f{i}-")
        expected.append(1 / (own.arg_true()[0] + 1))
    assert mrr.to_list() == expected


@pytest.mark.usefixtures("without_charts")
def test_notes_of_top_are_reported(facts_store, tmp_path, monkeypatch):
    scores = Store.scores
    monkeypatch.setattr(Store, "scores", lambda *a, **k: replace(scores(*a, **k), notes=("it is overfitted",)))
    evaluation = evaluate.facts(facts_store, ["small:cosine@base"], key="fact", out=tmp_path)
    assert "small:cosine@base: it is overfitted" in evaluation.notes


def test_bm25_equals_the_stores(facts_store):
    options = {"sources": ["finetune"], "variants": ["chatml"], "queries": "test", "query_variant": "chatml"}
    material = gather(facts_store, **options)
    baseline_scores = BASELINES["bm25"].scores(material, BaselineContext())
    for query, row in zip(material.queries, baseline_scores, strict=True):
        expected = facts_store.similar_text(query.id, k=100).sort("sample_id")
        assert expected["sample_id"].to_list() == [text.id for text in material.samples]
        assert row.tolist() == expected["score"].to_list()


@pytest.mark.usefixtures("without_charts")
def test_rerank_pool_holds_own_bm25_same_answer_and_random_samples(facts_store, tmp_path, monkeypatch):
    evaluation = evaluate.facts(facts_store, ["same:fact", "random"], key="fact", rerank=True, out=tmp_path)
    assert any(note.startswith("rerank: the pool holds all ") for note in evaluation.notes)  # there are few
    monkeypatch.setattr("lark_store.evaluate.kinds.facts.POOL_SIZE", 2)
    evaluation = evaluate.facts(facts_store, ["same:fact", "random"], key="fact", rerank=True, out=tmp_path)
    assert [note for note in evaluation.notes if note.startswith("rerank")] == [
        "rerank: `bm25-okapi` and `bm25` agree on 100.0% of each query's first 2 samples"
    ]
    assert sorted(evaluation.values.filter(measure="rerank mrr")["trial"].unique()) == [0, 1, 2]
    assert evaluation.table.filter(measure="rerank mrr", method="same:fact")["value"].item() == 1
    own = np.zeros((1, 12), dtype=bool)
    own[0, :2] = True
    bm25 = np.arange(12.0)[None]
    alike = np.zeros((1, 12), dtype=bool)
    alike[0, [1, 4, 5, 6]] = True
    pools = [draw_pools(own, bm25, alike, [0, trial])[0] for trial in range(20)]
    assert all(pool[[0, 1, 10, 11]].all() for pool in pools)
    assert {int(pool[[4, 5, 6]].sum()) for pool in pools} >= {2}
    assert len({tuple(pool) for pool in pools}) > 5


def test_queries_of_a_trial_share_the_random_candidates_of_the_pool(monkeypatch):
    monkeypatch.setattr("lark_store.evaluate.kinds.facts.POOL_SIZE", 3)
    own, bm25 = np.eye(4, 50, dtype=bool), np.zeros((4, 50))
    bm25[:, 40:43] = 1
    trials = [draw_pools(own, bm25, np.zeros_like(own), [0, trial]) for trial in range(3)]
    random = [pools & ~own & (bm25 == 0) for pools in trials]
    shared = [rows[0, 4:] for rows in random]
    assert all((rows[:, 4:] == rows[0, 4:]).all() for rows in random)
    assert all(0 < row.sum() <= 3 for row in shared)
    assert len({tuple(row) for row in shared}) == 3


def test_the_pools_engine_is_an_option(facts_store, tmp_path, monkeypatch):
    monkeypatch.setattr("lark_store.evaluate.kinds.facts.POOL_SIZE", 2)
    options = {"key": "fact", "rerank": True, "out": tmp_path}
    for name in ("bm25-okapi", "bm25"):
        evaluation = evaluate.facts(facts_store, ["same:fact"], pool_by=name, **options)
        (recipe,) = facts_store.sql(
            "select distinct recipe from evaluations where evaluation = ?", [evaluation.name]
        ).row(0)
        assert json.loads(recipe)["pool_by"] == name
    with pytest.raises(InputError, match="`cosine` can't choose the pool"):
        evaluate.facts(facts_store, ["same:fact"], pool_by="cosine", **options)


def test_answer_is_the_response_or_part_of_the_text(facts_store):
    material = gather(facts_store, sources=["finetune"], variants=["chatml"], queries=None, query_variant="chatml")
    alike = same_answer(material)
    assert [material.samples[i].id for i in np.flatnonzero(alike[1])] == ["f1-0", "f1-1", "f5-0", "f5-1"]
    assert not alike[4].any()


# --- one real step -------------------------------------------------------------------------------------------------


def gradients(store, material, moments=None):
    """Exact gradients at `base`: of the queries (Q, P), and of the samples (N, P) as a step goes along them."""
    loaded = load(store, "base", "cpu")
    start = Start(loaded.model)

    def flat(text):
        return torch.cat([g.flatten() for g in gradient(start, loaded.tokens([text]))]).double()

    query, steps = (torch.stack([flat(text) for text in subset]) for subset in (material.queries, material.samples))
    if moments is not None:
        v = torch.cat([moment.flatten() for moment in moments]).double()
        steps = steps / ((0.999 * v + 0.001 * steps**2).sqrt() + 1e-8)
    return query, steps


@pytest.mark.usefixtures("without_charts")
def test_sgd_step_changes_losses_by_gradient_dot_products(facts_store, tmp_path):
    def exact(material):
        query, steps = gradients(facts_store, material)
        return (query @ steps.T).numpy()

    scores = [Scorer("dot", exact), Scorer("minus", lambda m: -exact(m)), "random"]
    evaluation = evaluate.causal(
        facts_store, scores, checkpoint="base", optimizer="sgd", learning_rate=1e-3, out=tmp_path
    )
    table = evaluation.table.rows_by_key(["measure", "method"], named=True, unique=True)
    assert table["spearman", "dot"]["value"] > 0.98
    assert table["spearman", "minus"]["value"] < -0.98
    assert abs(table["spearman", "random"]["value"]) < 0.6
    assert (table["sign", "dot"]["value"], table["sign", "minus"]["value"]) == (1, 0)
    (kept,) = tmp_path.glob("steps-*.jsonl")
    before = kept.read_bytes()
    evaluate.causal(facts_store, ["length"], checkpoint="base", optimizer="sgd", learning_rate=1e-3, out=tmp_path)
    assert kept.read_bytes() == before  # no step is made twice


@pytest.mark.usefixtures("without_charts")
def test_adam_step_changes_losses_by_scaled_gradients(facts_store, tmp_path):
    def exact(material):
        loaded = load(facts_store, "base", "cpu")
        moments = second_moments(Start(loaded.model), loaded.tokens(material.samples), lambda _: None)
        query, steps = gradients(facts_store, material, moments)
        return (query @ steps.T).numpy()

    evaluation = evaluate.causal(
        facts_store, [Scorer("adam", exact)], checkpoint="base", learning_rate=1e-5, out=tmp_path
    )
    assert evaluation.table.filter(measure="spearman")["value"].item() > 0.98


def test_adam_step_equals_torch_and_is_undone(facts_store):
    loaded = load(facts_store, "base", "cpu")
    (query,) = loaded.tokens([text(facts_store, "test", "q0")])
    subset = loaded.tokens([text(facts_store, "finetune", "f0-0"), text(facts_store, "finetune", "f1-0")])
    weights = [p.clone() for p in loaded.model.parameters()]
    stepper = Stepper(loaded.model, 1e-3)
    stepper.moments = second_moments(stepper.start, subset, lambda _: None)
    fall = stepper.effect(subset, [query], losses(loaded.model, [query]))
    assert all((p == kept).all() for p, kept in zip(loaded.model.parameters(), weights, strict=True))

    before = losses(loaded.model, [query])
    parameters = [p for _, p in stepper.start.chosen]
    optimizer = torch.optim.Adam(parameters, 1e-3, betas=(0.0, 0.999))
    for p, g, v in zip(parameters, gradient(stepper.start, subset), stepper.moments, strict=True):
        p.grad = g
        optimizer.state[p] = {"step": torch.tensor(1e6), "exp_avg": torch.zeros_like(p), "exp_avg_sq": v.clone()}
    optimizer.step()
    assert fall.item() == pytest.approx((before - losses(loaded.model, [query])).item(), rel=1e-4)
    assert abs(fall.item()) > 1e-3


def text(store, source, sample_id):
    options = {"sources": [source], "variants": ["chatml"], "queries": "test", "query_variant": "chatml"}
    return next(text for text in gather(store, **options).samples if text.id == sample_id)


@pytest.mark.usefixtures("without_charts")
def test_top_samples_by_gradient_improve_the_answer_most(facts_store, tmp_path):
    def exact(material):
        query, steps = gradients(facts_store, material)
        return (query @ steps.T).numpy()

    step = {"checkpoint": "base", "optimizer": "sgd", "learning_rate": 1e-2}
    scores = [Scorer("dot", exact), Scorer("minus", lambda m: -exact(m))]
    evaluation = evaluate.tail_patch(facts_store, scores, k=3, out=tmp_path, **step)
    table = evaluation.table.rows_by_key("method", named=True, unique=True)
    assert list(table) == ["dot", "minus", "random", "bm25"]
    assert table["dot"]["value"] > table["random"]["value"] > table["minus"]["value"]

    query, loaded = text(facts_store, "test", "q2"), load(facts_store, "base", "cpu")
    material = gather(facts_store, sources=["finetune"], variants=["chatml"], queries="test", query_variant="chatml")
    best = np.argsort(-exact(material)[2])[:3]
    tokens, subset = loaded.tokens([query]), loaded.tokens([material.samples[i] for i in best])
    start = Start(loaded.model)
    before = losses(loaded.model, tokens)
    for (_, p), g in zip(start.chosen, gradient(start, subset), strict=True):
        p.data -= 1e-2 * g
    gain = (before - losses(loaded.model, tokens)).item() * tokens[0].n_targets
    result = evaluation.values.filter(method="dot", query_id="q2")["value"].item()
    assert result == pytest.approx(gain, rel=1e-3)


# --- separation of groups, and agreement between scores ------------------------------------------------------------


@pytest.mark.usefixtures("without_charts")
def test_separation_of_formats_and_domains(facts_store, tmp_path):
    facts_store.source_add(
        "songs", write_jsonl(tmp_path / "songs.jsonl", text_rows(3)), stage="pretrain", domain="music"
    )

    def by(test):
        return lambda material: np.array([[test(t) for t in material.samples]] * len(material.queries), np.float32)

    scores = [
        Scorer("format", by(lambda t: t.variant == "chatml")),
        Scorer("source", by(lambda t: t.source == "songs")),
        Scorer("nothing", by(lambda _: 1)),
    ]
    query = {"sources": ["finetune", "songs"], "variants": ["raw", "chatml"], "out": tmp_path}
    evaluation = evaluate.format(facts_store, scores, against_rest=["songs"], domains=["music"], **query)
    value = {
        (measure, method): v for measure, method, v in evaluation.table.select("measure", "method", "value").rows()
    }
    measures = ["format", "source songs", "domain music"]
    assert [value[measure, "format"] for measure in measures] == [1, 0.5, 0.5]
    assert [value[measure, "source"] for measure in measures] == [0.5, 1, 1]
    assert [value[measure, "nothing"] for measure in measures] == [0.5, 0.5, 0.5]
    for options, message in (
        ({"variants": ["raw"]}, "nothing to compare"),
        ({"against_rest": ["nowhere"]}, "`source nowhere` has 0 of 15 samples"),
        ({"sources": ["songs"], "domains": ["music"]}, "`domain music` has 3 of 3 samples"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.format(facts_store, scores, **query | options)


def test_auc_equals_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 5, size=(3, 20)), rng.random(20) < 0.4
    pairs = score[:, positive][:, :, None] - score[:, ~positive][:, None, :]
    by_hand = ((pairs > 0) + 0.5 * (pairs == 0)).mean(axis=(1, 2))
    assert auc(score, positive) == pytest.approx(by_hand)


def test_rank_correlation_equals_scipy():
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 6, size=(4, 30)), rng.normal(size=(4, 30))
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(left, right, strict=True)]
    assert ranks.spearman(left, right) == pytest.approx(expected)


@pytest.mark.usefixtures("without_charts")
def test_agreement_with_a_reference(facts_store, tmp_path):
    opposite = Scorer("opposite", lambda m: -evaluate_random(m))
    evaluation = evaluate.spearman(facts_store, ["random", opposite, "length"], reference="random", out=tmp_path)
    assert evaluation.table["value"].to_list()[:2] == pytest.approx([1, -1])
    assert abs(evaluation.table["value"][2]) < 0.5
    with pytest.raises(InputError, match="2 samples have no rank correlation"):
        evaluate.spearman(facts_store, ["random"], reference="length", max_samples=2, out=tmp_path)


def evaluate_random(material):
    return BASELINES["random"].scores(material, BaselineContext())


# --- stored results ------------------------------------------------------------------------------------------------


def test_figures_are_stored_and_rerun_is_idempotent(facts_store, tmp_path):
    evaluation = [evaluate.facts(facts_store, ["bm25", "random"], key="fact", out=tmp_path) for _ in range(2)]
    rows = facts_store.sql("from evaluations")
    assert rows["evaluation"].unique().to_list() == [evaluation[0].name]
    assert rows.select(evaluation[0].values.columns).equals(evaluation[0].values)
    assert evaluation[0].values.equals(evaluation[1].values)
    evaluate.facts(facts_store, ["bm25"], key="fact", out=tmp_path, name="mine")
    with pytest.raises(NameUnknownError):
        evaluate.facts(facts_store, ["bm26"], key="fact", out=tmp_path, name="mine")
    assert sorted(facts_store.sql("select distinct evaluation from evaluations")["evaluation"]) == [
        evaluation[0].name,
        "mine",
    ]
    assert sorted(path.suffix for path in evaluation[0].files) == [".csv", ".csv", ".html", ".png", ".svg"]
    assert all(path.stat().st_size for path in evaluation[0].files)
    html = next(path for path in evaluation[0].files if path.suffix == ".html").read_text(encoding="utf-8")
    assert "<script src" not in html


def test_a_table_averages_trials_and_pairs_differences_by_query():
    rows = [("a", "m", "q1", 0, 1.0), ("a", "m", "q1", 1, 0.0), ("a", "m", "q2", 0, 1.0), ("b", "m", "q1", 0, 0.25)]
    values = pl.DataFrame(rows, ["method", "measure", "query_id", "trial", "value"], orient="row")
    a, b = tabulated(values).rows(named=True)
    assert (a["value"], a["difference"], a["n_queries"]) == (0.75, None, 2)
    assert (b["value"], b["difference"], b["n_queries"]) == (0.25, -0.25, 1)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([], InputError, "no score is given"),
        (["bm25", "bm25"], InputError, "`bm25` is given twice"),
        (["small@"], InputError, "`small@` is not a score"),
        (["smal:cosine@base"], NameUnknownError, "did you mean `small`"),
        (["small:cosine"], InputError, "`small:cosine` names no checkpoint"),
        (["small:cosine@nowhere"], NameUnknownError, "no checkpoint `nowhere`"),
        (["small:cosin@base"], InputError, "there is no method `cosin`"),
        (["same"], InputError, "`same` needs a column"),
        (["same:nothing"], InputError, "no sample has the same value of `nothing`"),
        (["lark:cosine@base"], NothingToScoreError, "`lark`"),
        ([Scorer("bad", lambda _: np.zeros((1, 1)))], InputError, "`bad` returned 1 rows"),
        ([Scorer("nan", lambda _: np.full((5, 12), np.nan))], InputError, "60 non-finite scores"),
    ],
)
def test_unknown_score_is_a_clear_error(facts_store, tmp_path, scores, error, message):
    with pytest.raises(error, match=message):
        evaluate.facts(facts_store, scores, key="fact", out=tmp_path)


@pytest.mark.usefixtures("without_charts")
def test_candidate_without_sketch_is_named(facts_store, tmp_path):
    facts_store.source_add("finetune", write_jsonl(tmp_path / "more.jsonl", fact_rows(7, 1)), stage="finetune")
    with pytest.raises(
        NothingToScoreError, match="2 of 14 samples have no score by `small:cosine@base`, such as `f7-0`"
    ):
        evaluate.facts(facts_store, ["small:cosine@base"], key="fact", out=tmp_path)
    evaluate.facts(facts_store, ["bm25"], key="fact", out=tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"half_sets": 2}, InputError, "2 half sets"),
        ({"learning_rate": 0}, InputError, "invalid training settings"),
        ({"checkpoint": "nowhere"}, NameUnknownError, "no checkpoint `nowhere`"),
        ({"sources": ["nothing"]}, NameUnknownError, "no source `nothing`"),
        ({"variants": ["nothing"]}, NameUnknownError, "no variant `nothing`"),
        ({"variants": ["raw", "chatml"]}, InputError, "in one variant"),
        ({"queries": "nothing"}, NameUnknownError, "no source `nothing`"),
        ({"max_samples": 3}, InputError, "half of 3 samples is fewer than 2"),
        ({"max_queries": 0}, InputError, "queries must be at least 1, not 0"),
        ({"learning_rate": 1e30}, InputError, "is not finite"),
    ],
)
def test_unsupported_retraining_is_a_clear_error(facts_store, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        evaluate.lds(facts_store, ["length"], out=tmp_path, **HALF_SETS | options)


def test_unshared_key_is_a_clear_error(facts_store, tmp_path):
    with pytest.raises(InputError, match="no query has the same value of `colour`"):
        evaluate.facts(facts_store, ["bm25"], key="colour", out=tmp_path)


# --- the command line ----------------------------------------------------------------------------------------------


def test_command_prints_the_functions_result(facts_store, tmp_path):
    path = store_label(Path(facts_store.path))
    line = f"evaluate facts --score bm25 --score small:cosine@base --key fact --at 2 --out {tmp_path / 'a'} -f json"
    result = lark(line, store=path)
    assert result.code == 0, result.err
    same = evaluate.facts(facts_store, ["bm25", "small:cosine@base"], key="fact", at=(2,), out=tmp_path / "b")
    assert result.rows == same.table.to_dicts()
    assert f"saved as `{same.name}`" in result.err


@pytest.mark.parametrize(
    ("line", "measures"),
    [
        ("lds -c base --half-sets 3 --epochs 2 --batch-size 2 --weight-decay 0.1 --max-samples 6", ["lds"] * 2),
        ("causal -c base --optimizer sgd --max-samples 3 --max-queries 2", ["spearman", "spearman", "sign", "sign"]),
        ("tail-patch -c base -k 2 --moment-samples 2 --max-queries 2", ["log-probability"] * 3),
        ("format --variant raw --variant chatml", ["format"] * 2),
        (
            "spearman --reference bm25 --seed 3",
            ["spearman"] * 2 + ["overhead_seconds"] * 3 + ["pairwise_seconds"] * 3,
        ),
    ],
)
def test_each_kind_has_a_command(facts_store, tmp_path, line, measures):
    path = store_label(Path(facts_store.path))
    result = lark(f"evaluate {line} --score length --score random --out {tmp_path} --name mine -f json", store=path)
    assert result.code == 0, result.err
    assert [row["measure"] for row in result.rows] == measures
    assert facts_store.sql("select distinct kind from evaluations").item() == line.split()[0]
    assert (tmp_path / "mine.svg").is_file()


def test_unwritable_folder_is_a_clear_error(facts_store, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    result = lark(
        f"evaluate facts --score bm25 --key fact --out {tmp_path / 'file'}", store=store_label(Path(facts_store.path))
    )
    assert result.code == 1
    assert result.err.startswith(f"error: `{tmp_path / 'file'}` is not a folder\n\nhint: ")
