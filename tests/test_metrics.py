"""Every metric against a brute-force computation in plain Python, on random scores."""

from __future__ import annotations

import math
import random

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_store.query import metrics
from lark_store.query.metrics import bootstrap

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


def brute_force(scores: dict[tuple[str, str, str, str], float]) -> dict[tuple[str | None, ...], tuple[float, int]]:
    """Every figure by loops: (metric, checkpoint, source, variant, against source, against variant) to (value, n)."""
    out: dict[tuple[str | None, ...], tuple[float, int]] = {}
    groups = {(c, s, v) for c, _, s, v in scores}

    def of(c, s, v):
        return {q: phi for (c2, q, s2, v2), phi in scores.items() if (c, s, v) == (c2, s2, v2)}

    def put(key, values):
        out[key] = (sum(values) / len(values) if values else math.nan, len(values))

    for c, s, v in groups:
        put(("mean_max_influence", c, s, v, None, None), list(of(c, s, v).values()))
        for c2, s2, v2 in groups:
            mine, theirs = of(c, s, v), of(c2, s2, v2)
            shared = [q for q in mine if q in theirs]
            if c != c2 or not shared:
                continue
            key = (c, s, v, s2, v2)
            if (STAGES[s], STAGES[s2]) == ("finetune", "pretrain"):
                put(("ft_pt_ratio", *key), [mine[q] / theirs[q] for q in shared if theirs[q] > 0])
                put(("ft_wins", *key), [mine[q] > theirs[q] for q in shared])
                put(("pt_dominance", *key), [theirs[q] > mine[q] for q in shared])
            if s == s2 and (v, v2) == ("chatml", "raw"):
                bottom = sum(theirs[q] for q in shared)
                value = sum(mine[q] for q in shared) / bottom if bottom > 1e-12 else math.nan
                out["format_effect", *key] = (value, len(shared))
    return out


@pytest.mark.parametrize("seed", range(5))
def test_all_metrics_equal_brute_force(seed):
    scores = random_scores(seed, n=12)
    found = metrics.all_metrics(frame(scores))
    key = ["metric", "checkpoint", "source", "variant", "against_source", "against_variant"]
    made = {tuple(row[name] for name in key): row for row in found.iter_rows(named=True)}
    expected = brute_force(scores)
    assert made.keys() == expected.keys()
    for name, (value, n) in expected.items():
        assert made[name]["n_queries"] == n
        if math.isnan(value):
            assert made[name]["value"] is None
        else:
            assert made[name]["value"] == pytest.approx(value, rel=1e-9, abs=1e-12)


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
        low, high = bootstrap(lambda x, axis: x.mean(axis=axis), rng.normal(1.0, 1.0, 40), resamples=500)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


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
    names = {name: row[name] for name in ("checkpoint", "source", "variant", "against_source", "against_variant")}
    for column, metric in (("ratio", "ft_pt_ratio"), ("ft_wins", "ft_wins"), ("pt_dominance", "pt_dominance")):
        assert row[column] == found.filter(metric=metric, **names)["value"].item()
    own = {"checkpoint": row["checkpoint"], "metric": "mean_max_influence"}
    assert row["ft"] == found.filter(**own, source=row["source"], variant=row["variant"])["value"].item()
    against = found.filter(**own, source=row["against_source"], variant=row["against_variant"])
    assert row["pt"] == against["value"].item()
    influence = metrics.influence_table(found)
    assert set(influence["mean_max_influence"]) == set(found.filter(metric="mean_max_influence")["value"])
