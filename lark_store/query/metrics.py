"""The paper's metrics as pure polars functions over source influences, with bootstrap intervals and paired tests.

All take a frame `phi` with one row per checkpoint × query × source × variant and the columns

    checkpoint, queries, query_id, source, stage, variant, phi

where phi = Φ(D, q) = max over samples z of D of φ(z, q), the influence of a source on a query (signed; for cosine in
[−1, 1]). All return frames with the columns of `COLUMNS`, one row per figure: `source` and `variant` say what is
measured, `against_source`, `against_variant` and, for a change, `against_checkpoint` what it is compared with.

Intervals are percentile bootstrap intervals over queries (95%, 9,999 resamples, fixed seed); a share of 0 or 1, of
which every resample is the same, has Clopper and Pearson's. `p_value` is of the
two-sided paired permutation test that the mean over queries of Φ(left, q) − Φ(right, q) is 0 (9,999 sign flips, fixed
seed; exact for 13 queries or fewer): of that difference for every comparison, also where the value is a ratio or a
share. Both speak of other queries like these, not of other models or seeds.

Definitions follow the LARK paper (the reference experiment's Tables I and II); `difference` and `change` are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.query.compare import Figure, evaluate
from lark_store.query.significance import benjamini_hochberg

if TYPE_CHECKING:
    from collections.abc import Callable

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
    "p_value": pl.Float64,
    "n_queries": pl.Int64,
}
_GROUP = ["checkpoint", "queries", "source", "variant"]


def _frame(metric: str, figures: list[Figure]) -> pl.DataFrame:
    rows = [{"metric": metric, **row} for row in evaluate(figures)]
    return pl.DataFrame(rows, schema=COLUMNS).with_columns(pl.col("value", "low", "high", "p_value").fill_nan(None))


def mean_max_influence(phi: pl.DataFrame) -> pl.DataFrame:
    """Return the mean over queries of Φ(D, q), per checkpoint, source and variant (Table I). It has no test."""
    groups = phi.group_by(_GROUP, maintain_order=True)
    figures = [Figure(dict(zip(_GROUP, key, strict=True)), _floats(group["phi"])) for key, group in groups]
    return _frame("mean_max_influence", figures)


def _floats(series: pl.Series) -> Any:
    return series.cast(pl.Float64).to_numpy()


def _difference(pair: pl.DataFrame) -> Any:
    return _floats(pair["phi"]) - _floats(pair["phi_right"])


def _pairs(left: pl.DataFrame, right: pl.DataFrame, on: list[str]) -> Pairs:
    """Pair groups query by query: `phi` of the left rows beside `phi_right` of the right ones."""
    keep = [*_GROUP, "query_id", "phi"]
    both = left.select(keep).join(right.select(keep), on=on, maintain_order="left_right")
    return _by_pair(both.with_columns(pl.col(name).alias(f"{name}_right") for name in on))


def _by_pair(both: pl.DataFrame) -> Pairs:
    keys = [*_GROUP, "source_right", "variant_right"]
    names = [*_GROUP, "against_source", "against_variant"]
    return [(dict(zip(names, key, strict=True)), group) for key, group in both.group_by(keys, maintain_order=True)]


def _finetune_against_pretrain(
    metric: str, phi: pl.DataFrame, figures: Callable[[pl.DataFrame], pl.Series]
) -> pl.DataFrame:
    """Average `figures` of each pair of a fine-tuning (`phi`) and a pretraining group (`phi_right`) over queries.

    The test is over all the pair's queries: leaving out those with a low Φ(pt, q) would favour pretraining.
    """
    stage = pl.col("stage")
    pairs = _pairs(
        phi.filter(stage == "finetune"), phi.filter(stage == "pretrain"), ["checkpoint", "queries", "query_id"]
    )
    made = []
    for names, pair in pairs:
        of = figures(pair)
        made.append(Figure(names, _floats(of), difference=_difference(pair), is_share=of.dtype == pl.Boolean))
    return _frame(metric, made)


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
    on = ["checkpoint", "queries", "query_id", "source"]
    pairs = _pairs(phi.filter(variant == formatted), phi.filter(variant == plain), on)
    figures = [
        Figure(names, _floats(pair["phi"]), _floats(pair["phi_right"]), _difference(pair)) for names, pair in pairs
    ]
    return _frame("format_effect", figures)


def _differences(metric: str, pairs: Pairs) -> pl.DataFrame:
    figures = []
    for names, pair in pairs:
        of = _difference(pair)
        figures.append(Figure(names, of, difference=of))
    return _frame(metric, figures)


def _in_order(phi: pl.DataFrame, name: str) -> pl.Expr:
    """Return a column's values as numbers in their order of first appearance."""
    return pl.col(name).cast(pl.Enum(phi[name].unique(maintain_order=True))).to_physical()


def difference(phi: pl.DataFrame) -> pl.DataFrame:
    """Return the mean over queries of Φ(A, q) − Φ(B, q), per pair of sources in one variant at one checkpoint.

    A (`source`) comes before B (`against_source`) in `phi`; each pair once.
    """
    on = ["checkpoint", "queries", "query_id", "variant"]
    ranked = phi.select(*_GROUP, "query_id", "phi", order=_in_order(phi, "source"))
    both = ranked.join(ranked, on=on, maintain_order="left_right").filter(pl.col("order") < pl.col("order_right"))
    return _differences("difference", _by_pair(both.with_columns(variant_right="variant")))


def change(phi: pl.DataFrame) -> pl.DataFrame:
    """Return the mean over queries of Φ(D, q) less that at the checkpoint before, per checkpoint, source and variant.

    Checkpoints are in order of appearance; the one before (`against_checkpoint`) is the last before it at which this
    source and variant was scored. A source's first checkpoint has no change.
    """
    group = ["queries", "source", "variant"]
    scored = phi.select(*_GROUP, order=_in_order(phi, "checkpoint")).unique().sort("order")
    before = scored.select(*_GROUP, before=pl.col("checkpoint").shift(1).over(group))
    left = phi.join(before, on=_GROUP, maintain_order="left")
    both = left.join(
        phi.select(*group, "query_id", before="checkpoint", phi_right="phi"),
        on=[*group, "query_id", "before"],
        maintain_order="left",
    ).with_columns(source_right="source", variant_right="variant")
    pairs = [({**names, "against_checkpoint": pair["before"][0]}, pair) for names, pair in _by_pair(both)]
    return _differences("change", pairs)


def all_metrics(phi: pl.DataFrame) -> pl.DataFrame:
    """Return every metric of this module in one frame."""
    return pl.concat([paper_metrics(phi), difference(phi), change(phi)])


def paper_metrics(phi: pl.DataFrame) -> pl.DataFrame:
    """Return the paper's metrics, those without `difference` and `change`, in one frame."""
    return pl.concat([f(phi) for f in (mean_max_influence, ft_pt_ratio, ft_wins, pt_dominance, format_effect)])


def comparisons(phi: pl.DataFrame) -> pl.DataFrame:
    """Return `difference` and `change` with `q_value`: Benjamini–Hochberg over all rows of the frame.

    Among the rows with q ≤ α at most a share α is expected to be false. The tests share queries, so they aren't
    independent: for such tests that is usual practice, not a theorem.
    """
    found = pl.concat([difference(phi), change(phi)])
    q = pl.Series("q_value", benjamini_hochberg(found["p_value"].to_numpy()), dtype=pl.Float64)
    return found.insert_column(found.get_column_index("p_value") + 1, q.fill_nan(None))


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

    `low` and `high` bound `ratio`, the mean over the `n_ratio` queries on which it is defined. `p_value` tests that
    `ft` and `pt` are equal.
    """
    pair = ["checkpoint", "queries", "source", "variant", "against_source", "against_variant"]
    mean = metrics.filter(pl.col("metric") == "mean_max_influence")
    left = mean.select("checkpoint", "queries", "source", "variant", ft="value")
    right = mean.select("checkpoint", "queries", against_source="source", against_variant="variant", pt="value")
    table = metrics.filter(pl.col("metric") == "ft_pt_ratio").select(
        *pair, ratio="value", low="low", high="high", n_ratio="n_queries", p_value="p_value"
    )
    for name in ("ft_wins", "pt_dominance"):
        share = metrics.filter(pl.col("metric") == name).select(*pair, pl.col("value").alias(name))
        table = table.join(share, on=pair, maintain_order="left")
    return (
        table.join(left, on=pair[:4], maintain_order="left")
        .join(right, on=[*pair[:2], *pair[4:]], maintain_order="left")
        .select(*pair, "ft", "pt", "ratio", "low", "high", "n_ratio", "ft_wins", "pt_dominance", "p_value")
    )
