"""Evaluations: figures that can be worked out by hand, a perfect scorer, killed and run again, the command line."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from conftest import copy_store, named, text_rows, write_jsonl
from scipy import stats
from test_cli import lark

from lark_store import Store, evaluate
from lark_store.errors import InputError, NameUnknownError, NothingToScoreError, StoreBusyError
from lark_store.evaluate import agree
from lark_store.evaluate.agree import auc
from lark_store.evaluate.finding import found, pools_of, same_answer
from lark_store.evaluate.journal import journal
from lark_store.evaluate.material import gather, load
from lark_store.evaluate.retraining import members
from lark_store.evaluate.rivals import RIVALS, Given
from lark_store.evaluate.scorers import Scorer
from lark_store.evaluate.steps import Stepper, gradient, second_moments
from lark_store.evaluate.task import tabulated
from lark_store.evaluate.training import Start, losses

PLACES = ["Rome", "Oslo", "Lima", "Cairo"]


def fact_rows(start, n):
    """Two statements each of facts, with the fact's key and its relation."""
    return [
        {"id": f"f{i}-{j}", "text": text, "fact": i, "relation": "capital" if i % 2 else "river"}
        for i in range(start, start + n)
        for j, text in enumerate((f"{PLACES[i % 4]} is seen in land {i}.", f"Land {i} has the old {PLACES[i % 4]}."))
    ]


@pytest.fixture(scope="module")
def facts_path(tmp_path_factory, checkpoints):
    """A store of 6 facts in 12 statements, 4 queries of them and one of none, sketched at both checkpoints."""
    root = tmp_path_factory.mktemp("facts")
    asked = [
        {"id": f"q{i}", "prompt": f"What is in land {i}?", "response": PLACES[i % 4], "fact": i, "relation": "river"}
        for i in (0, 1, 2, 3)
    ]
    asked.append({"id": "q9", "prompt": "What is in land 9?", "response": "Nothing", "fact": 9, "relation": "sea"})
    with Store.create(root / "lark.store") as store:
        for epoch, (name, path) in enumerate(checkpoints.items()):
            store.checkpoint_add(name, path, epoch=epoch, learning_rate=1e-3)
        store.source_add("finetune", write_jsonl(root / "finetune.jsonl", fact_rows(0, 6)), stage="finetune")
        store.source_add("test", write_jsonl(root / "test.jsonl", asked), stage="query")
        store.sketcher_add("small", k=1024)
        store.ingest(list(checkpoints), ["finetune", "test"], ["chatml"], sketcher="small")
    return root / "lark.store"


@pytest.fixture
def store(facts_path, tmp_path):
    with Store.open(copy_store(facts_path, tmp_path / "lark.store")) as opened:
        yield opened


def perfect(losses_MQ, member_MN):
    """A score whose sums over half sets are −loss: the solution of a linear system with more samples than half sets."""
    return Scorer("perfect", lambda _: np.linalg.lstsq(member_MN.astype(float), -losses_MQ, rcond=None)[0].T)


HALF_SETS = {"checkpoint": "base", "half_sets": 6, "learning_rate": 1e-3}


def journal_of(folder):
    (path,) = folder.glob("lds-*.jsonl")
    return path


def losses_in(folder):
    rows = pl.read_ndjson(journal_of(folder).read_bytes().split(b"\n", 1)[1])
    return np.array(rows["values"].to_list())


# --- retraining ----------------------------------------------------------------------------------------------------


def test_a_score_whose_sums_are_the_losses_has_an_lds_of_1_and_a_random_one_about_0(store, tmp_path):
    evaluate.lds(store, ["random"], out=tmp_path / "out", **HALF_SETS)
    truth = perfect(losses_in(tmp_path / "out"), members(12, 6, 0))
    random = [Scorer(f"random {i}", lambda _, i=i: np.random.default_rng(i).normal(size=(5, 12))) for i in range(40)]
    made = evaluate.lds(store, [truth, *random], out=tmp_path / "out", **HALF_SETS)
    table = made.table.filter(measure="lds")
    assert table["value"][0] == pytest.approx(1)
    assert abs(table["value"][1:].mean()) < 0.2
    assert (table["difference"][1:] < 0).all()
    assert losses_in(tmp_path / "out").shape == (6, 5)  # nothing was trained again


def test_half_sets_are_halves_and_stay_the_same_when_more_are_drawn():
    few, many = members(11, 3, 7), members(11, 9, 7)
    assert (many[:3] == few).all()
    assert set(many.sum(axis=1)) == {5}
    assert len(np.unique(many, axis=0)) == 9
    assert not (members(11, 3, 8) == few).all()


def test_more_half_sets_and_seeds_go_on_from_what_is_there(store, tmp_path):
    evaluate.lds(store, ["length"], out=tmp_path, **HALF_SETS | {"half_sets": 3})
    before = losses_in(tmp_path)
    made = evaluate.lds(store, ["length"], out=tmp_path, seeds=2, **HALF_SETS | {"half_sets": 4})
    after = losses_in(tmp_path)
    assert (after[:3] == before).all()
    assert len(after) == 8
    assert made.table.select("measure", "method").rows() == [
        ("lds", "length"), ("lds of one seed", "length"), ("lds of one seed", "another seed (ceiling)")
    ]  # fmt: skip
    ceiling = made.values.filter(method="another seed (ceiling)").sort("query_id")["value"]
    two = after.reshape(2, 4, 5)
    assert ceiling.to_list() == pytest.approx([stats.spearmanr(*two[:, :, q]).statistic for q in range(5)])


@pytest.mark.parametrize(("targets", "told"), [("text", 0), ("predicted", 1)])
def test_training_on_the_models_own_predictions_is_told(store, tmp_path, targets, told):
    store.variant_add("v", template="raw", targets=targets)
    made = evaluate.lds(store, ["length"], out=tmp_path, variants=["v"], **HALF_SETS | {"half_sets": 3})
    notes = [note for note in made.notes if "the model's own predictions" in note]
    assert len(notes) == told
    assert all(note.startswith("12 of 12 samples") for note in notes)


def _killed(path, out, after):
    """Retrain and be killed (SIGKILL) while a line is written, after some were."""
    from lark_store.evaluate.journal import Journal

    write = Journal.write

    def torn(self, row):
        if len(self.done) == after:
            self._file.write(b'{"piece": "seed 0, half')
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, row)

    Journal.write = torn
    with Store.open(path) as store:
        evaluate.lds(store, ["length"], out=out, **HALF_SETS)


def test_killed_and_run_again_it_goes_on_and_finds_the_same(store, facts_path, tmp_path):
    undisturbed = evaluate.lds(store, ["length", "small:cosine@base"], out=tmp_path / "whole", **HALF_SETS)
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(facts_path, tmp_path / "cut", 2))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert journal_of(tmp_path / "cut").read_bytes().endswith(b"half")
    made = evaluate.lds(store, ["length", "small:cosine@base"], out=tmp_path / "cut", **HALF_SETS)
    assert journal_of(tmp_path / "cut").read_bytes() == journal_of(tmp_path / "whole").read_bytes()
    assert made.values.equals(undisturbed.values)


def test_two_at_once_do_not_write_one_journal(tmp_path):
    with journal(tmp_path, "lds", {"a": 1}), pytest.raises(StoreBusyError), journal(tmp_path, "lds", {"a": 1}):
        pass
    with journal(tmp_path, "lds", {"a": 1}) as one, journal(tmp_path, "lds", {"a": 2}) as other:
        one.add("x", [1.0])
        assert not other.done


# --- facts ---------------------------------------------------------------------------------------------------------


def test_the_ranks_of_a_query_s_own_samples_by_hand():
    score = np.array([[0.9, 0.5, 0.5, 0.1], [0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4]])
    own = np.array([[False, True, False, True], [True, False, False, True], [False] * 4])
    every = np.ones_like(own)
    made = found(score, own, every, (1, 3))
    assert made["mrr"].tolist()[:2] == [1 / 3, 1.0]  # of two 0.5, the own one comes last
    assert made["recall@1"].tolist()[:2] == [0.0, 1.0]
    assert made["recall@3"].tolist()[:2] == [0.5, 0.5]
    assert all(np.isnan(values[2]) for values in made.values())
    few = every.copy()
    few[0, 0] = False
    assert found(score, own, few, (1,))["mrr"][0] == 0.5


def test_the_score_that_knows_the_facts_finds_them_all(store, tmp_path):
    made = evaluate.facts(store, ["same:fact", "same:relation", "length"], key="fact", at=(1, 2), out=tmp_path)
    table = made.table.rows_by_key(["measure", "method"], named=True, unique=True)
    assert table["mrr", "same:fact"]["value"] == 1
    assert table["recall@2", "same:fact"]["value"] == 1
    assert table["mrr", "same:fact"]["n_queries"] == 4
    assert table["mrr", "length"]["difference"] == table["mrr", "length"]["value"] - 1
    # `river`: facts 0, 2, 4, of whose 6 statements a query's own 2 come last; those of 1 and 3 at the very end
    assert table["mrr", "same:relation"]["value"] == pytest.approx((1 / 5 + 1 / 5 + 1 / 11 + 1 / 11) / 4)
    assert made.notes == ["1 of 5 queries have no own sample among the candidates: left out"]


def test_the_store_s_scores_are_those_of_top(store, tmp_path):
    made = evaluate.facts(store, ["small:cosine@base+epoch-1", "bm25"], key="fact", at=(3,), out=tmp_path)
    mrr = made.values.filter(measure="mrr", method="small:cosine@base+epoch-1").sort("query_id")["value"]
    expected = []
    for i in range(4):
        frames = [store.top(f"q{i}", checkpoint=name, sketcher="small", k=100).frame for name in ("base", "epoch-1")]
        total = pl.concat(frames).group_by("sample_id").agg(pl.col("score").sum()).sort("score", descending=True)
        own = total["sample_id"].str.starts_with(f"f{i}-")
        expected.append(1 / (own.arg_true()[0] + 1))
    assert mrr.to_list() == expected


def test_what_the_store_says_of_its_scores_is_a_note(store, tmp_path, monkeypatch):
    scores = Store.scores
    monkeypatch.setattr(Store, "scores", lambda *a, **k: replace(scores(*a, **k), notes=("it is overfitted",)))
    made = evaluate.facts(store, ["small:cosine@base"], key="fact", out=tmp_path)
    assert "small:cosine@base: it is overfitted" in made.notes


def test_bm25_is_the_store_s(store):
    asked = {"sources": ["finetune"], "variants": ["chatml"], "queries": "test", "query_variant": "chatml"}
    material = gather(store, **asked)
    made = RIVALS["bm25"](material, Given())
    for query, row in zip(material.queries, made, strict=True):
        expected = store.similar_text(query.id, k=100).sort("sample_id")
        assert expected["sample_id"].to_list() == [text.id for text in material.samples]
        assert row.tolist() == expected["score"].to_list()


def test_the_rerank_protocol_asks_among_its_own_bm25_s_the_same_answer_s_and_others(store, tmp_path, monkeypatch):
    made = evaluate.facts(store, ["same:fact", "random"], key="fact", rerank=True, out=tmp_path)
    assert any(note.startswith("rerank: its candidates are all ") for note in made.notes)  # there are few
    monkeypatch.setattr("lark_store.evaluate.finding.OF_EACH", 2)
    made = evaluate.facts(store, ["same:fact", "random"], key="fact", rerank=True, out=tmp_path)
    assert not any(note.startswith("rerank") for note in made.notes)
    assert sorted(made.values.filter(measure="rerank mrr")["trial"].unique()) == [0, 1, 2]
    assert made.table.filter(measure="rerank mrr", method="same:fact")["value"].item() == 1
    own = np.zeros((1, 12), dtype=bool)
    own[0, :2] = True
    bm25 = np.arange(12.0)[None]
    alike = np.zeros((1, 12), dtype=bool)
    alike[0, [1, 4, 5, 6]] = True
    pools = [pools_of(own, bm25, alike, [0, trial])[0] for trial in range(20)]
    assert all(pool[[0, 1, 10, 11]].all() for pool in pools)
    assert {int(pool[[4, 5, 6]].sum()) for pool in pools} >= {2}
    assert {int(pool.sum()) for pool in pools} == {8}
    assert len({tuple(pool) for pool in pools}) > 5


def test_an_answer_is_a_response_or_lies_in_a_text(store):
    material = gather(store, sources=["finetune"], variants=["chatml"], queries=None, query_variant="chatml")
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

    asked, steps = (torch.stack([flat(text) for text in some]) for some in (material.queries, material.samples))
    if moments is not None:
        v = torch.cat([each.flatten() for each in moments]).double()
        steps = steps / ((0.999 * v + 0.001 * steps**2).sqrt() + 1e-8)
    return asked, steps


def test_a_small_step_of_sgd_does_what_the_gradients_dot_products_say(store, tmp_path):
    def exact(material):
        asked, steps = gradients(store, material)
        return (asked @ steps.T).numpy()

    scores = [Scorer("dot", exact), Scorer("minus", lambda m: -exact(m)), "random"]
    made = evaluate.causal(store, scores, checkpoint="base", optimizer="sgd", learning_rate=1e-3, out=tmp_path)
    table = made.table.rows_by_key(["measure", "method"], named=True, unique=True)
    assert table["spearman", "dot"]["value"] > 0.98
    assert table["spearman", "minus"]["value"] < -0.98
    assert abs(table["spearman", "random"]["value"]) < 0.6
    assert (table["sign", "dot"]["value"], table["sign", "minus"]["value"]) == (1, 0)
    (kept,) = tmp_path.glob("steps-*.jsonl")
    before = kept.read_bytes()
    evaluate.causal(store, ["length"], checkpoint="base", optimizer="sgd", learning_rate=1e-3, out=tmp_path)
    assert kept.read_bytes() == before  # no step is made twice


def test_a_small_step_of_adam_does_what_the_scaled_gradients_say(store, tmp_path):
    def exact(material):
        loaded = load(store, "base", "cpu")
        moments = second_moments(Start(loaded.model), loaded.tokens(material.samples), lambda _: None)
        asked, steps = gradients(store, material, moments)
        return (asked @ steps.T).numpy()

    made = evaluate.causal(store, [Scorer("adam", exact)], checkpoint="base", learning_rate=1e-5, out=tmp_path)
    assert made.table.filter(measure="spearman")["value"].item() > 0.98


def test_a_step_of_adam_is_that_of_torch_and_is_undone(store):
    loaded = load(store, "base", "cpu")
    (query,) = loaded.tokens([text(store, "test", "q0")])
    some = loaded.tokens([text(store, "finetune", "f0-0"), text(store, "finetune", "f1-0")])
    weights = [p.clone() for p in loaded.model.parameters()]
    stepper = Stepper(loaded.model, 1e-3)
    stepper.moments = second_moments(stepper.start, some, lambda _: None)
    fall = stepper.effect(some, [query], losses(loaded.model, [query]))
    assert all((p == kept).all() for p, kept in zip(loaded.model.parameters(), weights, strict=True))

    before = losses(loaded.model, [query])
    parameters = [p for _, p in stepper.start.chosen]
    optimizer = torch.optim.Adam(parameters, 1e-3, betas=(0.0, 0.999))
    for p, g, v in zip(parameters, gradient(stepper.start, some), stepper.moments, strict=True):
        p.grad = g
        optimizer.state[p] = {"step": torch.tensor(1e6), "exp_avg": torch.zeros_like(p), "exp_avg_sq": v.clone()}
    optimizer.step()
    assert fall.item() == pytest.approx((before - losses(loaded.model, [query])).item(), rel=1e-4)
    assert abs(fall.item()) > 1e-3


def text(store, source, sample_id):
    asked = {"sources": [source], "variants": ["chatml"], "queries": "test", "query_variant": "chatml"}
    return next(text for text in gather(store, **asked).samples if text.id == sample_id)


def test_the_answer_gains_more_from_the_samples_that_its_gradient_names(store, tmp_path):
    def exact(material):
        asked, steps = gradients(store, material)
        return (asked @ steps.T).numpy()

    step = {"checkpoint": "base", "optimizer": "sgd", "learning_rate": 1e-2}
    scores = [Scorer("dot", exact), Scorer("minus", lambda m: -exact(m))]
    made = evaluate.tail_patch(store, scores, k=3, out=tmp_path, **step)
    table = made.table.rows_by_key("method", named=True, unique=True)
    assert list(table) == ["dot", "minus", "random", "bm25"]
    assert table["dot"]["value"] > table["random"]["value"] > table["minus"]["value"]

    query, loaded = text(store, "test", "q2"), load(store, "base", "cpu")
    material = gather(store, sources=["finetune"], variants=["chatml"], queries="test", query_variant="chatml")
    best = np.argsort(-exact(material)[2])[:3]
    tokens, some = loaded.tokens([query]), loaded.tokens([material.samples[i] for i in best])
    start = Start(loaded.model)
    before = losses(loaded.model, tokens)
    for (_, p), g in zip(start.chosen, gradient(start, some), strict=True):
        p.data -= 1e-2 * g
    gain = (before - losses(loaded.model, tokens)).item() * tokens[0].n_targets
    found = made.values.filter(method="dot", query_id="q2")["value"].item()
    assert found == pytest.approx(gain, rel=1e-3)


# --- what a score tells, and another one's agreement ---------------------------------------------------------------


def test_what_a_score_tells_apart(store, tmp_path):
    store.source_add("songs", write_jsonl(tmp_path / "songs.jsonl", text_rows(3)), stage="pretrain", domain="music")

    def by(test):
        return lambda material: np.array([[test(t) for t in material.samples]] * len(material.queries), np.float32)

    scores = [
        Scorer("format", by(lambda t: t.variant == "chatml")),
        Scorer("source", by(lambda t: t.source == "songs")),
        Scorer("nothing", by(lambda _: 1)),
    ]
    asked = {"sources": ["finetune", "songs"], "variants": ["raw", "chatml"], "out": tmp_path}
    made = evaluate.format(store, scores, against_rest=["songs"], domains=["music"], **asked)
    value = {(measure, method): v for measure, method, v in made.table.select("measure", "method", "value").rows()}
    measures = ["format", "source songs", "domain music"]
    assert [value[measure, "format"] for measure in measures] == [1, 0.5, 0.5]
    assert [value[measure, "source"] for measure in measures] == [0.5, 1, 1]
    assert [value[measure, "nothing"] for measure in measures] == [0.5, 0.5, 0.5]
    for options, message in (
        ({"variants": ["raw"]}, "nothing to tell apart"),
        ({"against_rest": ["nowhere"]}, "`source nowhere`: 0 of 15 samples"),
        ({"sources": ["songs"], "domains": ["music"]}, "`domain music`: 3 of 3 samples"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.format(store, scores, **asked | options)


def test_auc_is_what_its_pairs_say():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 5, size=(3, 20)), rng.random(20) < 0.4
    pairs = score[:, positive][:, :, None] - score[:, ~positive][:, None, :]
    by_hand = ((pairs > 0) + 0.5 * (pairs == 0)).mean(axis=(1, 2))
    assert auc(score, positive) == pytest.approx(by_hand)


def test_rank_correlation_is_scipy_s():
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 6, size=(4, 30)), rng.normal(size=(4, 30))
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(left, right, strict=True)]
    assert agree.spearman(left, right) == pytest.approx(expected)


def test_agreement_with_a_reference(store, tmp_path):
    opposite = Scorer("opposite", lambda m: -evaluate_random(m))
    made = evaluate.spearman(store, ["random", opposite, "length"], reference="random", out=tmp_path)
    assert made.table["value"].to_list()[:2] == pytest.approx([1, -1])
    assert abs(made.table["value"][2]) < 0.5
    with pytest.raises(InputError, match="2 samples have no rank correlation"):
        evaluate.spearman(store, ["random"], reference="length", max_samples=2, out=tmp_path)


def evaluate_random(material):
    return RIVALS["random"](material, Given())


# --- what is kept --------------------------------------------------------------------------------------------------


def test_the_figures_are_rows_of_a_view_and_the_same_command_again_is_harmless(store, tmp_path):
    made = [evaluate.facts(store, ["bm25", "random"], key="fact", out=tmp_path) for _ in range(2)]
    rows = store.sql("from evaluations")
    assert rows["evaluation"].unique().to_list() == [made[0].name]
    assert rows.select(made[0].values.columns).equals(made[0].values)
    assert made[0].values.equals(made[1].values)
    evaluate.facts(store, ["bm25"], key="fact", out=tmp_path, name="mine")
    with pytest.raises(NameUnknownError):
        evaluate.facts(store, ["bm26"], key="fact", out=tmp_path, name="mine")
    assert sorted(store.sql("select distinct evaluation from evaluations")["evaluation"]) == [made[0].name, "mine"]
    assert sorted(path.suffix for path in made[0].files) == [".csv", ".csv", ".html", ".png", ".svg"]
    assert all(path.stat().st_size for path in made[0].files)
    html = next(path for path in made[0].files if path.suffix == ".html").read_text(encoding="utf-8")
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
        ([], InputError, "no score is named"),
        (["bm25", "bm25"], InputError, "`bm25` is asked for twice"),
        (["small@"], InputError, "`small@` is no score"),
        (["smal:cosine@base"], NameUnknownError, "did you mean `small`"),
        (["small:cosine"], InputError, "`small:cosine` names no checkpoint"),
        (["small:cosine@nowhere"], NameUnknownError, "no checkpoint `nowhere`"),
        (["small:cosin@base"], InputError, "`cosin` is no method"),
        (["same"], InputError, "`same` needs a column"),
        (["same:nothing"], InputError, "no sample has the same value of `nothing`"),
        (["lark:cosine@base"], NothingToScoreError, "`lark`"),
        ([Scorer("bad", lambda _: np.zeros((1, 1)))], InputError, "`bad` gave 1 rows"),
        ([Scorer("nan", lambda _: np.full((5, 12), np.nan))], InputError, "60 are no numbers"),
    ],
)
def test_a_score_that_is_none_is_a_clear_error(store, tmp_path, scores, error, message):
    with pytest.raises(error, match=message):
        evaluate.facts(store, scores, key="fact", out=tmp_path)


def test_a_candidate_without_a_sketch_is_named(store, tmp_path):
    store.source_add("finetune", write_jsonl(tmp_path / "more.jsonl", fact_rows(7, 1)), stage="finetune")
    with pytest.raises(
        NothingToScoreError, match="2 of 14 samples have no score by `small:cosine@base`, such as `f7-0`"
    ):
        evaluate.facts(store, ["small:cosine@base"], key="fact", out=tmp_path)
    evaluate.facts(store, ["bm25"], key="fact", out=tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"half_sets": 2}, InputError, "2 half sets"),
        ({"learning_rate": 0}, InputError, "nothing can be trained"),
        ({"checkpoint": "nowhere"}, NameUnknownError, "no checkpoint `nowhere`"),
        ({"sources": ["nothing"]}, NameUnknownError, "no source `nothing`"),
        ({"variants": ["nothing"]}, NameUnknownError, "no variant `nothing`"),
        ({"variants": ["raw", "chatml"]}, InputError, "in one variant"),
        ({"queries": "nothing"}, NameUnknownError, "no source `nothing`"),
        ({"max_samples": 3}, InputError, "a half of 3 samples is fewer than 2"),
        ({"max_queries": 0}, InputError, "0 queries are none"),
        ({"learning_rate": 1e30}, InputError, "is no number"),
    ],
)
def test_what_can_not_be_retrained_is_a_clear_error(store, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        evaluate.lds(store, ["length"], out=tmp_path, **HALF_SETS | options)


def test_a_key_that_no_query_shares_is_a_clear_error(store, tmp_path):
    with pytest.raises(InputError, match="no query has the same value of `colour`"):
        evaluate.facts(store, ["bm25"], key="colour", out=tmp_path)


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_command_prints_what_the_function_returns(store, tmp_path):
    path = named(Path(store.path))
    line = f"evaluate facts --score bm25 --score small:cosine@base --key fact --at 2 --out {tmp_path / 'a'} -f json"
    made = lark(line, store=path)
    assert made.code == 0, made.err
    same = evaluate.facts(store, ["bm25", "small:cosine@base"], key="fact", at=(2,), out=tmp_path / "b")
    assert made.rows == same.table.to_dicts()
    assert f"kept as `{same.name}`" in made.err


@pytest.mark.parametrize(
    ("line", "measures"),
    [
        ("lds -c base --half-sets 3 --epochs 2 --batch-size 2 --weight-decay 0.1 --max-samples 6", ["lds"] * 2),
        ("causal -c base --optimizer sgd --max-samples 3 --max-queries 2", ["spearman", "spearman", "sign", "sign"]),
        ("tail-patch -c base -k 2 --moment-samples 2 --max-queries 2", ["log-probability"] * 3),
        ("format --variant raw --variant chatml", ["format"] * 2),
        ("spearman --reference bm25 --seed 3", ["spearman"] * 2),
    ],
)
def test_each_kind_has_a_command(store, tmp_path, line, measures):
    path = named(Path(store.path))
    made = lark(f"evaluate {line} --score length --score random --out {tmp_path} --name mine -f json", store=path)
    assert made.code == 0, made.err
    assert [row["measure"] for row in made.rows] == measures
    assert store.sql("select distinct kind from evaluations").item() == line.split()[0]
    assert (tmp_path / "mine.svg").is_file()


def test_a_folder_that_can_not_be_written_is_a_clear_error(store, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    made = lark(f"evaluate facts --score bm25 --key fact --out {tmp_path / 'file'}", store=named(Path(store.path)))
    assert made.code == 1
    assert made.err.startswith(f"error: `{tmp_path / 'file'}` is no folder\n\nhint: ")
