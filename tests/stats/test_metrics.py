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

from lark_store.stats import metrics
from lark_store.stats.bootstrap import RESAMPLES, Figure, evaluate, exact, intervals, permutation_p

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


def ratio_of_means(left, right):
    """Return the ratio of two means; NaN unless both are above 0."""
    return sum(left) / sum(right) if min(sum(left), sum(right)) > 1e-12 else math.nan


def pair_figures(key, scores, left, right, p):
    """The figures of two groups at one checkpoint: `left` and `right` on their shared queries."""
    _, s, v, s2, v2, _ = key
    d = [a - b for a, b in zip(left, right, strict=True)]
    sources = [*dict.fromkeys(name for _, _, name, _ in scores)]
    out = {}
    if (STAGES[s], STAGES[s2]) == ("finetune", "pretrain"):
        out["ft_pt_ratio", *key] = (ratio_of_means(left, right), len(d), p)
        out["ft_wins", *key] = (mean([x > 0 for x in d]), len(d), p)
        out["pt_dominance", *key] = (mean([x < 0 for x in d]), len(d), p)
    if s == s2 and (v, v2) == ("chatml", "raw"):
        out["format_effect", *key] = (ratio_of_means(left, right), len(d), p)
    if v == v2 and sources.index(s) < sources.index(s2):
        out["difference", *key] = (mean(d), len(d), p)
    return out


def brute_force(scores, *, tests=True):
    """Compute every figure by loops: (metric, group, opponent: source, variant, checkpoint) to (value, n, p)."""
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
    figures = metrics.all_metrics(frame(scores))
    actual = {tuple(row[name] for name in KEY): row for row in figures.iter_rows(named=True)}
    expected = brute_force(scores, tests=n < 14)
    assert len(actual) == len(figures)
    assert actual.keys() == expected.keys()
    for name, (value, n_queries, p) in expected.items():
        assert actual[name]["n_queries"] == n_queries
        if math.isnan(value):
            assert actual[name]["value"] is None
        else:
            assert actual[name]["value"] == pytest.approx(value, rel=1e-9, abs=1e-12)
        if n < 14:
            assert actual[name]["p_value"] == (None if p is None else pytest.approx(p, rel=1e-12))


def test_sampled_test_is_close_to_the_exact_one():
    scores = random_scores(5, n=17)
    figures = metrics.difference(frame(scores)).filter(pl.col("n_queries").is_between(14, 16))
    assert len(figures) >= 3
    for row in figures.head(3).iter_rows(named=True):
        mine, theirs = (
            {q: scores.get((row["checkpoint"], q, row[which], row["variant"])) for q in (f"q{i}" for i in range(17))}
            for which in ("source", "against_source")
        )
        shared = [q for q in mine if mine[q] is not None and theirs[q] is not None]
        exact = exact_p([mine[q] for q in shared], [theirs[q] for q in shared])
        assert row["p_value"] == pytest.approx(exact, abs=4 * math.sqrt(exact / RESAMPLES) + 2 / RESAMPLES)


@pytest.mark.parametrize("n", [8, 200])
def test_p_values_are_uniform_without_a_difference(n):
    rng = np.random.default_rng(0)
    p = np.concatenate(
        [permutation_p(rng.normal(size=(n, 1000)), 999), permutation_p(rng.standard_t(2, (n, 1000)), 999)]
    )
    assert ((p > 0) & (p <= 1)).all()
    for level in (0.05, 0.2):
        grid = 256 if n == 8 else 1000  # p is twice a whole number over this
        nominal = 2 * math.floor(level * grid / 2 + 1e-9) / grid
        assert abs((p <= level).mean() - nominal) <= 3 * math.sqrt(nominal * (1 - nominal) / len(p))


def test_difference_is_detected():
    rng = np.random.default_rng(0)
    assert (permutation_p(rng.normal(1.0, 1.0, (100, 20))) <= 2 / (RESAMPLES + 1)).all()
    assert permutation_p(np.ones((4, 1))) == [0.125]  # the smallest p of 4 queries
    assert permutation_p(np.zeros((5, 1))) == [1.0]
    assert permutation_p(np.full((1, 1), 3.0)) == [1.0]


@pytest.mark.parametrize("n", [2, 7, 40])
def test_p_values_equal_scipys(n):
    differences = np.random.default_rng(n).normal(0.2, 1.0, (n, 3))
    expected = [
        stats.permutation_test(
            (differences[:, f],),
            lambda x, axis: x.mean(axis),
            permutation_type="samples",
            n_resamples=999,
            rng=np.random.default_rng(0),
        ).pvalue
        for f in range(3)
    ]
    assert permutation_p(differences, resamples=999).tolist() == pytest.approx(expected)


def test_interval_of_a_share_of_0_or_1_equals_scipys():
    for n in (1, 7, 40):
        for hits in (0, n):
            interval = stats.binomtest(hits, n).proportion_ci(0.95, method="exact")
            assert exact(hits / n, n) == pytest.approx((interval.low, interval.high))


def test_comparisons_are_differences_and_changes_with_q_values():
    phi = frame(random_scores(3, n=12))
    figures = metrics.comparisons(phi)
    every = metrics.all_metrics(phi).filter(pl.col("metric").is_in(["difference", "change"])).drop(metrics.PER_QUERY)
    assert figures.drop("q_value").equals(every)
    assert figures["metric"].unique(maintain_order=True).to_list() == ["difference", "change"]
    ranks = figures["p_value"].rank("max")
    raw = figures["p_value"] * len(figures) / ranks
    least = [min(raw.filter(figures["p_value"] >= p)) for p in figures["p_value"]]
    assert figures["q_value"].to_list() == pytest.approx(least)
    assert metrics.comparisons(frame({})).schema == {
        **{name: kind for name, kind in metrics.COLUMNS.items() if name not in {"n_queries", *metrics.PER_QUERY}},
        "q_value": pl.Float64,
        "n_queries": pl.Int64,
    }


def test_change_is_against_the_last_scored_checkpoint():
    scores = {(c, f"q{q}", "ft", "raw"): value for c, value in (("a", 0.1), ("b", 0.4), ("c", 0.2)) for q in range(3)}
    scores |= {(c, f"q{q}", "med", "raw"): value for c, value in (("a", 0.1), ("c", 0.5)) for q in range(3)}
    figures = metrics.change(frame(scores)).select("source", "checkpoint", "against_checkpoint", "value")
    rows = {row[:3]: pytest.approx(row[3]) for row in figures.iter_rows()}
    assert rows == {("ft", "b", "a"): 0.3, ("ft", "c", "b"): -0.2, ("med", "c", "a"): 0.4}


@pytest.mark.parametrize("seed", range(3))
def test_intervals_contain_their_value_and_are_ordered(seed):
    figures = metrics.all_metrics(frame(random_scores(seed, n=15))).drop_nulls(["value", "low", "high"])
    means = figures.filter(~pl.col("metric").is_in(["ft_pt_ratio", "format_effect"]))
    assert len(means) > 20
    assert (means["low"] <= means["value"] + 1e-12).all()
    assert (means["value"] <= means["high"] + 1e-12).all()


def test_intervals_are_the_same_every_time():
    phi = frame(random_scores(1, n=10))
    assert metrics.all_metrics(phi).equals(metrics.all_metrics(phi))


def test_interval_of_a_mean_has_nominal_coverage():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = intervals(rng.normal(1.0, 1.0, (40, 1)), resamples=500)
        hits += low[0] <= 1.0 <= high[0]
    assert 0.88 <= hits / 200 <= 0.99


def test_joint_resampling_equals_scipy_per_figure():
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
    figures = metrics.mean_max_influence(frame({("base", "q0", "ft", "raw"): 0.5}))
    assert figures.select("value", "low", "high", "n_queries").row(0) == (0.5, None, None, 1)


def test_no_scores_give_empty_frames_with_columns():
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


def test_paper_tables_show_equal_figures():
    figures = metrics.all_metrics(frame(random_scores(2, n=12)))
    table = metrics.dominance_table(figures)
    assert len(table) == len(figures.filter(metric="ft_pt_ratio"))
    row = table.row(0, named=True)
    assert 0 < row["p_value"] <= 1
    names = {name: row[name] for name in ("checkpoint", "source", "variant", "against_source", "against_variant")}
    for column, metric in (("ratio", "ft_pt_ratio"), ("ft_wins", "ft_wins"), ("pt_dominance", "pt_dominance")):
        assert row[column] == figures.filter(metric=metric, **names)["value"].item()
        assert row["p_value"] == figures.filter(metric=metric, **names)["p_value"].item()
    own = {"checkpoint": row["checkpoint"], "metric": "mean_max_influence"}
    assert row["ft"] == figures.filter(**own, source=row["source"], variant=row["variant"])["value"].item()
    against = figures.filter(**own, source=row["against_source"], variant=row["against_variant"])
    assert row["pt"] == against["value"].item()
    influence = metrics.influence_table(figures)
    assert set(influence["mean_max_influence"]) == set(figures.filter(metric="mean_max_influence")["value"])


@pytest.mark.parametrize(("wins", "low", "high"), [(10, 0.6915, 1), (0, 0, 0.3085), (1, 0.025, 1)])
def test_share_of_0_or_1_has_an_exact_interval(wins, low, high):
    n = 1 if wins == 1 else 10
    figure = Figure({}, np.full(n, float(wins > 0)), is_share=True)
    (row,) = evaluate([figure])
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-4)
    (other,) = evaluate([Figure({}, figure.top)])
    assert other["low"] != row["low"] or other["high"] != row["high"]


def two_sets():
    """Φ of two query sets at two checkpoints, in which no two figures are alike."""
    rng = random.Random(7)  # noqa: S311
    rows = [
        {
            "checkpoint": c,
            "queries": queries,
            "query_id": f"{queries}{q}",
            "source": s,
            "stage": STAGES[s],
            "variant": v,
        }
        | {"phi": rng.uniform(0.1, 1)}
        for c in CHECKPOINTS
        for queries, n in (("test", 7), ("other", 5))
        for s in STAGES
        for v in ("raw", "chatml")
        for q in range(n)
    ]
    return pl.DataFrame(rows)


def of_group(phi, c, queries, s, v):
    mine = phi.filter(checkpoint=c, queries=queries, source=s, variant=v).sort("query_id")
    return mine["phi"].to_list()


def test_the_influence_table_by_hand():
    phi = two_sets()
    table = metrics.influence_table(metrics.paper_metrics(phi))
    seen = []
    for row in table.iter_rows(named=True):
        key = [row[name] for name in ("checkpoint", "queries", "source", "variant")]
        mine = of_group(phi, *key)
        assert (row["mean_max_influence"], row["n_queries"]) == (pytest.approx(mean(mine)), len(mine))
        seen.append((*key, row["finetune"]))
        if STAGES[row["source"]] == "finetune":
            assert (row["finetune"], row["ft_wins"]) == (None, None)
            continue
        ft = of_group(phi, *key[:2], *row["finetune"].split())
        assert row["ft_wins"] == pytest.approx(mean([a > b for a, b in zip(ft, mine, strict=True)]))
    tuned = [f"{s} {v}" for s in ("ft", "ft2") for v in ("raw", "chatml")]
    expected = {
        (c, queries, s, v, by)
        for c in CHECKPOINTS
        for queries in ("test", "other")
        for s in STAGES
        for v in ("raw", "chatml")
        for by in ([None] if STAGES[s] == "finetune" else tuned)
    }
    assert (len(seen), set(seen)) == (len(expected), expected)


def test_the_dominance_table_by_hand():
    phi = two_sets()
    table = metrics.dominance_table(metrics.paper_metrics(phi))
    pairs = set()
    for row in table.iter_rows(named=True):
        key = (row["checkpoint"], row["queries"])
        pair = (row["source"], row["variant"], row["against_source"], row["against_variant"])
        ft, pt = of_group(phi, *key, *pair[:2]), of_group(phi, *key, *pair[2:])
        assert (row["ft"], row["pt"]) == pytest.approx((mean(ft), mean(pt)))
        assert row["ratio"] == pytest.approx(mean(ft) / mean(pt))
        assert row["r_median"] == pytest.approx(np.median(np.divide(ft, pt)))
        assert row["n_queries"] == len(ft)
        assert row["ft_wins"] == pytest.approx(mean([a > b for a, b in zip(ft, pt, strict=True)]))
        assert row["pt_dominance"] == pytest.approx(mean([a < b for a, b in zip(ft, pt, strict=True)]))
        assert row["n_ratio"] == len(ft)
        pairs.add((*key, *pair))
    assert len(pairs) == len(table) == 2 * 2 * 4 * 4


# --- ratios -------------------------------------------------------------------------------------------------------


PAPER_TABLE_2 = [
    (0.482, 0.395, "1.22"),
    (0.473, 0.431, "1.10"),
    (0.386, 0.365, "1.06"),
    (0.344, 0.327, "1.05"),
    (0.314, 0.291, "1.08"),
    (0.366, 0.341, "1.07"),
]


def two_groups(left, right, names=(("ft", "chatml"), ("med", "chatml"))):
    """Φ of two groups at one checkpoint, query by query."""
    return frame(
        {
            ("base", f"q{q:02}", *group): float(value)
            for group, values in zip(names, (left, right), strict=True)
            for q, value in enumerate(values)
        }
    )


@pytest.mark.parametrize(("ft", "pt", "printed"), PAPER_TABLE_2)
def test_ft_pt_ratio_equals_the_papers_table_2(ft, pt, printed):
    """Queries differ around the paper's means, so the mean of their ratios is another number."""
    steps = np.array([-0.25, -0.05, 0.1, 0.2])
    left, right = ft + steps, pt - steps
    (row,) = metrics.ft_pt_ratio(two_groups(left, right)).rows(named=True)
    assert f"{row['value']:.2f}" == printed
    assert f"{np.mean(left / right):.2f}" != printed


def resampled(left, right):
    """The bootstrap interval of a ratio of means, in plain numpy with the project's seed."""
    n = len(left)
    picks = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    tops, bottoms = left[picks].mean(axis=1), right[picks].mean(axis=1)
    if min(tops.min(), bottoms.min()) <= 0:
        return [None, None]
    return [pytest.approx(x) for x in np.quantile(tops / bottoms, [0.025, 0.975])]


@pytest.mark.parametrize("seed", range(3))
def test_ratios_equal_plain_numpy(seed):
    rng = np.random.default_rng(seed)
    left, right = rng.uniform(0.2, 0.9, 12), rng.uniform(0.1, 0.6, 12)
    right[:3] = [-0.05, 0.0, 0.001]  # R(q) is undefined, undefined, and large
    single = left[2:] / right[2:]
    spread = [np.median(single), np.quantile(single, 0.25), np.quantile(single, 0.75)]
    cases = [
        (metrics.ft_pt_ratio, (("ft", "raw"), ("med", "chatml"))),
        (metrics.format_effect, (("med", "chatml"), ("med", "raw"))),
    ]
    for metric, names in cases:
        (row,) = metric(two_groups(left, right, names)).rows(named=True)
        assert row["value"] == pytest.approx(left.mean() / right.mean())
        assert [row["low"], row["high"]] == resampled(left, right)
        assert [row[name] for name in ("r_median", "r_q1", "r_q3")] == pytest.approx(spread)
        assert (row["n_ratio"], row["n_queries"]) == (10, 12)
        assert row["value"] < 10 < single.mean()  # the mean of R(q) explodes


@pytest.mark.parametrize(
    ("left", "right", "value", "n_ratio"),
    [
        ([0.4, 0.6], [0.2, 0.3], 2.0, 2),
        ([0.4, 0.6], [-0.2, 0.1], None, 1),  # the mean below the line is negative,
        ([0.4, 0.6], [-0.2, 0.2], None, 1),  # or 0
        ([-0.4, 0.2], [0.2, 0.3], None, 2),  # the mean above the line is negative,
        ([-0.2, 0.2], [0.2, 0.3], None, 2),  # or 0
        ([-0.4, -0.6], [-0.2, -0.3], None, 0),  # both: two negative means are no positive ratio
        ([0.4, 0.6], [-0.2, -0.3], None, 0),
    ],
)
@pytest.mark.parametrize("names", [(("ft", "raw"), ("med", "raw")), (("med", "chatml"), ("med", "raw"))])
def test_ratio_is_undefined_unless_both_means_are_above_0(left, right, value, n_ratio, names):
    phi = two_groups(left, right, names).with_columns(noise=0.01)
    figures = metrics.all_metrics(phi)
    (row,) = figures.filter(pl.col("metric").is_in(["ft_pt_ratio", "format_effect"])).rows(named=True)
    assert row["value"] == (value if value is None else pytest.approx(value))
    assert (row["sketch_error"] is None) == (value is None)
    assert (row["n_ratio"], row["n_queries"]) == (n_ratio, 2)
    assert (row["r_median"] is None) == (n_ratio == 0)
    if value is None:
        assert (row["low"], row["high"]) == (None, None)
    assert 0 < row["p_value"] <= 1  # the test of the difference needs no ratio


def test_interval_of_a_ratio_is_undefined_if_a_resample_has_no_ratio():
    """The mean is above 0, but that of a resample with the first query alone is not."""
    for left, right in (([-0.1, 0.5, 0.6], [0.2, 0.3, 0.4]), ([0.2, 0.3, 0.4], [-0.1, 0.5, 0.6])):
        (row,) = metrics.ft_pt_ratio(two_groups(left, right)).rows(named=True)
        assert row["value"] == pytest.approx(sum(left) / sum(right))
        assert (row["low"], row["high"]) == (None, None)


def test_format_effect_names_each_variant_against_raw():
    values = {"raw": 0.1, "chatml": 0.2, "formatted": 0.7, "own": 0.05}
    scores = {("base", f"q{q}", "med", variant): x for variant, x in values.items() for q in range(3)}
    scores |= {("base", f"q{q}", "songs", "chatml"): 0.3 for q in range(3)}  # not scored as `raw`
    rows = metrics.format_effect(frame(scores)).rows(named=True)
    effects = {(row["source"], row["variant"], row["against_variant"]): row["value"] for row in rows}
    assert effects == {
        ("med", "chatml", "raw"): pytest.approx(2.0),
        ("med", "formatted", "raw"): pytest.approx(7.0),
        ("med", "own", "raw"): pytest.approx(0.5),
    }


def test_only_ratios_have_per_query_figures():
    figures = metrics.all_metrics(frame(random_scores(2, n=12)))
    with_ratio = figures.filter(pl.col("n_ratio").is_not_null())["metric"].unique()
    assert set(with_ratio) == {"ft_pt_ratio", "format_effect"}
