"""Survival analysis: Kaplan–Meier, log-rank, Cox proportional hazards and its discrete-time counterpart.

It computes with statsmodels, the extra `survival`, which is imported on first use.

Shape letters: N subjects, C covariates, E events.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

_Z = 1.959963984540054  # of a 95% interval
_LARGEST_SE = 1e3  # of a log hazard ratio: larger ones are not identified


@dataclass(frozen=True)
class Curve:
    """A Kaplan–Meier curve at its times: from 0, at each event, to the last time.

    `survival` is the share without the event; `low` and `high` its 95% interval (log-log); `n_risk` and `n_events`
    count subjects. NaN: an interval of a share of 0 or 1.
    """

    time: Floats
    n_risk: NDArray[np.int64]
    n_events: NDArray[np.int64]
    survival: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Effects:
    """The effects of C covariates on a hazard: log hazard ratios, standard errors and p-values (Wald), each (C,).

    `zph_p_value` tests proportional hazards by Schoenfeld residuals, (C,); a small one speaks against them. NaN: not
    identified, such as a covariate that separates subjects with and without events.
    """

    log_hr: Floats
    se: Floats
    p_value: Floats
    zph_p_value: Floats

    def interval(self) -> tuple[Floats, Floats]:
        """Return the ends of the hazard ratios' 95% intervals, (C,) each."""
        return np.exp(self.log_hr - _Z * self.se), np.exp(self.log_hr + _Z * self.se)


def check_installed() -> None:
    """Check that statsmodels is installed.

    Raises
    ------
    InputError
    """
    try:
        import statsmodels  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            "survival analysis needs statsmodels", "install it with `pip install 'lark-store[survival]'`"
        ) from error


def kaplan_meier(time_N: Floats, event_N: Bools) -> Curve:
    """Return the Kaplan–Meier curve of subjects observed until `time_N`, where the event happened if `event_N`."""
    from statsmodels.duration.survfunc import SurvfuncRight

    n = len(time_N)
    last = float(time_N.max(initial=0.0))
    start = (np.zeros(1), np.array([n]), np.zeros(1, np.int64), np.ones(1), np.zeros(1))
    columns = start
    if event_N.any():
        fit = SurvfuncRight(time_N, event_N.astype(np.int64))
        found = (fit.surv_times, fit.n_risk, fit.n_events, fit.surv_prob, fit.surv_prob_se)
        columns = tuple(np.concatenate([a, b]) for a, b in zip(start, found, strict=True))  # type: ignore[assignment]
    if columns[0][-1] < last:
        at_last = (last, int((time_N >= last).sum()), 0, columns[3][-1], columns[4][-1])
        columns = tuple(np.append(c, value) for c, value in zip(columns, at_last, strict=True))  # type: ignore[assignment]
    times, n_risk, n_events, survival, se = columns
    with np.errstate(all="ignore"):
        width = _Z * se / np.abs(survival * np.log(survival))
        low, high = survival ** np.exp(width), survival ** np.exp(-width)
    return Curve(times, n_risk.astype(np.int64), n_events.astype(np.int64), survival, low, high)


def log_rank(time_N: Floats, event_N: Bools, group_N: Sequence[Any]) -> tuple[float, float]:
    """Return the log-rank test of equal survival in groups: χ² and its p-value; NaN for one group or no event."""
    from statsmodels.duration.survfunc import survdiff

    groups = np.unique(np.asarray(group_N), return_inverse=True)[1]
    if not event_N.any() or groups.max(initial=0) == 0:
        return float("nan"), float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chi2, p = survdiff(time_N, event_N.astype(np.int64), groups)
    return float(chi2), float(p)


def cox(time_N: Floats, event_N: Bools, x_NC: Floats) -> Effects:
    """Fit Cox's proportional hazards, with Efron's ties."""
    from statsmodels.duration.hazard_regression import PHReg

    if not _is_identified(event_N, x_NC):
        return _unknown(x_NC.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its Newton steps; the standard errors tell
        try:
            fit = PHReg(time_N, x_NC, status=event_N.astype(np.int64), ties="efron").fit(disp=0)
            residuals_NC, covariance_CC = np.asarray(fit.schoenfeld_residuals), np.asarray(fit.cov_params())
        except np.linalg.LinAlgError:
            return _unknown(x_NC.shape[1])
    found = _effects(np.asarray(fit.params), np.sqrt(np.diag(covariance_CC)), np.asarray(fit.pvalues))
    is_event = np.isfinite(residuals_NC).all(axis=1)
    zph = _proportional(time_N[is_event], residuals_NC[is_event], covariance_CC)
    return Effects(found.log_hr, found.se, found.p_value, np.where(np.isfinite(found.se), zph, np.nan))


def discrete_hazard(time_N: Floats, event_N: Bools, x_NC: Floats) -> Effects:
    """Fit the discrete-time hazard with a complementary log-log link, whose effects are log hazard ratios too.

    Each subject enters at every time with an event up to its own; each of these times has its own intercept.
    """
    from statsmodels.genmod.families import Binomial
    from statsmodels.genmod.families.links import CLogLog
    from statsmodels.genmod.generalized_linear_model import GLM

    n_covariates = x_NC.shape[1]
    if not _is_identified(event_N, x_NC):
        return _unknown(n_covariates)
    times = np.unique(time_N[event_N])
    at_risk = time_N[:, None] >= times
    subject, period = np.nonzero(at_risk)
    happened = (event_N[subject] & (time_N[subject] == times[period])).astype(float)
    design = np.concatenate([np.eye(len(times))[period], x_NC[subject]], axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of separation; the standard errors tell
        try:
            fit = GLM(happened, design, family=Binomial(link=CLogLog())).fit()
        except (np.linalg.LinAlgError, ValueError):
            return _unknown(n_covariates)
    own = slice(len(times), None)
    return _effects(np.asarray(fit.params)[own], np.asarray(fit.bse)[own], np.asarray(fit.pvalues)[own])


def _is_identified(event_N: Bools, x_NC: Floats) -> bool:
    """Tell whether there are events, and covariates that differ from each other and from a constant."""
    if not event_N.any() or not x_NC.shape[1]:
        return False
    centred = x_NC - x_NC.mean(axis=0)
    return bool(np.linalg.matrix_rank(centred) == x_NC.shape[1])


def _unknown(n: int) -> Effects:
    nothing = np.full(n, np.nan)
    return Effects(nothing, nothing, nothing, nothing)


def _effects(log_hr: Floats, se: Floats, p: Floats) -> Effects:
    known = np.isfinite(log_hr) & np.isfinite(se) & (se < _LARGEST_SE) & (np.abs(log_hr) < _LARGEST_SE)
    log_hr, se, p = (np.where(known, values, np.nan) for values in (log_hr, se, p))
    return Effects(log_hr, se, p, np.full(len(log_hr), np.nan))


def _proportional(time_E: Floats, residuals_EC: Floats, covariance_CC: Floats) -> Floats:
    """Return p-values of the trend of scaled Schoenfeld residuals over the ranks of the event times, (C,).

    Grambsch and Therneau 1994, each covariate by itself.
    """
    from scipy.stats import chi2, rankdata

    n_events = len(time_E)
    rank_E = rankdata(time_E)
    centred_E = rank_E - rank_E.mean()
    spread = float(centred_E @ centred_E)
    if n_events < 3 or spread == 0:
        return np.full(residuals_EC.shape[1], np.nan)
    scaled_EC = n_events * residuals_EC @ covariance_CC
    statistic = (centred_E @ scaled_EC) ** 2 / (n_events * np.diag(covariance_CC) * spread)
    p: Floats = chi2.sf(statistic, 1)
    return p
