"""The report of a store: gather its answers, and render them on a page.

answers    the scores of all queries, the hits of those in the picker, losses
tables     tables for readers
picker     the data of the picker of queries
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lark_store.report import page
from lark_store.store.report.answers import Answers, gather
from lark_store.store.report.picker import picker
from lark_store.store.report.tables import sheets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lark_store.charts.style import Figure
    from lark_store.results import OnProgress
    from lark_store.schema.database import Database

_LEDE = (
    "Which training samples drive this model’s answers, checkpoint by checkpoint, and which sources do they come from?"
)
_CAPTIONS: dict[str, tuple[int | None, str]] = {
    "influence": (None, "The highest score in each source and format, averaged over the queries."),
    "heatmap": (None, "The same for each source, over all its formats."),
    "dominance": (None, "For each query, the highest score in fine-tuning and in pretraining."),
}


def report(
    db: Database,
    queries: Sequence[str] | None,
    checkpoints: list[str],
    options: Mapping[str, Any],
    output: Path,
    on_progress: OnProgress | None,
) -> Path:
    """Write the report of a store to `output`; see `Store.report`."""
    page.check_name(output)
    return page.write(_render(gather(db, queries, checkpoints, options, on_progress)), output)


def _render(answers: Answers) -> str:
    charts = _charts(answers)
    sections = ["tables", *(["figures"] if charts else []), "queries", *(["notes"] if answers.notes else [])]
    last = answers.checkpoints[-1]
    shown = f"{len(answers.shown):,} of {len(answers.ids):,} queries"
    hints = {
        "figures": "Hover over a mark to read its values.",
        "queries": f"The picker holds {shown}. Texts are shortened; tables and figures are over all queries.",
        "top": "The number is the score at the checkpoint; the line shows it over all checkpoints, among the first "
        f"{answers.depth}. A hit is called significant only where a q-value was computed, and is at most 0.05.",
    }
    facts = {
        "Model": ", ".join(answers.models),
        "Checkpoints": ", ".join(answers.checkpoints),
        "Sources": ", ".join(answers.sources),
        "Queries": f"{len(answers.ids):,} ({answers.queries})",
        "Score": answers.label,
        "Samples searched": f"{answers.n_searched:,} sketches at {last}",
    }
    return page.render(
        "store.html.jinja",
        page.HERE,
        charts,
        _CAPTIONS,
        picker(answers),
        title=f"Influence on the queries of {answers.queries}",
        kicker="Training-data attribution report",
        lede=_LEDE,
        nav=[(name, name.capitalize()) for name in sections],
        hints=hints,
        notes=answers.notes,
        facts=facts,
        sheets=sheets(answers),
        scale=answers.scale[:1].upper() + answers.scale[1:],
    )


def _charts(answers: Answers) -> dict[str, Figure]:
    import polars as pl

    from lark_store.charts.dominance import dominance
    from lark_store.charts.heatmap import heatmap
    from lark_store.charts.influence import source_influence

    by_source = answers.by_source.with_columns(group="group_name")
    charts: dict[str, Figure] = {
        "influence": source_influence(answers.influence, answers.tuning, f"{answers.label}; bands are 95% intervals"),
        "heatmap": heatmap(by_source, "Every source at every checkpoint", "mean max influence; the palest colour is 0"),
    }
    pairs = answers.ft_pt.filter(pl.col("checkpoint") == answers.checkpoints[-1])
    if len(pairs):
        charts["dominance"] = dominance(pairs, f"{answers.label} at {answers.checkpoints[-1]}; a point per query")
    return charts
