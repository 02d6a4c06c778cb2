"""Survival statistics against formulas by hand, and their coverage and size on simulated data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import kstest

from lark_store.stats.survival import cox, discrete_hazard, kaplan_meier, log_rank


def simulate(rng, n, log_hr, *, epochs=20, rate=0.08):
    """Simulate times in whole epochs, with ties and censoring, for a binary covariate of half of the subjects."""
    x_NC = (np.arange(n) % 2).astype(float)[:, None]
    exact = rng.exponential(1 / (rate * np.exp(log_hr * x_NC[:, 0])))
    time = np.ceil(exact)
    return np.minimum(time, epochs), time <= epochs, x_NC


def efron_loss(beta, time, event, x):
    """−log of Efron's partial likelihood, term by term."""
    total, eta = 0.0, x @ beta
    for t in np.unique(time[event]):
        tied, at_risk = event & (time == t), time >= t
        d = tied.sum()
        total += eta[tied].sum()
        for j in range(d):
            total -= np.log(np.exp(eta[at_risk]).sum() - j / d * np.exp(eta[tied]).sum())
    return -total


def curvature(loss, beta, step=1e-3):
    """The Hessian by central differences."""
    moves = step * np.eye(len(beta))
    return np.array(
        [
            [sum(s * t * loss(beta + s * a + t * b) for s in (1, -1) for t in (1, -1)) / (4 * step**2) for b in moves]
            for a in moves
        ]
    )


@pytest.mark.parametrize("seed", range(4))
def test_cox_maximises_efrons_partial_likelihood(seed):
    rng = np.random.default_rng(seed)
    time, event, binary = simulate(rng, 80, 0.8, epochs=8, rate=0.1)
    x = np.concatenate([binary, rng.normal(size=(80, 2))], axis=1)
    censored = rng.random(80) < 0.2
    event, time = event & ~censored, np.where(censored, np.ceil(time / 2), time)
    best = minimize(efron_loss, np.zeros(3), (time, event, x), method="BFGS", options={"gtol": 1e-9})
    result = cox(time, event, x)
    np.testing.assert_allclose(result.log_hr, best.x, atol=1e-5)
    information = curvature(lambda beta: efron_loss(beta, time, event, x), result.log_hr)
    np.testing.assert_allclose(result.se, np.sqrt(np.diag(np.linalg.inv(information))), rtol=1e-4)


def test_kaplan_meier_is_the_product_of_shares():
    time = np.array([1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5, 5], float)
    event = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0], bool)
    curve = kaplan_meier(time, event)
    assert curve.time.tolist() == [0, 1, 2, 4, 5]
    assert curve.n_risk.tolist() == [12, 12, 10, 6, 4]
    assert curve.n_events.tolist() == [0, 1, 2, 1, 1]
    by_hand = np.cumprod([1, 11 / 12, 8 / 10, 5 / 6, 3 / 4])
    np.testing.assert_allclose(curve.survival, by_hand, rtol=0, atol=1e-12)
    variance = by_hand**2 * np.cumsum([0, 1 / (12 * 11), 2 / (10 * 8), 1 / (6 * 5), 1 / (4 * 3)])
    width = 1.959963984540054 * np.sqrt(variance[1:]) / (by_hand[1:] * np.abs(np.log(by_hand[1:])))
    np.testing.assert_allclose(curve.low[1:], by_hand[1:] ** np.exp(width), atol=1e-12)
    np.testing.assert_allclose(curve.high[1:], by_hand[1:] ** np.exp(-width), atol=1e-12)


def test_curve_without_events_is_flat_to_the_last_time():
    curve = kaplan_meier(np.array([3.0, 5.0]), np.zeros(2, bool))
    assert (curve.time.tolist(), curve.survival.tolist(), curve.n_risk.tolist()) == ([0, 5], [1, 1], [2, 1])


def test_log_rank_by_hand():
    """Observed less expected events of group 1, and its hypergeometric variance."""
    rng = np.random.default_rng(1)
    time, event, x = simulate(rng, 60, 1.0, epochs=6, rate=0.15)
    group = x[:, 0].astype(int)
    excess = variance = 0.0
    for t in np.unique(time[event]):
        at_risk, tied = time >= t, event & (time == t)
        n, n1, d = at_risk.sum(), (at_risk & (group == 1)).sum(), tied.sum()
        excess += (tied & (group == 1)).sum() - d * n1 / n
        variance += d * (n1 / n) * (1 - n1 / n) * (n - d) / max(n - 1, 1)
    chi2, p = log_rank(time, event, group)
    assert chi2 == pytest.approx(excess**2 / variance, rel=1e-9)
    assert 0 < p < 1


def test_intervals_cover_a_hazard_ratio_of_the_paper():
    """HR 2.6 is in at least 90 of 100 intervals of 95%, by Cox and in discrete time."""
    inside = np.zeros(2, int)
    for seed in range(100):
        data = simulate(np.random.default_rng(seed), 120, np.log(2.6))
        for number, fit in enumerate((cox, discrete_hazard)):
            low, high = fit(*data).interval()
            inside[number] += bool(low[0] <= 2.6 <= high[0])
    assert inside.min() >= 90, inside


def test_p_values_without_an_effect_are_uniform():
    p = []
    for seed in range(60):
        result = cox(*simulate(np.random.default_rng(1000 + seed), 100, 0.0))
        p.append((result.p_value[0], result.zph_p_value[0]))
    for values in zip(*p, strict=True):
        assert kstest(values, "uniform").pvalue > 0.01


def test_crossing_hazards_are_not_proportional():
    rng = np.random.default_rng(0)
    x = (np.arange(400) % 2).astype(float)[:, None]
    early, late = np.ceil(rng.exponential(4, 400)), 6 + np.ceil(rng.exponential(2, 400))
    time = np.where(x[:, 0] == 1, np.where(rng.random(400) < 0.7, early, 30), late)
    assert cox(np.minimum(time, 20), time <= 20, x).zph_p_value[0] < 1e-4


@pytest.mark.parametrize("fit", [cox, discrete_hazard])
def test_unidentified_effects_are_unknown(fit):
    time, event = np.array([1.0, 2, 3, 4, 5, 6]), np.array([1, 1, 1, 0, 0, 0], bool)
    constant, twice = np.ones((6, 1)), np.arange(12.0).reshape(6, 2)
    for x in (constant, twice, np.zeros((6, 0))):
        assert np.isnan(fit(time, event, x).log_hr).all()
    assert np.isnan(fit(time, np.zeros(6, bool), np.arange(6.0)[:, None]).log_hr).all()
    assert log_rank(time, event, [0] * 6) == pytest.approx((np.nan, np.nan), nan_ok=True)
