"""p-values and q-values: against brute force, and by simulation of their guarantees."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lark_store.stats.significance import (
    benjamini_hochberg,
    benjamini_hochberg_within,
    sign_null_p,
    sketch_noise,
    source_null_p,
    z_scores,
)

LEVELS = np.array([0.05, 0.1, 0.2])


def codes(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


def by_loops(scores, source, variant, opponents, nulls):
    """The definition, row by row."""
    results = []
    for s, own, v in zip(scores, source, variant, strict=True):
        mine = own if nulls is None else None
        null = [
            x
            for x, a, w in zip(scores, source, variant, strict=True)
            if w == v and a != mine and (nulls is None or a in nulls) and not np.isnan(x)
        ]
        extreme = sum(x <= s if opponents else x >= s for x in null)
        tested = null and not np.isnan(s) and (nulls is None or own not in nulls)
        results.append((1 + extreme) / (1 + len(null)) if tested else np.nan)
    return np.array(results)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 40),
    opponents=st.booleans(),
    nulls=st.sampled_from([None, set(), {0}, {1, 3}, {9}]),
)
def test_p_values_equal_their_definition(seed, n, opponents, nulls):
    rng = np.random.default_rng(seed)
    scores = rng.choice([-2.0, -1.0, 0.0, 1.0, 2.0, np.nan], n)
    source, variant = rng.integers(0, 4, n), rng.integers(0, 3, n)
    p_values = source_null_p(scores, source, variant, opponents=opponents, null_sources=nulls)
    np.testing.assert_allclose(p_values, by_loops(scores, source, variant, opponents, nulls), rtol=1e-14)


def test_single_row_of_a_variant_has_no_p_value():
    p_values = source_null_p([1.0, 2.0, 3.0], np.array([0, 1, 0]), np.array([0, 0, 1]))
    np.testing.assert_array_equal(p_values, [1.0, 0.5, np.nan])


LAWS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy tails": lambda rng, n: rng.standard_cauchy(n),
    "common factor": lambda rng, n: 3 * rng.normal() + rng.normal(size=n),
    "common scale": lambda rng, n: rng.standard_cauchy() * rng.normal(size=n),
}


def q_values(scores, source, variant, nulls=None):
    """Both procedures' q-values, (2, N)."""
    p = source_null_p(scores, source, variant, null_sources=nulls)
    return np.stack([benjamini_hochberg(p), benjamini_hochberg_within(p, source + 100 * variant)])


def false_alarms(law, sizes, repeats, *, variants=1, nulls=None):
    """Simulated queries without a proponent: the share that has a discovery, (2 procedures, levels)."""
    rng = np.random.default_rng(0)
    n = sum(sizes)
    source, variant = np.tile(codes(sizes), variants), np.repeat(np.arange(variants), n)
    alarms = np.zeros((2, len(LEVELS)))
    for _ in range(repeats):
        texts = law(rng, n)  # the part which a text's variants share
        scores = np.concatenate([texts + 0.3 * v * law(rng, n) + 5 * v for v in range(variants)])
        alarms += np.nanmin(q_values(scores, source, variant, nulls), axis=1)[:, None] <= LEVELS
    return alarms / repeats


def at_most(rate, level, repeats):
    return (rate <= level + 3 * np.sqrt(level * (1 - level) / repeats)).all()


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_without_proponents_false_alarms_are_at_most_nominal(law):
    rate = false_alarms(law, (10, 100, 1000), repeats=600)
    assert at_most(rate, LEVELS, 600)
    assert rate[1, 2] > 0.02  # it is a test: small sources can be discovered


@pytest.mark.parametrize("sizes", [(30, 30), (20, 4), (200, 4), (5, 5, 5), (20,) * 10], ids=str)
def test_false_alarms_are_at_most_nominal_for_any_sizes(sizes):
    assert at_most(false_alarms(LAWS["normal"], sizes, repeats=600), LEVELS, 600)


def test_two_variants_of_the_same_texts_keep_the_level():
    assert at_most(false_alarms(LAWS["normal"], (10, 100, 1000), repeats=300, variants=2), LEVELS, 300)


@pytest.mark.parametrize("variants", [1, 2])
def test_with_named_null_sources_false_alarms_are_nominal(variants):
    """Here BH is nearly exact: the rate must be near the level, not only below it."""
    rate = false_alarms(LAWS["normal"], (50, 2000), repeats=1000, variants=variants, nulls={1})
    assert at_most(rate, LEVELS, 1000)
    assert (rate > 0.6 * LEVELS).all()


def discoveries(sizes, shifted, repeats, *, nulls=None, level=0.1, law=LAWS["normal"]):
    """5% of the rows of some sources shifted by 4 sd: mean FDP and power of both procedures, (2,) each."""
    rng = np.random.default_rng(1)
    source = codes(sizes)
    real = np.zeros(len(source), dtype=bool)
    for a in shifted:
        real[np.flatnonzero(source == a)[: sizes[a] // 20]] = True
    false, power = np.zeros(2), np.zeros(2)
    for _ in range(repeats):
        p_values = q_values(law(rng, len(source)) + 4.0 * real, source, np.zeros_like(source), nulls) <= level
        false += (p_values & ~real).sum(axis=1) / np.maximum(1, p_values.sum(axis=1))
        power += (p_values & real).sum(axis=1) / real.sum()
    return false / repeats, power / repeats


@pytest.mark.parametrize("law", ["normal", "common factor"])
@pytest.mark.parametrize("level", [0.1, 0.2])
def test_proponents_of_one_source_are_found_with_few_false_ones(level, law):
    false, power = discoveries((400, 400, 400), [0], 200, level=level, law=LAWS[law])
    assert (false <= level).all()
    assert (power > 0.4).all()


def test_small_source_keeps_power_beside_a_large_one():
    false, power = discoveries((20, 100, 1000), [1], 200)
    assert (false <= 0.1).all()
    assert power[0] < 0.1  # pooled BH needs 11 discoveries at once, and there are 5
    assert power[1] > 0.5


def test_proponents_of_two_sources_need_a_null_source():
    _, hidden = discoveries((400, 400, 4000), [0, 2], 50)
    assert (hidden < 0.05).all()
    false, power = discoveries((400, 400, 4000), [0, 1], 100, nulls={2})
    assert (false <= 0.1).all()
    assert (power > 0.7).all()


def test_copies_inside_a_source_are_false_discoveries():
    """The limit that the docstring names: 20 copies of each text, no proponent, and there always is a discovery."""
    rng = np.random.default_rng(0)
    source = codes((100,) * 10)
    scores = np.repeat(rng.normal(size=50), 20)
    assert (np.nanmin(q_values(scores, source, np.zeros_like(source)), axis=1) <= 0.1).all()


def test_source_null_p_values_are_uniform_on_their_grid():
    rng = np.random.default_rng(0)
    source = codes((5, 19))
    first = [source_null_p(rng.normal(size=24), source, np.zeros_like(source))[0] for _ in range(4000)]
    counts = np.bincount(np.rint(np.array(first) * 20).astype(int), minlength=21)[1:]
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [1, 1, 1], [3, 1, 1, 1], [1] * 9, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
def test_the_sign_bound_is_never_below_the_true_tail(weights):
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=len(weights))))
    sums = np.sort(signs @ np.array(weights, dtype=float))
    values = np.unique(sums)
    tail = (len(sums) - np.searchsorted(sums, values, side="left")) / len(sums)
    bound = sign_null_p(values, np.full(len(values), np.linalg.norm(weights)))
    assert (bound >= tail - 1e-12).all()
    assert (bound <= 1).all()


def test_sign_bound_is_tight_at_sqrt_2_and_near_the_normal_tail():
    assert sign_null_p([2.0], [np.sqrt(2)]) == pytest.approx(0.25, rel=1e-9)  # ε1 + ε2 = 2, in a quarter of cases
    x = np.linspace(1.5, 30, 50)
    assert (sign_null_p(x, np.ones(50)) <= 3.1787 * stats.norm.sf(x)).all()
    assert (sign_null_p(x, np.ones(50)) <= np.exp(-(x**2) / 2)).all()


def test_the_sign_bound_at_the_edges():
    p_values = sign_null_p([0.0, -1.0, 1e-9, 0.0, 1.0, np.nan, 100.0], [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    np.testing.assert_array_equal(p_values[:6], [1.0, 1.0, 0.5, 1.0, 1.0, np.nan])
    assert 0 < p_values[6] < 1e-300
    assert (np.diff(sign_null_p(np.linspace(-1, 45, 1000), np.ones(1000))) <= 0).all()


def test_untested_rows_do_not_count_in_q_values():
    p = np.array([0.01, np.nan, 0.02, 0.5, np.nan])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.03, np.nan, 0.03, 0.5, np.nan])
    assert np.isnan(benjamini_hochberg([np.nan, np.nan])).all()
    assert benjamini_hochberg([]).shape == (0,)
    within = benjamini_hochberg_within(p, np.array([7, 7, 7, 2, 5]))  # group 5 has no tested row
    np.testing.assert_allclose(within, [0.04, np.nan, 0.04, 1.0, np.nan])


def test_q_values_equal_scipy():
    p = np.random.default_rng(0).uniform(size=1000).round(2) ** 3
    np.testing.assert_array_equal(benjamini_hochberg(p), stats.false_discovery_control(p, method="bh"))


def test_sketch_noise_matches_random_vectors():
    np.testing.assert_allclose(sketch_noise([[0.0, 1.0, 0.5]], 65_536), [[1 / 256, 0.0, 0.75 / 256]])
    rng = np.random.default_rng(0)
    u, w = rng.normal(size=(2, 2000))
    v = 0.6 * u + 0.8 * w
    rho = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    results = []
    for _ in range(400):
        bins, signs = rng.integers(0, 100, 2000), rng.choice([-1.0, 1.0], 2000)
        x, y = (np.bincount(bins, signs * z, minlength=100) for z in (u, v))
        results.append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert np.std(results) == pytest.approx(sketch_noise(rho, 100), rel=0.12)


def test_sketches_of_one_direction_have_no_noise():
    assert sketch_noise([1.0, -1.001, 0.5, 0.0], 4).tolist() == [0.0, 0.0, 0.375, 0.5]


def test_z_scores_of_constant_rows_are_zero():
    scores = np.array([[1.0, 2.0, 3.0], [0.1, 0.1, 0.1], [1e30, 1e30, 1e30]])
    result = z_scores(scores)
    np.testing.assert_allclose(result, [np.array([-1, 0, 1]) * np.sqrt(1.5), [0, 0, 0], [0, 0, 0]], rtol=1e-12)
    assert z_scores(np.empty((2, 0))).shape == (2, 0)
