"""A study's tables and captions for readers: headings with units, rounded numbers, intervals as [low, high]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.charts.numbers import bytes_text, points_text, rate_text, times_text
from lark_store.charts.style import METHOD_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.study.results import Results

    Row = dict[str, Any]
    Cell = Callable[[Row], str]

MISSING = "–"
_FIGURE = {"mrr": "mean reciprocal rank", "recall_at_10": "recall@10"}


@dataclass(frozen=True)
class Sheet:
    """A formatted table: the first column names the row; `is_aside` tables are folded."""

    label: str
    caption: str
    heads: list[tuple[str, bool]]  # heading, and whether its column is numeric
    rows: list[list[str]]
    is_aside: bool = False


def sheets(results: Results) -> list[Sheet]:
    """Return the non-empty tables in reading order."""
    builders = (_influence, _relevance, _dominance, _others, _format, _storage, _methods, _checkpoints, _truth, _gaps)
    return [sheet for sheet in (make(results) for make in builders) if sheet is not None]


def number(value: float | None, digits: int = 3) -> str:
    """Return a rounded number, `–` if missing."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{value:,.{digits}f}".replace("-", "−")


def share(value: float | None) -> str:
    """Return a share in percent."""
    return MISSING if value is None or math.isnan(value) else f"{100 * value:.1f}%"


def change(value: float | None) -> str:
    """Return a relative change in percent, with its sign."""
    return MISSING if value is None or math.isnan(value) else f"{points_text(value)}%"


def points(value: float | None) -> str:
    """Return a difference of shares in percentage points."""
    return MISSING if value is None or math.isnan(value) else points_text(value)


def p_value(value: float | None) -> str:
    """Return a p-value."""
    if value is None or math.isnan(value):
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _formatted(field: str, write: Callable[[Any], str]) -> Cell:
    return lambda row: write(row[field])


def _word(field: str) -> Cell:
    return lambda row: MISSING if row[field] is None else str(row[field])


def _whole(field: str) -> Cell:
    return lambda row: MISSING if row[field] is None else f"{row[field]:,}"


def _method(row: Row) -> str:
    name = str(row["method"])
    return METHOD_NAMES.get(name, name)


def _epoch(row: Row) -> str:
    return "base" if row["epoch"] == 0 else f"{row['epoch']:g}"


def _rate(row: Row) -> str:
    return MISSING if row["learning_rate"] is None else rate_text(row["learning_rate"])


def _interval(low: str, high: str, write: Callable[[Any], str]) -> Cell:
    """Return the cell of an interval, with a single percent sign."""

    def cell(row: Row) -> str:
        if row[low] is None or row[high] is None or math.isnan(row[low]) or math.isnan(row[high]):
            return MISSING
        return f"[{write(row[low]).removesuffix('%')}, {write(row[high])}]"

    return cell


def _quartiles(row: Row) -> str:
    """Return the quartiles of the queries' ratios: a spread, not an interval."""
    return MISSING if row["r_q1"] is None else f"{number(row['r_q1'])} to {number(row['r_q3'])}"


def _per_query_columns() -> dict[str, Cell]:
    return {
        "median R(q)": _formatted("r_median", number),
        "quartiles": _quartiles,
        "queries with R(q)": _whole("n_ratio"),
    }


def _sheet(label: str, caption: str, frame: pl.DataFrame, columns: dict[str, Cell], words: int, **more: bool) -> Sheet:
    """Return a table; its first `words` columns hold text."""
    heads = [(head, i >= words) for i, head in enumerate(columns)]
    rows = [[cell(row) for cell in columns.values()] for row in frame.iter_rows(named=True)]
    return Sheet(label, caption, heads, rows, **more)


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
        "source": _word("source"),
        "stage": _word("stage"),
        "format": _word("variant"),
        "mean max influence (cosine)": _formatted("mean_max_influence", number),
        "95% interval": _interval("low", "high", number),
        "sketch error": _formatted("sketch_error", number),
        "FT wins (queries)": _formatted("ft_wins", share),
        "95% interval ": _interval("ft_wins_low", "ft_wins_high", share),
    }
    caption = (
        "Influence of each source: the mean over queries of the highest cosine in it, and how often fine-tuning "
        f"reaches further than it. {_scope(frame)}; intervals are bootstrap, 95%."
    )
    return _sheet("Table I", caption, frame, columns, 3)


def _relevance(results: Results) -> Sheet | None:
    frame = at_epoch(results, results.relevance)
    if not len(frame):
        return None
    columns = {
        "source": _word("source"),
        "over": _word("against_source"),
        "format": _word("variant"),
        "more influence": _formatted("value", change),
        "95% interval": _interval("low", "high", change),
        "difference": _formatted("difference", number),
        "95% interval ": _interval("difference_low", "difference_high", number),
        "sketch error": _formatted("sketch_error", number),
        "p": _formatted("p_value", p_value),
    }
    caption = (
        "One pretraining source over another in the same format: the ratio of their mean max influences, minus 1, and "
        f"their difference. {_scope(frame)}."
    )
    return _sheet("Table I b", caption, frame, columns, 3)


def _dominance_columns() -> dict[str, Cell]:
    return {
        "epoch": _epoch,
        "learning rate": _rate,
        "FT (cosine)": _formatted("ft", number),
        "PT (cosine)": _formatted("pt", number),
        "FT/PT": _formatted("ratio", number),
        "95% interval": _interval("low", "high", number),
        "sketch error": _formatted("sketch_error", number),
        **_per_query_columns(),
        "FT wins": _formatted("ft_wins", share),
        "PT wins": _formatted("pt_wins", share),
        "95% interval ": _interval("pt_wins_low", "pt_wins_high", share),
        "p": _formatted("p_value", p_value),
        "accuracy": _formatted("accuracy", share),
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
    return _sheet("Table II", caption, frame, _dominance_columns(), 1)


def _others(results: Results) -> Sheet | None:
    source = results.recipe.against
    is_shown = (pl.col("source") == source) & (pl.col("variant") == results.recipe.shown_as[source])
    frame = results.dominance.filter(~is_shown).sort("source", "variant", "epoch", maintain_order=True)
    if not len(frame):
        return None
    columns = {"source": _word("source"), "format": _word("variant")} | _dominance_columns()
    caption = f"As Table II, against each other pretraining source and format. {_queries(frame)}."
    return _sheet("Table II b", caption, frame, columns, 3, is_aside=True)


def _format(results: Results) -> Sheet | None:
    frame = results.format_effect.sort("source", "variant", "epoch", maintain_order=True)
    if not len(frame):
        return None
    columns = {
        "source": _word("source"),
        "format": _word("variant"),
        "epoch": _epoch,
        "over raw": _formatted("value", number),
        "95% interval": _interval("low", "high", number),
        **_per_query_columns(),
        "p": _formatted("p_value", p_value),
    }
    caption = (
        "Format effect: mean max influence of a source in a format over that of the same source as raw text, undefined "
        "unless both are above 0; R(q) is the ratio of one query, defined where its raw influence is above 0. "
        f"{_queries(frame)}."
    )
    return _sheet("Table II c", caption, frame, columns, 3)


def _storage(results: Results) -> Sheet | None:
    frame = results.storage
    if not len(frame):
        return None
    columns = {
        "what": _word("what"),
        "model": _word("model"),
        "how": lambda row: "measured on disk" if row["measured"] else "computed",
        "parameters": _whole("parameters"),
        "per sample": lambda row: MISSING if row["bytes_per_sample"] is None else bytes_text(row["bytes_per_sample"]),
        "samples": _whole("n_samples"),
        "all": lambda row: MISSING if row["bytes"] is None else bytes_text(row["bytes"]),
        "times a sketch": lambda row: MISSING if row["times_smaller"] is None else times_text(row["times_smaller"]),
    }
    caption = "Storage per sample and for all samples: sketches against full gradients (TracIn). 1 kB is 1,000 bytes."
    return _sheet("Table III", caption, frame, columns, 3)


def _methods(results: Results) -> Sheet | None:
    frame = at_epoch(results, results.methods)
    if not len(frame):
        return None
    columns = {
        "against": _word("source"),
        "format": _word("variant"),
        "method": _method,
        "FT wins, LARK": _formatted("ft_wins", share),
        "FT wins, method": _formatted("rival_ft_wins", share),
        "LARK minus method (points)": _formatted("difference", points),
        "95% interval": _interval("low", "high", points),
        "p": _formatted("p_value", p_value),
    }
    caption = (
        "How often fine-tuning reaches further than a pretraining source, by LARK's cosine and by other methods on the "
        f"same samples. {_scope(frame)}."
    )
    return _sheet("Table IV", caption, frame, columns, 3)


def _checkpoints(results: Results) -> Sheet | None:
    frame = results.checkpoints
    if not len(frame):
        return None
    columns = {
        "checkpoint": _word("checkpoint"),
        "steps": _whole("step"),
        "learning rate": _rate,
        "training loss": _formatted("train_loss", number),
        "query loss": _formatted("query_loss", number),
        "accuracy": _formatted("accuracy", share),
        "95% interval": _interval("accuracy_low", "accuracy_high", share),
        "macro-F1": _formatted("macro_f1", number),
        "95% interval ": _interval("macro_f1_low", "macro_f1_high", number),
        "evaluated": _whole("n_evaluated"),
    }
    caption = (
        "The checkpoints: losses in nats per target token, accuracy and macro-F1 by the likelihoods of the labels."
    )
    return _sheet("Table V", caption, frame, columns, 1)


def _truth(results: Results) -> Sheet | None:
    frame = results.truth
    if not len(frame):
        return None
    columns = {
        "epoch": _epoch,
        "method": _method,
        "mean reciprocal rank": _formatted("mrr", number),
        "95% interval": _interval("mrr_low", "mrr_high", number),
        "recall@10": _formatted("recall_at_10", number),
        "95% interval ": _interval("recall_low", "recall_high", number),
    }
    samples = max(int(n) for n in frame["n_samples"])
    caption = (
        f"How well each method finds the samples stating a query's answer. {_queries(frame)}, {samples:,} samples."
    )
    return _sheet("Table VI", caption, frame, columns, 2)


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
        "difference": _formatted("difference", number),
        "95% interval": _interval("low", "high", number),
        "p": _formatted("p_value", p_value),
    }
    return _sheet(
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
