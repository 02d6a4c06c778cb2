"""The data of a report's picker of queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.report.queries import LONGEST, LONGEST_QUERY, TopRows, cut, short, shortened

if TYPE_CHECKING:
    from lark_store.store.report.answers import Answers


def picker(answers: Answers) -> dict[str, Any]:
    """Return the page's data on queries; lists by checkpoint have null for missing values."""
    tops = TopRows(answers.checkpoints, answers.texts)
    is_shown = pl.col("place").is_not_null().any().over("query_id", "source", "variant", "sample_id")
    hits = answers.hits.filter(is_shown)
    rows = {str(key[0]): tops.of_query(part) for key, part in hits.group_by("query_id", maintain_order=True)}
    phi = answers.phi.group_by("checkpoint", "query_id", "source", maintain_order=True).agg(pl.col("phi").max())
    values = {(query, source, at): value for at, query, source, value in phi.iter_rows()}
    losses = {(query, at): loss for query, at, loss in answers.losses.iter_rows()}
    return {
        "checkpoints": answers.checkpoints,
        "tuning": "",
        "against": "",
        "colours": answers.colours,
        "groups": tops.groups,
        "samples": tops.samples,
        "series": answers.sources,
        "words": {
            "axis": "checkpoint",
            "by": "By checkpoint",
            "step": "checkpoint",
            "winner": "highest",
            "influence": "Highest influence in each source",
            "none": "There are no queries.",
        },
        "queries": [_query(answers, query, values, losses) | rows[query] for query in answers.shown],
    }


def _query(
    answers: Answers, query: str, values: dict[tuple[str, str, str], float], losses: dict[tuple[str, str], float]
) -> dict[str, Any]:
    text, response = answers.texts.get((answers.queries, query), ("", None))
    n = len(answers.checkpoints)
    phi = [[values.get((query, source, at)) for at in answers.checkpoints] for source in answers.sources]
    return {
        "id": query,
        "text": shortened(text, LONGEST_QUERY),
        "response": cut(response, LONGEST),
        "label": None,
        "prediction": [None] * n,
        "correct": [None] * n,
        "loss": [short(losses.get((query, at))) for at in answers.checkpoints],
        "phi": [[short(value) for value in along] for along in phi],
        "winner": [_highest(answers.sources, [along[i] for along in phi]) for i in range(n)],
    }


def _highest(sources: list[str], values: list[float | None]) -> str | None:
    """Return the source with the highest value."""
    present = [(value, -n) for n, value in enumerate(values) if value is not None]
    return sources[-max(present)[1]] if present else None
