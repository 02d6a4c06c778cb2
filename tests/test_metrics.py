"""Every metric against a brute-force computation in plain Python, on random scores."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lark_store.query import metrics
from lark_store.query.compare import RESAMPLES, Figure, evaluate, intervals, permutation_p

STAGES = {"ft": "finetune", "ft2": "finetune", "med": "pretrain", "songs": "pretrain"}
CHECKPOINTS = ("base", "epoch-1")


def random_scores(seed: int, n: int) -> dict[tuple[str, str, str, str], float]:
    """Scores by (checkpoint, query, source, variant); a few groups lack a query or a variant; ties happen."""
    rng = random.Random(seed)  # noqa: S311
    scores = {}
    for checkpoint in CHECKPOINTS:
        for source in STAGES:
            for variant in ("raw", "chatml"):
                if rng.random() < 0.15:
                    continue
                for q in range(n):
                    if rng.random() < 0.9:
                        scores[checkpoint, f"q{q}", source, variant] = round(rng.uniform(-0.3, 1), 1)
    return scores


def frame(scores: dict[tuple[str, str, str, str], float]) -> pl.DataFrame:
    rows = [
        {"checkpoint": c, "queries": "test", "query_id": q, "source": s, "stage": STAGES[s], "variant": v, "phi": phi}
        for (c, q, s, v), phi in scores.items()
    ]
    schema = {"phi": pl.Float64} | dict.fromkeys(
        ("checkpoint", "queries", "query_id", "source", "stage", "variant"), pl.String
    )
    return pl.DataFrame(rows, schema=schema)


def exact_p(left, right):
    """The paired permutation test by enumeration, in whole tenths so that equal sums are equal."""
    d = [round(10 * a) - round(10 * b) for a, b in zip(left, right, strict=True)]
    sums = [sum(s * x for s, x in zip(signs, d, strict=True)) for signs in itertools.product((1, -1), repeat=len(d))]
    return min(1, 2 * min(sum(s >= sum(d) for s in sums), sum(s <= sum(d) for s in sums)) / len(sums))


def mean(values):
    return sum(values) / len(values) if values else math.nan


def pair_figures(key, scores, left, right, p):
    """The figures of two groups at one checkpoint: `left` and `right` on their shared queries."""
    _, s, v, s2, v2, _ = key
    d = [a - b for a, b in zip(left, right, strict=True)]
    sources = [*dict.fromkeys(name for _, _, name, _ in scores)]
    out = {}
    if (STAGES[s], STAGES[s2]) == ("finetune", "pretrain"):
        ratios = [a / b for a, b in zip(left, right, strict=True) if b > 0]
        out["ft_pt_ratio", *key] = (mean(ratios), len(ratios), p)
        out["ft_wins", *key] = (mean([x > 0 for x in d]), len(d), p)
        out["pt_dominance", *key] = (mean([x < 0 for x in d]), len(d), p)
    if s == s2 and (v, v2) == ("chatml", "raw"):
        out["format_effect", *key] = (sum(left) / sum(right) if sum(right) > 1e-12 else math.nan, len(d), p)
    if v == v2 and sources.index(s) < sources.index(s2):
        out["difference", *key] = (mean(d), len(d), p)
    return out


def brute_force(scores, *, tests=True):
    """Every figure by loops: (metric, what, against what: source, variant, checkpoint) to (value, n, p)."""
    groups = {}
    for (c, q, s, v), phi in scores.items():
        groups.setdefault((c, s, v), {})[q] = phi
    out = {}
    for (c, s, v), mine in groups.items():
        out["mean_max_influence", c, s, v, None, None, None] = (mean([*mine.values()]), len(mine), None)
        earlier = [c2 for c2 in CHECKPOINTS[: CHECKPOINTS.index(c)] if (c2, s, v) in groups]
        for (c2, s2, v2), theirs in groups.items():
            shared = [q for q in mine if q in theirs]
            left, right = [mine[q] for q in shared], [theirs[q] for q in shared]
            p = exact_p(left, right) if tests and shared else None
            if shared and (s, v, [c2]) == (s2, v2, earlier[-1:]):
                d = [a - b for a, b in zip(left, right, strict=True)]
                out["change", c, s, v, s, v, c2] = (mean(d), len(d), p)
            if shared and c == c2:
                out |= pair_figures((c, s, v, s2, v2, None), scores, left, right, p)
    return out


KEY = ["metric", "checkpoint", "source", "variant", "against_source", "against_variant", "against_checkpoint"]


@pytest.mark.parametrize(("seed", "n"), [(0, 10), (1, 9), (2, 12), (3, 3), (4, 30)])
def test_all_metrics_equal_brute_force(seed, n):
    scores = random_scores(seed, n)
    found = metrics.all_metrics(frame(scores))
    made = {tuple(row[name] for name in KEY): row for row in found.iter_rows(named=True)}
    expected = brute_force(scores, tests=n < 14)
    assert len(made) == len(found)
    assert made.keys() == expected.keys()
    for name, (value, n_queries, p) in expected.items():
        assert made[name]["n_queries"] == n_queries
        if math.isnan(value):
            assert made[name]["value"] is None
        else:
            assert made[name]["value"] == pytest.approx(value, rel=1e-9, abs=1e-12)
        if n < 14:
            assert made[name]["p_value"] == (None if p is None else pytest.approx(p, rel=1e-12))


def test_over_more_queries_the_test_is_sampled_near_the_exact_one():
    scores = random_scores(5, n=17)
    found = metrics.difference(frame(scores)).filter(pl.col("n_queries").is_between(14, 16))
    assert len(found) >= 3
    for row in found.head(3).iter_rows(named=True):
        mine, theirs = (
            {q: scores.get((row["checkpoint"], q, row[which], row["variant"])) for q in (f"q{i}" for i in range(17))}
            for which in ("source", "against_source")
        )
        shared = [q for q in mine if mine[q] is not None and theirs[q] is not None]
        exact = exact_p([mine[q] for q in shared], [theirs[q] for q in shared])
        assert row["p_value"] == pytest.approx(exact, abs=4 * math.sqrt(exact / RESAMPLES) + 2 / RESAMPLES)


@pytest.mark.parametrize("n", [8, 200])
def test_without_a_difference_p_values_are_uniform(n):
    rng = np.random.default_rng(0)
    p = np.concatenate(
        [permutation_p(rng.normal(size=(n, 1000)), 999), permutation_p(rng.standard_t(2, (n, 1000)), 999)]
    )
    assert ((p > 0) & (p <= 1)).all()
    for level in (0.05, 0.2):
        grid = 256 if n == 8 else 1000  # p is twice a whole number over this
        nominal = 2 * math.floor(level * grid / 2 + 1e-9) / grid
        assert abs((p <= level).mean() - nominal) <= 3 * math.sqrt(nominal * (1 - nominal) / len(p))


def test_a_difference_is_seen():
    rng = np.random.default_rng(0)
    assert (permutation_p(rng.normal(1.0, 1.0, (100, 20))) <= 2 / (RESAMPLES + 1)).all()
    assert permutation_p(np.ones((4, 1))) == [0.125]  # the least that 4 queries can say
    assert permutation_p(np.zeros((5, 1))) == [1.0]
    assert permutation_p(np.full((1, 1), 3.0)) == [1.0]


def test_comparisons_are_differences_and_changes_with_q_values():
    phi = frame(random_scores(3, n=12))
    found = metrics.comparisons(phi)
    every = metrics.all_metrics(phi).filter(pl.col("metric").is_in(["difference", "change"]))
    assert found.drop("q_value").equals(every)
    assert found["metric"].unique(maintain_order=True).to_list() == ["difference", "change"]
    ranks = found["p_value"].rank("max")
    raw = found["p_value"] * len(found) / ranks
    least = [min(raw.filter(found["p_value"] >= p)) for p in found["p_value"]]
    assert found["q_value"].to_list() == pytest.approx(least)
    assert metrics.comparisons(frame({})).schema == {
        **{name: kind for name, kind in metrics.COLUMNS.items() if name != "n_queries"},
        "q_value": pl.Float64,
        "n_queries": pl.Int64,
    }


def test_a_change_is_against_the_last_checkpoint_at_which_the_source_was_scored():
    scores = {(c, f"q{q}", "ft", "raw"): value for c, value in (("a", 0.1), ("b", 0.4), ("c", 0.2)) for q in range(3)}
    scores |= {(c, f"q{q}", "med", "raw"): value for c, value in (("a", 0.1), ("c", 0.5)) for q in range(3)}
    found = metrics.change(frame(scores)).select("source", "checkpoint", "against_checkpoint", "value")
    rows = {row[:3]: pytest.approx(row[3]) for row in found.iter_rows()}
    assert rows == {("ft", "b", "a"): 0.3, ("ft", "c", "b"): -0.2, ("med", "c", "a"): 0.4}


@pytest.mark.parametrize("seed", range(3))
def test_intervals_contain_their_value_and_are_ordered(seed):
    found = metrics.all_metrics(frame(random_scores(seed, n=15))).drop_nulls(["value", "low", "high"])
    means = found.filter(pl.col("metric") != "format_effect")
    assert len(means) > 20
    assert (means["low"] <= means["value"] + 1e-12).all()
    assert (means["value"] <= means["high"] + 1e-12).all()


def test_intervals_are_the_same_every_time():
    phi = frame(random_scores(1, n=10))
    assert metrics.all_metrics(phi).equals(metrics.all_metrics(phi))


def test_the_interval_of_a_mean_covers_it_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = intervals(rng.normal(1.0, 1.0, (40, 1)), resamples=500)
        hits += low[0] <= 1.0 <= high[0]
    assert 0.88 <= hits / 200 <= 0.99


def test_figures_resampled_together_are_what_scipy_makes_of_each_alone():
    rng = np.random.default_rng(0)
    top, bottom = rng.normal(1.0, 0.3, (2, 30, 3))
    for below in (None, bottom):
        low, high = intervals(top, below, resamples=999)
        for f in range(3):
            data = (top[:, f],) if below is None else (top[:, f], below[:, f])
            alone = stats.bootstrap(
                data,
                (lambda x, axis: x.mean(axis)) if below is None else lambda x, y, axis: x.mean(axis) / y.mean(axis),
                n_resamples=999,
                paired=below is not None,
                method="percentile",
                rng=np.random.default_rng(0),
            ).confidence_interval
            assert (low[f], high[f]) == pytest.approx((alone.low, alone.high), rel=1e-12)


def test_one_query_has_no_interval():
    found = metrics.mean_max_influence(frame({("base", "q0", "ft", "raw"): 0.5}))
    assert found.select("value", "low", "high", "n_queries").row(0) == (0.5, None, None, 1)


def test_no_scores_give_no_rows_of_the_same_columns():
    assert metrics.all_metrics(frame({})).schema == metrics.COLUMNS


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_wins_and_dominance_leave_only_ties(seed):
    phi = frame(random_scores(seed, n=5))
    both = metrics.ft_wins(phi).join(
        metrics.pt_dominance(phi),
        on=["checkpoint", "source", "variant", "against_source", "against_variant"],
    )
    assert (both["value"] + both["value_right"] <= 1 + 1e-12).all()


def test_the_papers_tables_show_the_same_figures():
    found = metrics.all_metrics(frame(random_scores(2, n=12)))
    table = metrics.dominance_table(found)
    assert len(table) == len(found.filter(metric="ft_pt_ratio"))
    row = table.row(0, named=True)
    assert 0 < row["p_value"] <= 1
    names = {name: row[name] for name in ("checkpoint", "source", "variant", "against_source", "against_variant")}
    for column, metric in (("ratio", "ft_pt_ratio"), ("ft_wins", "ft_wins"), ("pt_dominance", "pt_dominance")):
        assert row[column] == found.filter(metric=metric, **names)["value"].item()
        assert row["p_value"] == found.filter(metric=metric, **names)["p_value"].item()
    own = {"checkpoint": row["checkpoint"], "metric": "mean_max_influence"}
    assert row["ft"] == found.filter(**own, source=row["source"], variant=row["variant"])["value"].item()
    against = found.filter(**own, source=row["against_source"], variant=row["against_variant"])
    assert row["pt"] == against["value"].item()
    influence = metrics.influence_table(found)
    assert set(influence["mean_max_influence"]) == set(found.filter(metric="mean_max_influence")["value"])


@pytest.mark.parametrize(("wins", "low", "high"), [(10, 0.6915, 1), (0, 0, 0.3085), (1, 0.025, 1)])
def test_a_share_of_all_or_none_has_an_exact_interval(wins, low, high):
    n = 1 if wins == 1 else 10
    figure = Figure({}, np.full(n, float(wins > 0)), is_share=True)
    (row,) = evaluate([figure])
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-4)
    (other,) = evaluate([Figure({}, figure.top)])
    assert other["low"] != row["low"] or other["high"] != row["high"]
