"""The paper's metrics as pure polars functions over source influences, with bootstrap intervals.

All take a frame `phi` with one row per checkpoint × query × source × variant and the columns

    checkpoint, queries, query_id, source, stage, variant, phi

where phi = Φ(D, q) = max over samples z of D of φ(z, q), the influence of a source on a query (signed; for cosine in
[−1, 1]). All return frames with the columns of `COLUMNS`, one row per figure: `source` and `variant` say what is
measured, `against_source` and `against_variant` what it is compared with. Intervals are percentile bootstrap intervals
over queries (95%, 9,999 resamples, fixed seed): they speak of other queries like these, not of other models.

Definitions follow the LARK paper (the reference experiment's Tables I and II).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from collections.abc import Callable

    Statistic = Callable[..., Any]
    Pairs = list[tuple[dict[str, Any], pl.DataFrame]]

COLUMNS = {
    "metric": pl.String,
    "checkpoint": pl.String,
    "queries": pl.String,
    "source": pl.String,
    "variant": pl.String,
    "against_source": pl.String,
    "against_variant": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "n_queries": pl.Int64,
}
CONFIDENCE = 0.95
RESAMPLES = 9_999
_GROUP = ["checkpoint", "queries", "source", "variant"]


def bootstrap(statistic: Statistic, *data: np.ndarray[Any, Any], resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of a statistic over queries, paired if several arrays are given.

    `statistic` takes the arrays, each (…, Q), and `axis`. Two NaN where there are fewer than two queries.
    """
    from scipy import stats

    if len(data[0]) < 2:
        return (float("nan"), float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # undefined resamples: the interval is NaN
        result = stats.bootstrap(
            data,
            statistic,
            n_resamples=resamples,
            paired=len(data) > 1,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            batch=max(1, 10_000_000 // len(data[0])),
            rng=np.random.default_rng(0),
        )
    return (float(result.confidence_interval.low), float(result.confidence_interval.high))


def _mean(x: np.ndarray[Any, Any], axis: int = -1) -> Any:
    return np.mean(x, axis=axis)


def _ratio_of_means(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], axis: int = -1) -> Any:
    bottom = np.mean(y, axis=axis)
    return np.mean(x, axis=axis) / np.where(bottom > 0, bottom, np.nan)


def _row(metric: str, names: dict[str, Any], statistic: Statistic, *data: np.ndarray[Any, Any]) -> dict[str, Any]:
    if len(data[0]) == 0:
        value = low = high = float("nan")
    else:
        value, (low, high) = float(statistic(*data, axis=-1)), bootstrap(statistic, *data)
    return {"metric": metric, **names, "value": value, "low": low, "high": high, "n_queries": len(data[0])}


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=COLUMNS).with_columns(pl.col("value", "low", "high").fill_nan(None))


def mean_max_influence(phi: pl.DataFrame) -> pl.DataFrame:
    """Return the mean over queries of Φ(D, q), per checkpoint, source and variant (Table I)."""
    rows = []
    for key, group in phi.group_by(_GROUP, maintain_order=True):
        names = dict(zip(_GROUP, key, strict=True))
        rows.append(_row("mean_max_influence", names, _mean, group["phi"].to_numpy()))
    return _frame(rows)


def _pairs(phi: pl.DataFrame, left: pl.Expr, right: pl.Expr, on: list[str]) -> Pairs:
    """Pair groups query by query: `phi` of the left rows beside `phi_right` of the right ones."""
    keep = ["checkpoint", "queries", "query_id", "source", "variant", "phi"]
    both = phi.filter(left).select(keep).join(phi.filter(right).select(keep), on=on, maintain_order="left_right")
    if "source" in on:
        both = both.with_columns(source_right=pl.col("source"))
    keys = [*_GROUP, "source_right", "variant_right"]
    names = [*_GROUP, "against_source", "against_variant"]
    return [(dict(zip(names, key, strict=True)), group) for key, group in both.group_by(keys, maintain_order=True)]


def _finetune_against_pretrain(
    metric: str, phi: pl.DataFrame, figures: Callable[[pl.DataFrame], pl.Series]
) -> pl.DataFrame:
    """Average `figures` of each pair of a fine-tuning (`phi`) and a pretraining group (`phi_right`) over queries."""
    stage = pl.col("stage")
    pairs = _pairs(phi, stage == "finetune", stage == "pretrain", ["checkpoint", "queries", "query_id"])
    return _frame([_row(metric, names, _mean, figures(pair).cast(pl.Float64).to_numpy()) for names, pair in pairs])


def ft_pt_ratio(phi: pl.DataFrame) -> pl.DataFrame:
    """Return the mean over queries of R(q) = Φ(ft, q) / Φ(pt, q), per pair of FT and PT groups (Table II).

    Above 1, fine-tuning dominates. R is undefined where Φ(pt, q) ≤ 0; such queries are left out, so that `n_queries`
    says how many went in.
    """

    def ratios(pair: pl.DataFrame) -> pl.Series:
        usable = pair.filter(pl.col("phi_right") > 0)
        return usable["phi"] / usable["phi_right"]

    return _finetune_against_pretrain("ft_pt_ratio", phi, ratios)


def ft_wins(phi: pl.DataFrame) -> pl.DataFrame:
    """Return the share of queries, in [0, 1], with Φ(ft, q) > Φ(pt, q) (Tables I and IV)."""
    return _finetune_against_pretrain("ft_wins", phi, lambda pair: pair["phi"] > pair["phi_right"])


def pt_dominance(phi: pl.DataFrame) -> pl.DataFrame:
    """Return PT-Dom, the share of queries, in [0, 1], with Φ(pt, q) > Φ(ft, q) (Table II). A tie is nobody's."""
    return _finetune_against_pretrain("pt_dominance", phi, lambda pair: pair["phi_right"] > pair["phi"])


def format_effect(phi: pl.DataFrame, formatted: str = "chatml", plain: str = "raw") -> pl.DataFrame:
    """Return mean max influence formatted over mean max influence plain, per source that has both variants.

    Above 1, the template alone raises influence. Undefined where the plain mean is not above 0; its interval is
    undefined where that happens to a resample.
    """
    variant = pl.col("variant")
    rows = []
    on = ["checkpoint", "queries", "query_id", "source"]
    for names, pair in _pairs(phi, variant == formatted, variant == plain, on):
        data = pair["phi"].to_numpy(), pair["phi_right"].to_numpy()
        rows.append(_row("format_effect", names, _ratio_of_means, *data))
    return _frame(rows)


def all_metrics(phi: pl.DataFrame) -> pl.DataFrame:
    """Return every metric of this module in one frame."""
    return pl.concat([f(phi) for f in (mean_max_influence, ft_pt_ratio, ft_wins, pt_dominance, format_effect)])


def influence_table(metrics: pl.DataFrame) -> pl.DataFrame:
    """Arrange metrics as the paper's Table I: a row per checkpoint, source and variant, with FT wins against it."""
    key = ["checkpoint", "queries", "source", "variant"]
    mean = metrics.filter(pl.col("metric") == "mean_max_influence").select(
        *key, mean_max_influence="value", low="low", high="high", n_queries="n_queries"
    )
    wins = metrics.filter(pl.col("metric") == "ft_wins").select(
        "checkpoint",
        "queries",
        source="against_source",
        variant="against_variant",
        finetune=pl.concat_str("source", "variant", separator=" "),
        ft_wins="value",
    )
    return mean.join(wins, on=key, how="left", maintain_order="left_right")


def dominance_table(metrics: pl.DataFrame) -> pl.DataFrame:
    """Arrange metrics as the paper's Table II: a row per checkpoint and pair of groups, FT and PT side by side.

    `low` and `high` bound `ratio`, the mean over the `n_ratio` queries on which it is defined.
    """
    pair = ["checkpoint", "queries", "source", "variant", "against_source", "against_variant"]
    mean = metrics.filter(pl.col("metric") == "mean_max_influence")
    left = mean.select("checkpoint", "queries", "source", "variant", ft="value")
    right = mean.select("checkpoint", "queries", against_source="source", against_variant="variant", pt="value")
    table = metrics.filter(pl.col("metric") == "ft_pt_ratio").select(
        *pair, ratio="value", low="low", high="high", n_ratio="n_queries"
    )
    for name in ("ft_wins", "pt_dominance"):
        share = metrics.filter(pl.col("metric") == name).select(*pair, pl.col("value").alias(name))
        table = table.join(share, on=pair, maintain_order="left")
    return (
        table.join(left, on=pair[:4], maintain_order="left")
        .join(right, on=[*pair[:2], *pair[4:]], maintain_order="left")
        .select(*pair, "ft", "pt", "ratio", "low", "high", "n_ratio", "ft_wins", "pt_dominance")
    )
