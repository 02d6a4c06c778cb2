"""A study's tables and captions for readers: headings with units, rounded numbers, intervals as [low, high]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from lark_store.charts.numbers import bytes_text, rate_text, times_text
from lark_store.charts.style import METHOD_NAMES
from lark_store.report.sheets import (
    MISSING,
    Sheet,
    change,
    formatted,
    interval,
    make_sheet,
    number,
    p_value,
    points,
    share,
    whole,
    word,
)

if TYPE_CHECKING:
    from lark_store.report.sheets import Cell, Row
    from lark_store.study.results import Results

_FIGURE = {"mrr": "mean reciprocal rank", "recall_at_10": "recall@10"}


def sheets(results: Results) -> list[Sheet]:
    """Return the non-empty tables in reading order."""
    builders = (_influence, _relevance, _dominance, _others, _format, _storage, _methods, _checkpoints, _truth, _gaps)
    return [sheet for sheet in (make(results) for make in builders) if sheet is not None]


def _method(row: Row) -> str:
    name = str(row["method"])
    return METHOD_NAMES.get(name, name)


def _epoch(row: Row) -> str:
    return "base" if row["epoch"] == 0 else f"{row['epoch']:g}"


def _rate(row: Row) -> str:
    return MISSING if row["learning_rate"] is None else rate_text(row["learning_rate"])


def _quartiles(row: Row) -> str:
    """Return the quartiles of the queries' ratios: a spread, not an interval."""
    return MISSING if row["r_q1"] is None else f"{number(row['r_q1'])} to {number(row['r_q3'])}"


def _per_query_columns() -> dict[str, Cell]:
    return {
        "median R(q)": formatted("r_median", number),
        "quartiles": _quartiles,
        "queries with R(q)": whole("n_ratio"),
    }


def at_epoch(results: Results, frame: pl.DataFrame) -> pl.DataFrame:
    """Return a frame's rows at the recipe's epoch, or else at its last one."""
    rows = frame.filter(epoch=results.recipe.epoch)
    return rows if len(rows) else frame.filter(pl.col("epoch") == pl.col("epoch").max())


def _scope(frame: pl.DataFrame) -> str:
    """Return the checkpoint and the number of queries in words."""
    return f"Checkpoint {', '.join(frame['checkpoint'].unique(maintain_order=True))}; {_queries(frame)}"


def _queries(frame: pl.DataFrame) -> str:
    counts = [int(n) for n in frame["n_queries"].drop_nulls()]
    few, many = min(counts, default=0), max(counts, default=0)
    return f"{many:,} queries" if few == many else f"{few:,} to {many:,} queries"


def _influence(results: Results) -> Sheet | None:
    frame = at_epoch(results, results.influence)
    if not len(frame):
        return None
    columns = {
        "source": word("source"),
        "stage": word("stage"),
        "format": word("variant"),
        "mean max influence (cosine)": formatted("mean_max_influence", number),
        "95% interval": interval("low", "high", number),
        "sketch error": formatted("sketch_error", number),
        "FT wins (queries)": formatted("ft_wins", share),
        "95% interval ": interval("ft_wins_low", "ft_wins_high", share),
    }
    caption = (
        "Influence of each source: the mean over queries of the highest cosine in it, and how often fine-tuning "
        f"reaches further than it. {_scope(frame)}; intervals are bootstrap, 95%."
    )
    return make_sheet("Table I", caption, frame, columns, 3)


def _relevance(results: Results) -> Sheet | None:
    frame = at_epoch(results, results.relevance)
    if not len(frame):
        return None
    columns = {
        "source": word("source"),
        "over": word("against_source"),
        "format": word("variant"),
        "more influence": formatted("value", change),
        "95% interval": interval("low", "high", change),
        "difference": formatted("difference", number),
        "95% interval ": interval("difference_low", "difference_high", number),
        "sketch error": formatted("sketch_error", number),
        "p": formatted("p_value", p_value),
    }
    caption = (
        "One pretraining source over another in the same format: the ratio of their mean max influences, minus 1, and "
        f"their difference. {_scope(frame)}."
    )
    return make_sheet("Table I b", caption, frame, columns, 3)


def _dominance_columns() -> dict[str, Cell]:
    return {
        "epoch": _epoch,
        "learning rate": _rate,
        "FT (cosine)": formatted("ft", number),
        "PT (cosine)": formatted("pt", number),
        "FT/PT": formatted("ratio", number),
        "95% interval": interval("low", "high", number),
        "sketch error": formatted("sketch_error", number),
        **_per_query_columns(),
        "FT wins": formatted("ft_wins", share),
        "PT wins": formatted("pt_wins", share),
        "95% interval ": interval("pt_wins_low", "pt_wins_high", share),
        "p": formatted("p_value", p_value),
        "accuracy": formatted("accuracy", share),
    }


def _dominance(results: Results) -> Sheet | None:
    source = results.recipe.against
    variant = results.recipe.shown_as[source]
    frame = results.dominance.filter(source=source, variant=variant)
    if not len(frame):
        return None
    caption = (
        f"Fine-tuning (FT) against pretraining (PT: {source}, {variant}) by epoch. FT and PT are mean max "
        "influences; FT/PT is their ratio, undefined unless both are above 0; R(q) is the ratio of one query, defined "
        f"where its PT is above 0; wins are shares of queries. {_queries(frame)}."
    )
    return make_sheet("Table II", caption, frame, _dominance_columns(), 1)


def _others(results: Results) -> Sheet | None:
    source = results.recipe.against
    is_shown = (pl.col("source") == source) & (pl.col("variant") == results.recipe.shown_as[source])
    frame = results.dominance.filter(~is_shown).sort("source", "variant", "epoch", maintain_order=True)
    if not len(frame):
        return None
    columns = {"source": word("source"), "format": word("variant")} | _dominance_columns()
    caption = f"As Table II, against each other pretraining source and format. {_queries(frame)}."
    return make_sheet("Table II b", caption, frame, columns, 3, is_aside=True)


def _format(results: Results) -> Sheet | None:
    frame = results.format_effect.sort("source", "variant", "epoch", maintain_order=True)
    if not len(frame):
        return None
    columns = {
        "source": word("source"),
        "format": word("variant"),
        "epoch": _epoch,
        "over raw": formatted("value", number),
        "95% interval": interval("low", "high", number),
        **_per_query_columns(),
        "p": formatted("p_value", p_value),
    }
    caption = (
        "Format effect: mean max influence of a source in a format over that of the same source as raw text, undefined "
        "unless both are above 0; R(q) is the ratio of one query, defined where its raw influence is above 0. "
        f"{_queries(frame)}."
    )
    return make_sheet("Table II c", caption, frame, columns, 3)


def _storage(results: Results) -> Sheet | None:
    frame = results.storage
    if not len(frame):
        return None
    columns = {
        "what": word("what"),
        "model": word("model"),
        "how": lambda row: "measured on disk" if row["measured"] else "computed",
        "parameters": whole("parameters"),
        "per sample": lambda row: MISSING if row["bytes_per_sample"] is None else bytes_text(row["bytes_per_sample"]),
        "samples": whole("n_samples"),
        "all": lambda row: MISSING if row["bytes"] is None else bytes_text(row["bytes"]),
        "times a sketch": lambda row: MISSING if row["times_smaller"] is None else times_text(row["times_smaller"]),
    }
    caption = "Storage per sample and for all samples: sketches against full gradients (TracIn). 1 kB is 1,000 bytes."
    return make_sheet("Table III", caption, frame, columns, 3)


def _methods(results: Results) -> Sheet | None:
    frame = at_epoch(results, results.methods)
    if not len(frame):
        return None
    columns = {
        "against": word("source"),
        "format": word("variant"),
        "method": _method,
        "FT wins, LARK": formatted("ft_wins", share),
        "FT wins, method": formatted("rival_ft_wins", share),
        "LARK minus method (points)": formatted("difference", points),
        "95% interval": interval("low", "high", points),
        "p": formatted("p_value", p_value),
    }
    caption = (
        "How often fine-tuning reaches further than a pretraining source, by LARK's cosine and by other methods on the "
        f"same samples. {_scope(frame)}."
    )
    return make_sheet("Table IV", caption, frame, columns, 3)


def _checkpoints(results: Results) -> Sheet | None:
    frame = results.checkpoints
    if not len(frame):
        return None
    columns = {
        "checkpoint": word("checkpoint"),
        "steps": whole("step"),
        "learning rate": _rate,
        "training loss": formatted("train_loss", number),
        "query loss": formatted("query_loss", number),
        "accuracy": formatted("accuracy", share),
        "95% interval": interval("accuracy_low", "accuracy_high", share),
        "macro-F1": formatted("macro_f1", number),
        "95% interval ": interval("macro_f1_low", "macro_f1_high", number),
        "evaluated": whole("n_evaluated"),
    }
    caption = (
        "The checkpoints: losses in nats per target token, accuracy and macro-F1 by the likelihoods of the labels."
    )
    return make_sheet("Table V", caption, frame, columns, 1)


def _truth(results: Results) -> Sheet | None:
    frame = results.truth
    if not len(frame):
        return None
    columns = {
        "epoch": _epoch,
        "method": _method,
        "mean reciprocal rank": formatted("mrr", number),
        "95% interval": interval("mrr_low", "mrr_high", number),
        "recall@10": formatted("recall_at_10", number),
        "95% interval ": interval("recall_low", "recall_high", number),
    }
    samples = max(int(n) for n in frame["n_samples"])
    caption = (
        f"How well each method finds the samples stating a query's answer. {_queries(frame)}, {samples:,} samples."
    )
    return make_sheet("Table VI", caption, frame, columns, 2)


def _gaps(results: Results) -> Sheet | None:
    frame = results.truth_gaps
    if not len(frame):
        return None
    columns = {
        "epoch": _epoch,
        "cosine minus": _method,
        "figure": lambda row: {"mrr": "mean reciprocal rank", "recall_at_10": "recall@10"}.get(
            row["metric"], row["metric"]
        ),
        "difference": formatted("difference", number),
        "95% interval": interval("low", "high", number),
        "p": formatted("p_value", p_value),
    }
    return make_sheet(
        "Table VII",
        f"LARK's cosine minus each other method, query by query. {_queries(frame)}.",
        frame,
        columns,
        3,
        is_aside=True,
    )


_CAPTIONS = {
    "influence": """Mean max influence of the sources by epoch, each in its main format. Higher: a source's best samples
    pull the model further in the queries' direction.""",
    "influence-raw": """The same for raw sources. If fine-tuning has no raw form, its line in its main format is shown
    dashed, for reference.""",
    "pt-wins": """Share of queries on which the pretraining source reaches further than fine-tuning, by epoch. A grey
    span marks epochs whose learning rate is lower than the first one's.""",
    "storage": "Bytes per sample, on a logarithmic axis: sketches and full gradients.",
    "methods": "Share of queries on which fine-tuning wins over each pretraining source, by LARK and by other methods.",
    "trajectories": """Every query's Φ(ft) − Φ(pt) by epoch; the heavy line is the median. Point at a line to follow one
    query.""",
    "heatmap": "Mean max influence of every source and format at every epoch; blue is below 0, orange above.",
    "truth": "Mean reciprocal rank and recall@10 of the samples stating a query's answer, by method and epoch.",
}
FIGURES = {name: (n, " ".join(text.split())) for n, (name, text) in enumerate(_CAPTIONS.items(), start=2)}
