"""The paper's metrics as pure polars functions over source influences, with bootstrap intervals and paired tests.

All take a frame `phi` with one row per checkpoint × query × source × variant and the columns

    checkpoint, queries, query_id, source, stage, variant, phi

where phi = Φ(D, q) = max over samples z of D of φ(z, q), the influence of a source on a query (signed; for cosine in
[−1, 1]), and optionally `noise`, the standard deviation of phi from sketching. All return frames with the columns of
`COLUMNS`, one row per figure: `source` and `variant` are the measured group; `against_source`, `against_variant` and,
for a change, `against_checkpoint` are the reference.

A ratio (`ft_pt_ratio`, `format_effect`) is a ratio of means: mean Φ of the group over mean Φ of its reference, over
their common queries. It is undefined unless both means are above 0; its interval is undefined unless this holds for
every resample. `r_median`, `r_q1` and `r_q3` are the median and the quartiles of the ratios of single queries, over the
`n_ratio` queries with Φ of the reference above 0.

Intervals are percentile bootstrap intervals over queries (95%, 9,999 resamples, fixed seed); a share of 0 or 1, for
which every resample is the same, gets the Clopper–Pearson interval. `p_value` is the two-sided paired permutation test
that the mean over queries of Φ(left, q) − Φ(right, q) is 0 (9,999 sign flips, fixed seed; exact for 13 queries or
fewer). It tests this difference for every comparison, even where the value is a ratio or a share. Both generalise to
similar queries, not to other models or seeds. `sketch_error` bounds the figure's standard deviation over sketcher
seeds: queries share the map, so it doesn't shrink with their number (see `lark_store.stats.sketch_error`).

Definitions follow the LARK paper (the reference experiment's Tables I and II); `difference` and `change` are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.stats import sketch_error
from lark_store.stats.bootstrap import Figure, evaluate
from lark_store.stats.significance import benjamini_hochberg

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Pairs = list[tuple[dict[str, Any], pl.DataFrame]]

COLUMNS = {
    "metric": pl.String,
    "checkpoint": pl.String,
    "queries": pl.String,
    "source": pl.String,
    "variant": pl.String,
    "against_source": pl.String,
    "against_variant": pl.String,
    "against_checkpoint": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "sketch_error": pl.Float64,
    "p_value": pl.Float64,
    "n_queries": pl.Int64,
    "r_median": pl.Float64,
    "r_q1": pl.Float64,
    "r_q3": pl.Float64,
    "n_ratio": pl.Int64,
}
PER_QUERY = ["r_median", "r_q1", "r_q3", "n_ratio"]  # of ratios only
PLAIN = "raw"  # the variant without a template
_FLOATS = [name for name, kind in COLUMNS.items() if kind == pl.Float64]
_GROUP = ["checkpoint", "queries", "source", "variant"]


def _frame(metric: str, figures: list[Figure]) -> pl.DataFrame:
    rows = [{"metric": metric, **row} for row in evaluate(figures)]
    return pl.DataFrame(rows, schema=COLUMNS).with_columns(pl.col(*_FLOATS).fill_nan(None))


def mean_max_influence(phi: pl.DataFrame) -> pl.DataFrame:
    """Return the mean over queries of Φ(D, q), per checkpoint, source and variant (Table I). It has no test."""
    figures = []
    for key, group in _noted(phi).group_by(_GROUP, maintain_order=True):
        error = sketch_error.of_mean(_floats(group["noise"]))
        figures.append(Figure(dict(zip(_GROUP, key, strict=True)), _floats(group["phi"]), sketch_error=error))
    return _frame("mean_max_influence", figures)


def _noted(phi: pl.DataFrame) -> pl.DataFrame:
    """Return `phi` with a column `noise`, null if it has none."""
    return phi if "noise" in phi.columns else phi.with_columns(noise=pl.lit(None, pl.Float64))


def _floats(series: pl.Series) -> Any:
    return series.cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _difference(pair: pl.DataFrame) -> Any:
    return _floats(pair["phi"]) - _floats(pair["phi_right"])


def _noises(pair: pl.DataFrame) -> tuple[Any, Any]:
    return _floats(pair["noise"]), _floats(pair["noise_right"])


def _pairs(left: pl.DataFrame, right: pl.DataFrame, keys: list[str]) -> Pairs:
    """Join groups query by query: `phi` of the left rows with `phi_right` of the right rows."""
    keep = [*_GROUP, "query_id", "phi", "noise"]
    joined = _noted(left).select(keep).join(_noted(right).select(keep), on=keys, maintain_order="left_right")
    return _by_pair(joined.with_columns(pl.col(name).alias(f"{name}_right") for name in keys))


def _by_pair(joined: pl.DataFrame) -> Pairs:
    keys = [*_GROUP, "source_right", "variant_right"]
    names = [*_GROUP, "against_source", "against_variant"]
    return [(dict(zip(names, key, strict=True)), group) for key, group in joined.group_by(keys, maintain_order=True)]


def _tuning_and_pretraining(phi: pl.DataFrame) -> Pairs:
    """Pair each fine-tuning group (`phi`) with each pretraining group (`phi_right`)."""
    stage = pl.col("stage")
    keys = ["checkpoint", "queries", "query_id"]
    return _pairs(phi.filter(stage == "finetune"), phi.filter(stage == "pretrain"), keys)


def _shares(metric: str, pairs: Pairs, wins: Callable[[pl.DataFrame], tuple[pl.Series, float]]) -> pl.DataFrame:
    """Return the share of queries for each pair; `wins` returns a bool per query and the share's sketch error."""
    figures = []
    for names, pair in pairs:
        won, error = wins(pair)
        figures.append(Figure(names, _floats(won), difference=_difference(pair), is_share=True, sketch_error=error))
    return _frame(metric, figures)


def _ratios(metric: str, pairs: Pairs) -> pl.DataFrame:
    """Return the ratio of means for each pair, with the median and quartiles of the queries' ratios."""
    figures = []
    for names, pair in pairs:
        sides = _floats(pair["phi"]), _floats(pair["phi_right"])
        error = sketch_error.of_ratio_of_means(*sides, *_noises(pair))
        figures.append(Figure(names | per_query_ratios(*sides), *sides, _difference(pair), sketch_error=error))
    return _frame(metric, figures)


def per_query_ratios(top_Q: Floats, bottom_Q: Floats) -> dict[str, float]:
    """Return the median and quartiles of top / bottom over the queries with `bottom` above 0, and their number.

    Quartiles interpolate linearly. NaN without such a query.

    >>> per_query_ratios(np.array([3.0, 1.0, 1.0]), np.array([1.0, 2.0, -1.0]))
    {'r_median': 1.75, 'r_q1': 1.125, 'r_q3': 2.375, 'n_ratio': 2}
    """
    is_defined = bottom_Q > 0
    ratios = top_Q[is_defined] / bottom_Q[is_defined]
    spread = np.quantile(ratios, [0.5, 0.25, 0.75]).tolist() if len(ratios) else [np.nan] * 3
    return dict(zip(PER_QUERY, [*spread, len(ratios)], strict=True))


def ft_pt_ratio(phi: pl.DataFrame) -> pl.DataFrame:
    """Return mean Φ(ft, q) over mean Φ(pt, q), per pair of FT and PT groups (Table II).

    Above 1, fine-tuning dominates. The ratio of one query is the paper's R(q) = Φ(ft, q) / Φ(pt, q), undefined where
    Φ(pt, q) ≤ 0.
    """
    return _ratios("ft_pt_ratio", _tuning_and_pretraining(phi))


def ft_wins(phi: pl.DataFrame) -> pl.DataFrame:
    """Return the share of queries, in [0, 1], with Φ(ft, q) > Φ(pt, q) (Tables I and IV)."""

    def wins(pair: pl.DataFrame) -> tuple[pl.Series, float]:
        return pair["phi"] > pair["phi_right"], sketch_error.of_share(_difference(pair), *_noises(pair))

    return _shares("ft_wins", _tuning_and_pretraining(phi), wins)


def pt_dominance(phi: pl.DataFrame) -> pl.DataFrame:
    """Return PT-Dom, the share of queries, in [0, 1], with Φ(pt, q) > Φ(ft, q) (Table II). Ties don't count."""

    def losses(pair: pl.DataFrame) -> tuple[pl.Series, float]:
        return pair["phi_right"] > pair["phi"], sketch_error.of_share(-_difference(pair), *_noises(pair))

    return _shares("pt_dominance", _tuning_and_pretraining(phi), losses)


def format_effect(phi: pl.DataFrame, plain: str = PLAIN) -> pl.DataFrame:
    """Return mean max influence in each other variant over that in `plain`, per source with both.

    Above 1, the template alone raises influence. `variant` names the template.
    """
    variant = pl.col("variant")
    keys = ["checkpoint", "queries", "query_id", "source"]
    return _ratios("format_effect", _pairs(phi.filter(variant != plain), phi.filter(variant == plain), keys))


def _differences(metric: str, pairs: Pairs) -> pl.DataFrame:
    figures = []
    for names, pair in pairs:
        per_query = _difference(pair)
        error = sketch_error.of_difference(*_noises(pair))
        figures.append(Figure(names, per_query, difference=per_query, sketch_error=error))
    return _frame(metric, figures)


def _in_order(phi: pl.DataFrame, name: str) -> pl.Expr:
    """Return a column's values as integers in order of first appearance."""
    return pl.col(name).cast(pl.Enum(phi[name].unique(maintain_order=True))).to_physical()


def difference(phi: pl.DataFrame) -> pl.DataFrame:
    """Return the mean over queries of Φ(A, q) − Φ(B, q), per pair of sources in one variant at one checkpoint.

    A (`source`) comes before B (`against_source`) in `phi`; each pair once.
    """
    keys = ["checkpoint", "queries", "query_id", "variant"]
    ranked = _noted(phi).select(*_GROUP, "query_id", "phi", "noise", order=_in_order(phi, "source"))
    joined = ranked.join(ranked, on=keys, maintain_order="left_right").filter(pl.col("order") < pl.col("order_right"))
    return _differences("difference", _by_pair(joined.with_columns(variant_right="variant")))


def change(phi: pl.DataFrame) -> pl.DataFrame:
    """Return the mean over queries of the change in Φ(D, q) since the previous checkpoint, per group.

    A group is a source and variant at a checkpoint. Checkpoints are in order of appearance; the previous one
    (`against_checkpoint`) is the last at which this source and variant was scored. A source's first checkpoint has no
    change.
    """
    group, phi = ["queries", "source", "variant"], _noted(phi)
    scored = phi.select(*_GROUP, order=_in_order(phi, "checkpoint")).unique().sort("order")
    before = scored.select(*_GROUP, before=pl.col("checkpoint").shift(1).over(group))
    left = phi.join(before, on=_GROUP, maintain_order="left")
    joined = left.join(
        phi.select(*group, "query_id", before="checkpoint", phi_right="phi", noise_right="noise"),
        on=[*group, "query_id", "before"],
        maintain_order="left",
    ).with_columns(source_right="source", variant_right="variant")
    pairs = [({**names, "against_checkpoint": pair["before"][0]}, pair) for names, pair in _by_pair(joined)]
    return _differences("change", pairs)


def all_metrics(phi: pl.DataFrame) -> pl.DataFrame:
    """Return all metrics of this module in one frame."""
    return pl.concat([paper_metrics(phi), difference(phi), change(phi)])


def paper_metrics(phi: pl.DataFrame) -> pl.DataFrame:
    """Return the paper's metrics (all except `difference` and `change`) in one frame."""
    return pl.concat([f(phi) for f in (mean_max_influence, ft_pt_ratio, ft_wins, pt_dominance, format_effect)])


def comparisons(phi: pl.DataFrame) -> pl.DataFrame:
    """Return `difference` and `change` with `q_value`: Benjamini–Hochberg over all rows of the frame.

    Among the rows with q ≤ α at most a share α is expected to be false. The tests share queries and so are not
    independent: the bound is common practice here, not a theorem.
    """
    tests = pl.concat([difference(phi), change(phi)]).drop(PER_QUERY)
    q = pl.Series("q_value", benjamini_hochberg(tests["p_value"].to_numpy()), dtype=pl.Float64)
    return tests.insert_column(tests.get_column_index("p_value") + 1, q.fill_nan(None))


def influence_table(metrics: pl.DataFrame) -> pl.DataFrame:
    """Arrange metrics as the paper's Table I: a row per checkpoint, source and variant, with FT wins against it."""
    key = ["checkpoint", "queries", "source", "variant"]
    mean = metrics.filter(pl.col("metric") == "mean_max_influence").select(
        *key, "low", "high", "sketch_error", "n_queries", mean_max_influence="value"
    )
    wins = metrics.filter(pl.col("metric") == "ft_wins").select(
        "checkpoint",
        "queries",
        source="against_source",
        variant="against_variant",
        finetune=pl.concat_str("source", "variant", separator=" "),
        ft_wins="value",
    )
    order = [*key, "mean_max_influence", "low", "high", "sketch_error", "n_queries"]
    return mean.select(order).join(wins, on=key, how="left", maintain_order="left_right")


def dominance_table(metrics: pl.DataFrame) -> pl.DataFrame:
    """Arrange metrics as the paper's Table II: a row per checkpoint and pair of groups, FT and PT side by side.

    `ratio` is mean Φ(ft, q) over mean Φ(pt, q) on the `n_queries` common queries; `low`, `high` and `sketch_error`
    belong to it. `r_median`, `r_q1` and `r_q3` describe R(q) over the `n_ratio` queries with Φ(pt, q) > 0. `p_value`
    tests that `ft` and `pt` are equal.
    """
    pair = ["checkpoint", "queries", "source", "variant", "against_source", "against_variant"]
    mean = metrics.filter(pl.col("metric") == "mean_max_influence")
    left = mean.select("checkpoint", "queries", "source", "variant", ft="value")
    right = mean.select("checkpoint", "queries", against_source="source", against_variant="variant", pt="value")
    table = metrics.filter(pl.col("metric") == "ft_pt_ratio").select(
        *pair, "low", "high", "sketch_error", "p_value", "n_queries", *PER_QUERY, ratio="value"
    )
    for name in ("ft_wins", "pt_dominance"):
        share = metrics.filter(pl.col("metric") == name).select(*pair, pl.col("value").alias(name))
        table = table.join(share, on=pair, maintain_order="left")
    return (
        table.join(left, on=pair[:4], maintain_order="left")
        .join(right, on=[*pair[:2], *pair[4:]], maintain_order="left")
        .select(
            *[*pair, "ft", "pt", "ratio", "low", "high", "sketch_error", *PER_QUERY],
            *["ft_wins", "pt_dominance", "p_value", "n_queries"],
        )
    )
