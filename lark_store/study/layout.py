"""A study's tables and captions as they are read: headings with units, rounded numbers, intervals as [low, high]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.study.style import CALLED, bytes_text, points_text, rate_text, times_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.study.results import Results

    Row = dict[str, Any]
    Cell = Callable[[Row], str]

NOTHING = "–"
_FIGURE = {"mrr": "mean reciprocal rank", "recall_at_10": "recall@10"}


@dataclass(frozen=True)
class Sheet:
    """A table as it is read: the first column names the row; `is_aside`: less read, folded away."""

    label: str
    caption: str
    heads: list[tuple[str, bool]]  # and whether numbers stand under it
    rows: list[list[str]]
    is_aside: bool = False


def sheets(results: Results) -> list[Sheet]:
    """Return the tables that have rows, in reading order."""
    made = (_influence, _relevance, _dominance, _others, _format, _storage, _methods, _checkpoints, _truth, _gaps)
    return [sheet for sheet in (make(results) for make in made) if sheet is not None]


def number(value: float | None, digits: int = 3) -> str:
    """Return a rounded number, `–` where there is none."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:,.{digits}f}".replace("-", "−")


def share(value: float | None) -> str:
    """Return a share in percent."""
    return NOTHING if value is None or math.isnan(value) else f"{100 * value:.1f}%"


def change(value: float | None) -> str:
    """Return a relative change in percent, with its sign."""
    return NOTHING if value is None or math.isnan(value) else f"{points_text(value)}%"


def points(value: float | None) -> str:
    """Return a difference of shares in percentage points."""
    return NOTHING if value is None or math.isnan(value) else points_text(value)


def p_value(value: float | None) -> str:
    """Return a p-value."""
    if value is None or math.isnan(value):
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _one(field: str, shown: Callable[[Any], str]) -> Cell:
    return lambda row: shown(row[field])


def _word(field: str) -> Cell:
    return lambda row: NOTHING if row[field] is None else str(row[field])


def _whole(field: str) -> Cell:
    return lambda row: NOTHING if row[field] is None else f"{row[field]:,}"


def _method(row: Row) -> str:
    name = str(row["method"])
    return CALLED.get(name, name)


def _epoch(row: Row) -> str:
    return "base" if row["epoch"] == 0 else f"{row['epoch']:g}"


def _rate(row: Row) -> str:
    return NOTHING if row["learning_rate"] is None else rate_text(row["learning_rate"])


def _between(low: str, high: str, shown: Callable[[Any], str]) -> Cell:
    """Return the cell of an interval; its percent sign stands once."""

    def cell(row: Row) -> str:
        if row[low] is None or row[high] is None or math.isnan(row[low]) or math.isnan(row[high]):
            return NOTHING
        return f"[{shown(row[low]).removesuffix('%')}, {shown(row[high])}]"

    return cell


def _sheet(label: str, caption: str, frame: pl.DataFrame, columns: dict[str, Cell], words: int, **more: bool) -> Sheet:
    """Return a table; the first `words` columns hold no numbers."""
    heads = [(head, i >= words) for i, head in enumerate(columns)]
    rows = [[cell(row) for cell in columns.values()] for row in frame.iter_rows(named=True)]
    return Sheet(label, caption, heads, rows, **more)


def at_epoch(results: Results, frame: pl.DataFrame) -> pl.DataFrame:
    """Return a frame's rows at the recipe's epoch, or at the last one that it has."""
    rows = frame.filter(epoch=results.recipe.epoch)
    return rows if len(rows) else frame.filter(pl.col("epoch") == pl.col("epoch").max())


def _when(frame: pl.DataFrame) -> str:
    """Say at which checkpoint and over how many queries."""
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
        "mean max influence (cosine)": _one("mean_max_influence", number),
        "95% interval": _between("low", "high", number),
        "FT wins (queries)": _one("ft_wins", share),
        "95% interval ": _between("ft_wins_low", "ft_wins_high", share),
    }
    caption = (
        "Influence of each source: the mean over queries of the highest cosine in it, and how often fine-tuning "
        f"reaches further than it. {_when(frame)}; intervals are bootstrap, 95%."
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
        "more influence": _one("value", change),
        "95% interval": _between("low", "high", change),
        "difference": _one("difference", number),
        "95% interval ": _between("difference_low", "difference_high", number),
        "p": _one("p_value", p_value),
    }
    caption = (
        "One pretraining source over another in the same format: the ratio of their mean max influences, less 1, and "
        f"their difference. {_when(frame)}."
    )
    return _sheet("Table I b", caption, frame, columns, 3)


def _dominance_columns() -> dict[str, Cell]:
    return {
        "epoch": _epoch,
        "learning rate": _rate,
        "FT (cosine)": _one("ft", number),
        "PT (cosine)": _one("pt", number),
        "FT/PT": _one("ratio", number),
        "95% interval": _between("low", "high", number),
        "FT wins": _one("ft_wins", share),
        "PT wins": _one("pt_wins", share),
        "95% interval ": _between("pt_wins_low", "pt_wins_high", share),
        "p": _one("p_value", p_value),
        "accuracy": _one("accuracy", share),
    }


def _dominance(results: Results) -> Sheet | None:
    against = results.recipe.against
    variant = results.recipe.shown_as[against]
    frame = results.dominance.filter(source=against, variant=variant)
    if not len(frame):
        return None
    caption = (
        f"Fine-tuning (FT) against pretraining (PT: {against}, {variant}) by epoch. FT and PT are mean max "
        "influences; FT/PT is the mean of the queries' ratios where PT > 0; wins are shares of queries. "
        f"{_queries(frame)}."
    )
    return _sheet("Table II", caption, frame, _dominance_columns(), 1)


def _others(results: Results) -> Sheet | None:
    against = results.recipe.against
    is_shown = (pl.col("source") == against) & (pl.col("variant") == results.recipe.shown_as[against])
    frame = results.dominance.filter(~is_shown).sort("source", "variant", "epoch", maintain_order=True)
    if not len(frame):
        return None
    columns = {"source": _word("source"), "format": _word("variant")} | _dominance_columns()
    caption = f"As Table II, against each other pretraining source and format. {_queries(frame)}."
    return _sheet("Table II b", caption, frame, columns, 3, is_aside=True)


def _format(results: Results) -> Sheet | None:
    frame = results.format_effect.sort("source", "epoch", maintain_order=True)
    if not len(frame):
        return None
    columns = {
        "source": _word("source"),
        "epoch": _epoch,
        "chatml / raw": _one("value", number),
        "95% interval": _between("low", "high", number),
        "p": _one("p_value", p_value),
    }
    caption = f"Format effect: mean max influence of the same source formatted, over raw. {_queries(frame)}."
    return _sheet("Table II c", caption, frame, columns, 2)


def _storage(results: Results) -> Sheet | None:
    frame = results.storage
    if not len(frame):
        return None
    columns = {
        "what": _word("what"),
        "model": _word("model"),
        "how": lambda row: "measured on disk" if row["measured"] else "computed",
        "parameters": _whole("parameters"),
        "per sample": lambda row: NOTHING if row["bytes_per_sample"] is None else bytes_text(row["bytes_per_sample"]),
        "samples": _whole("n_samples"),
        "all": lambda row: NOTHING if row["bytes"] is None else bytes_text(row["bytes"]),
        "times a sketch": lambda row: NOTHING if row["times_smaller"] is None else times_text(row["times_smaller"]),
    }
    caption = "Storage per sample and for all samples: sketches against whole gradients (TracIn). 1 kB is 1,000 bytes."
    return _sheet("Table III", caption, frame, columns, 3)


def _methods(results: Results) -> Sheet | None:
    frame = at_epoch(results, results.methods)
    if not len(frame):
        return None
    columns = {
        "against": _word("source"),
        "format": _word("variant"),
        "method": _method,
        "FT wins, LARK": _one("ft_wins", share),
        "FT wins, method": _one("rival_ft_wins", share),
        "LARK less method (points)": _one("difference", points),
        "95% interval": _between("low", "high", points),
        "p": _one("p_value", p_value),
    }
    caption = (
        "How often fine-tuning reaches further than a pretraining source, by LARK's cosine and by other methods on the "
        f"same samples. {_when(frame)}."
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
        "training loss": _one("train_loss", number),
        "query loss": _one("query_loss", number),
        "accuracy": _one("accuracy", share),
        "95% interval": _between("accuracy_low", "accuracy_high", share),
        "macro-F1": _one("macro_f1", number),
        "95% interval ": _between("macro_f1_low", "macro_f1_high", number),
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
        "mean reciprocal rank": _one("mrr", number),
        "95% interval": _between("mrr_low", "mrr_high", number),
        "recall@10": _one("recall_at_10", number),
        "95% interval ": _between("recall_low", "recall_high", number),
    }
    samples = max(int(n) for n in frame["n_samples"])
    caption = (
        f"How well each method finds the samples that state a query's answer. {_queries(frame)}, {samples:,} samples."
    )
    return _sheet("Table VI", caption, frame, columns, 2)


def _gaps(results: Results) -> Sheet | None:
    frame = results.truth_gaps
    if not len(frame):
        return None
    columns = {
        "epoch": _epoch,
        "cosine less": _method,
        "figure": lambda row: {"mrr": "mean reciprocal rank", "recall_at_10": "recall@10"}.get(
            row["metric"], row["metric"]
        ),
        "difference": _one("difference", number),
        "95% interval": _between("low", "high", number),
        "p": _one("p_value", p_value),
    }
    return _sheet(
        "Table VII",
        f"LARK's cosine less each other method, query by query. {_queries(frame)}.",
        frame,
        columns,
        3,
        is_aside=True,
    )


_CAPTIONS = {
    "influence-formatted": """Mean max influence of the formatted (ChatML) sources by epoch. Higher: a source's best
    samples pull the model further in the queries' direction.""",
    "influence-raw": """The same for raw sources. Where fine-tuning has no raw form, its ChatML line stands dashed, for
    reference.""",
    "pt-wins": """Share of queries on which the pretraining source reaches further than fine-tuning, by epoch. A grey
    span marks epochs whose learning rate is lower than the first one's.""",
    "storage": "Bytes per sample, on a logarithmic axis: sketches and whole gradients.",
    "methods": "Share of queries on which fine-tuning wins over each pretraining source, by LARK and by other methods.",
    "trajectories": """Every query's Φ(ft) − Φ(pt) by epoch; the heavy line is the median. Point at a line to follow one
    query.""",
    "heatmap": "Mean max influence of every source and format at every epoch; blue is below 0, orange above.",
    "truth": "Mean reciprocal rank and recall@10 of the samples that state a query's answer, by method and epoch.",
}
FIGURES = {name: (n, " ".join(text.split())) for n, (name, text) in enumerate(_CAPTIONS.items(), start=2)}
