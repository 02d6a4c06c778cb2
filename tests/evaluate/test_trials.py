"""The trials and the times of `evaluate spearman`."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from lark_store import evaluate
from lark_store.errors import InputError
from lark_store.evaluate.baselines import preparation
from lark_store.evaluate.baselines.preparation import Preparation, Seconds
from lark_store.evaluate.scorers import Scorer

SECONDS = ("overhead_seconds", "pairwise_seconds")


class Seen:
    """A score that keeps the material of each call."""

    def __init__(self, name):
        self.materials, self.name = [], name

    def __call__(self, material):
        self.materials.append(material)
        return np.random.default_rng(len(self.materials)).normal(size=(len(material.queries), len(material.samples)))

    @property
    def scorer(self):
        return Scorer(self.name, self)

    @property
    def drawn(self):
        return [([q.id for q in m.queries], [s.id for s in m.samples]) for m in self.materials]


def test_trials_draw_anew_and_share_their_candidates(facts_store, tmp_path):
    one, other = Seen("one"), Seen("other")
    options = {"max_queries": 3, "max_samples": 7, "trials": 4, "out": tmp_path}
    outcome = evaluate.spearman(facts_store, [one.scorer, other.scorer], reference="random", **options)
    assert one.drawn == other.drawn
    assert len(one.drawn) == 4
    assert all(len(queries) == 3 and len(set(samples)) == 7 for queries, samples in one.drawn)
    for place in (0, 1):
        drawn = [set(trial[place]) for trial in one.drawn]
        assert any(left != right for left, right in pairwise(drawn))
        assert len(set.union(*drawn)) > len(drawn[0])
    of_one = outcome.values.filter(method="one", measure="spearman")
    by_trial = {trial: set(rows["query_id"]) for (trial,), rows in of_one.group_by("trial")}
    assert by_trial == {trial: set(queries) for trial, (queries, _) in enumerate(one.drawn)}


def test_the_spread_is_that_of_the_trials_means(facts_store, tmp_path):
    options = {"max_samples": 6, "trials": 3, "out": tmp_path}
    outcome = evaluate.spearman(facts_store, ["length", Seen("own").scorer], reference="random", **options)
    values = outcome.values.filter(method="own", measure="spearman")
    means = [values.filter(trial=trial)["value"].mean() for trial in range(3)]
    row = outcome.table.row(by_predicate=(pl.col("method") == "own") & (pl.col("measure") == "spearman"), named=True)
    assert row["trial_sd"] == pytest.approx(np.std(means, ddof=1))
    assert row["trial_sd"] > 0
    times = outcome.table.filter(pl.col("measure").is_in(SECONDS))
    assert times["n_queries"].to_list() == [3] * 6


def test_the_seconds_of_each_score_are_stored(facts_store, tmp_path):
    scores = ["small:dot@base", "bm25", "length"]
    outcome = evaluate.spearman(facts_store, scores, reference="gdp@base", max_queries=2, out=tmp_path)
    stored = facts_store.sql("select method, measure, query_id, trial, value from evaluations order by all")
    assert stored.equals(outcome.values.sort(pl.all()))
    for measure in SECONDS:
        rows = outcome.table.filter(measure=measure)
        assert rows["method"].to_list() == [*scores, "gdp@base"]
        assert rows["value"].is_finite().all()
        assert rows["value"].min() >= 0
    seconds = dict(outcome.values.filter(measure="overhead_seconds").select("method", "value").iter_rows())
    sketching = facts_store.sql("select sum(seconds) from ingest_runs where checkpoint = 'base'").item()
    assert seconds["small:dot@base"] == pytest.approx(sketching)
    assert seconds["length"] == 0
    assert min(seconds["bm25"], seconds["gdp@base"]) > 0
    pairwise_seconds = dict(outcome.values.filter(measure="pairwise_seconds").select("method", "value").iter_rows())
    assert min(pairwise_seconds.values()) > 0


def test_trials_share_the_fit_and_stored_scores_keep_their_seconds(facts_store, tmp_path):
    def run():
        options = {"max_queries": 2, "max_samples": 4, "trials": 2, "out": tmp_path}
        return evaluate.spearman(facts_store, ["ekfac-full:1,samples=2@base"], reference="length", **options)

    first = run()
    assert sum("EK-FAC of 2 samples" in note for note in first.notes) == 1
    overhead, again = (
        of.values.filter(measure="overhead_seconds", method="ekfac-full:1,samples=2@base") for of in (first, run())
    )
    assert overhead["trial"].to_list() == [0, 1]
    assert overhead["value"][0] == overhead["value"][1] > 0
    assert again.equals(overhead)


def test_seconds_are_split_into_preparing_and_scoring_for_one_query(monkeypatch):
    now = 0.0

    def passes(seconds):
        nonlocal now
        now += seconds
        return "made"

    monkeypatch.setattr(preparation.time, "perf_counter", lambda: now)
    prepared = Preparation()
    for trial in range(2):
        prepared.begin()
        assert prepared.once("factors", lambda: passes(5)) == "made"
        with prepared.preparing():
            passes(1 + trial)
        for _ in range(2):  # blocks of queries, each with a pass over the candidates
            with prepared.candidates(2):
                passes(8)
        passes(6)
        assert prepared.seconds(3) == Seconds(overhead=6 + trial, pairwise=8 + 6 / 3)
    assert now == 5 + (1 + 16 + 6) + (2 + 16 + 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0, "max_queries": 2}, "the number of trials must be at least 1, not 0"),
        ({"trials": 2}, "all trials would be alike\n\nhint: give `max_queries`"),
        ({"trials": 2, "max_samples": 2}, "2 samples have no rank correlation"),
    ],
)
def test_invalid_trials_are_a_clear_error(facts_store, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        evaluate.spearman(facts_store, ["length"], reference="random", out=tmp_path, **options)
