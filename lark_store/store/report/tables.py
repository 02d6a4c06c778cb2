"""The tables of a report of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.charts.numbers import rate_text
from lark_store.report.sheets import MISSING, formatted, interval, make_sheet, number, p_value, share, whole, word
from lark_store.results import SIGNIFICANT

if TYPE_CHECKING:
    from lark_store.report.sheets import Sheet
    from lark_store.store.report.answers import Answers

_DRIVERS = 20


def sheets(answers: Answers) -> list[Sheet]:
    """Return the non-empty tables in reading order."""
    builders = (_influence, _dominance, _drivers, _checkpoints)
    return [sheet for sheet in (make(answers) for make in builders) if sheet is not None]


def _influence(answers: Answers) -> Sheet:
    frame = answers.influence.filter(checkpoint=answers.checkpoints[-1])
    sizes = answers.phi.filter(checkpoint=answers.checkpoints[-1]).unique(["source", "variant"], maintain_order=True)
    frame = frame.unique(["source", "variant"], maintain_order=True).join(
        sizes.select("source", "variant", "n"), on=["source", "variant"], how="left", maintain_order="left"
    )
    columns = {
        "source": word("source"),
        "format": word("variant"),
        "samples": whole("n"),
        "mean max influence": formatted("mean_max_influence", number),
        "95% interval": interval("low", "high", number),
        "sketch error": formatted("sketch_error", number),
    }
    caption = (
        f"Influence of each source at {answers.checkpoints[-1]}: the mean over {len(answers.ids):,} queries of "
        "the highest score in it. Intervals are bootstrap over queries, 95%."
    )
    return make_sheet("Table 1", caption, frame, columns, 2)


def _dominance(answers: Answers) -> Sheet | None:
    frame = answers.dominance.filter(checkpoint=answers.checkpoints[-1])
    if frame.is_empty():
        return None
    columns = {
        "fine-tuning": word("source"),
        "format": word("variant"),
        "against": word("against_source"),
        "format ": word("against_variant"),
        "FT": formatted("ft", number),
        "PT": formatted("pt", number),
        "FT/PT": formatted("ratio", number),
        "95% interval": interval("low", "high", number),
        "FT wins": formatted("ft_wins", share),
        "PT wins": formatted("pt_dominance", share),
        "p": formatted("p_value", p_value),
    }
    caption = (
        f"Fine-tuning (FT) against pretraining (PT) at {answers.checkpoints[-1]}: mean max influences, their "
        "ratio, undefined unless both are above 0, and the share of queries closer to each."
    )
    return make_sheet("Table 2", caption, frame, columns, 4)


def _drivers(answers: Answers) -> Sheet | None:
    top = answers.hits.filter(pl.col("place").is_not_null(), checkpoint=answers.checkpoints[-1])
    is_significant = pl.col("q_value") <= SIGNIFICANT
    frame = top.group_by("source", "variant", "sample_id", maintain_order=True).agg(
        n=pl.len(),
        mean=pl.col("score").mean(),
        best=pl.col("query_id").sort_by("score", descending=True, maintain_order=True).first(),
        significant=pl.when(pl.col("q_value").count() > 0).then(is_significant.sum().cast(pl.Int64)),
    )
    frame = frame.sort("n", "mean", descending=True, maintain_order=True).head(_DRIVERS)
    if frame.is_empty():
        return None
    columns = {
        "sample": word("sample_id"),
        "source": word("source"),
        "format": word("variant"),
        f"queries with it in their first {answers.spec.k}": whole("n"),
        "of these with q ≤ 0.05": whole("significant"),
        "mean score in them": formatted("mean", number),
        "highest for": word("best"),
    }
    caption = (
        f"Drivers: the samples among the first {answers.spec.k} hits of the most queries at {answers.checkpoints[-1]}, "
        f"over the {len(answers.shown):,} queries in the picker. – means that nothing was tested."
    )
    return make_sheet("Table 3", caption, frame, columns, 3)


def _checkpoints(answers: Answers) -> Sheet:
    mean = answers.losses.group_by("checkpoint", maintain_order=True).agg(pl.col("loss").fill_nan(None).mean())
    frame = answers.course.join(mean, on="checkpoint", how="left", maintain_order="left")
    columns: dict[str, Any] = {
        "checkpoint": word("checkpoint"),
        "epoch": lambda row: MISSING if row["epoch"] is None else f"{row['epoch']:g}",
        "step": whole("step"),
        "learning rate": lambda row: MISSING if row["learning_rate"] is None else rate_text(row["learning_rate"]),
        "mean loss of queries": formatted("loss", number),
    }
    caption = (
        f"The checkpoints, and the mean loss of the {len(answers.shown):,} queries in the picker, as far as stored, "
        "in nats per token."
    )
    return make_sheet("Table 4", caption, frame, columns, 1)
