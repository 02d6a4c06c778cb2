"""The report's data per query: its text, its course over the epochs, and its top samples.

The data is part of the page, so it is compact: each text occurs once, and rows refer to samples and groups by index.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lark_store.study.chart_style import source_colours
from lark_store.study.groups import SKETCHER

if TYPE_CHECKING:
    import polars as pl

    from lark_store.store import Store
    from lark_store.study.results import Results

METHOD = "cosine"
TOP = 5
LONGEST = 1_500  # characters of a sample's text
LONGEST_QUERY = 4_000
DIGITS = 4

_SCORES = """
WITH scored AS (
    SELECT checkpoint, query_id, source, variant, sample_id, max(score) AS score FROM influence
    WHERE sketcher = $sketcher AND method = $method AND queries = $queries AND query_variant = $variant
      AND query_checkpoint = checkpoint AND list_contains($checkpoints, checkpoint)
    GROUP BY ALL),
best AS (
    SELECT *, row_number() OVER (
        PARTITION BY checkpoint, query_id ORDER BY score DESC, source, variant, sample_id) AS place
    FROM scored QUALIFY place <= $top),
wanted AS (SELECT DISTINCT query_id, source, variant, sample_id FROM best)
SELECT s.*, b.place FROM scored s JOIN wanted USING (query_id, source, variant, sample_id)
LEFT JOIN best b USING (checkpoint, query_id, source, variant, sample_id)
ORDER BY s.query_id, s.source, s.variant, s.sample_id, s.checkpoint"""
_TEXTS = """
SELECT source, sample_id, coalesce(prompt, text, messages, '') AS text, coalesce(response, completion) AS response
FROM samples WHERE list_contains($sources, source)"""


def explorer(results: Results, store: Store) -> dict[str, Any]:
    """Return the page's data on queries; lists by checkpoint are in order of epochs, with null for missing values."""
    recipe = results.recipe
    keys = {"sketcher": SKETCHER, "method": METHOD, "queries": recipe.queries.name, "variant": recipe.queries.variant}
    scores = store.sql(_SCORES, keys | {"checkpoints": recipe.checkpoints, "top": TOP})
    sources = [source.name for source in (recipe.queries, recipe.tuning, *recipe.pretraining)]
    text_rows = store.sql(_TEXTS, {"sources": sources})
    texts = {(source, sample_id): (text, response) for source, sample_id, text, response in text_rows.iter_rows()}
    tops = _TopRows(recipe.checkpoints, texts)
    rows = {key[0]: tops.of_query(part) for key, part in scores.group_by("query_id", maintain_order=True)}
    queries = [
        _query(str(key[0]), part, recipe.checkpoints, texts.get((recipe.queries.name, str(key[0])), ("", None)))
        | rows.get(key[0], {"rows": [], "top": [[] for _ in recipe.checkpoints]})
        for key, part in results.queries.group_by("query_id", maintain_order=True)
    ]
    return {
        "checkpoints": recipe.checkpoints,
        "against": f"{recipe.against} · {recipe.shown_as[recipe.against]}",
        "tuning": recipe.tuning.name,
        "colours": source_colours(results),
        "groups": tops.groups,
        "samples": tops.samples,
        "queries": queries,
    }


def cut(text: str | None, limit: int) -> str | None:
    """Cut the middle out of a text longer than `limit`: the end may hold the question."""
    if text is None or len(text) <= limit:
        return text
    start = limit * 2 // 3
    return f"{text[:start].rstrip()} […] {text[start - limit :].lstrip()}"


def short(value: float | None) -> float | None:
    """Round a number to the displayed digits; None if it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def _query(query_id: str, rows: pl.DataFrame, checkpoints: list[str], text: tuple[str, str | None]) -> dict[str, Any]:
    """Return a query's text, label, predictions and figures."""
    row_at = {row["checkpoint"]: row for row in rows.iter_rows(named=True)}

    def along(field: str) -> list[Any]:
        return [row_at[name][field] if name in row_at else None for name in checkpoints]

    return {
        "id": query_id,
        "text": cut(text[0], LONGEST_QUERY),
        "response": cut(text[1], LONGEST),
        "label": next((label for label in along("label") if label is not None), None),
        "prediction": along("prediction"),
        "correct": along("correct"),
        **{field: [short(value) for value in along(field)] for field in ("loss", "ft", "pt")},
        "winner": along("winner"),
    }


class _TopRows:
    """Collects the samples and groups of all queries, each once."""

    def __init__(self, checkpoints: list[str], texts: dict[tuple[str, str], tuple[str, str | None]]) -> None:
        self.groups: list[list[str]] = []
        self.samples: list[list[str | None]] = []
        self._checkpoints = {name: i for i, name in enumerate(checkpoints)}
        self._texts = texts
        self._group_at: dict[tuple[str, str], int] = {}
        self._sample_at: dict[tuple[str, str], int] = {}

    def of_query(self, scores: pl.DataFrame) -> dict[str, Any]:
        """Return a query's rows [sample, group, scores by checkpoint], and the top rows' indices by checkpoint."""
        rows: list[list[Any]] = []
        top: list[list[tuple[int, int]]] = [[] for _ in self._checkpoints]
        keys = ("source", "variant", "sample_id")
        for n, (key, part) in enumerate(scores.group_by(*keys, maintain_order=True)):
            source, variant, sample_id = (str(name) for name in key)
            along: list[float | None] = [None] * len(self._checkpoints)
            for name, score, place in part.select("checkpoint", "score", "place").iter_rows():
                along[self._checkpoints[name]] = short(score)
                if place is not None:
                    top[self._checkpoints[name]].append((place, n))
            rows.append([self._sample(source, sample_id), self._group(source, variant), along])
        return {"rows": rows, "top": [[n for _, n in sorted(places)] for places in top]}

    def _sample(self, source: str, sample_id: str) -> int:
        index = self._sample_at.setdefault((source, sample_id), len(self.samples))
        if index == len(self.samples):
            text, response = self._texts.get((source, sample_id), ("", None))
            self.samples.append([source, sample_id, cut(text, LONGEST), cut(response, LONGEST)])
        return index

    def _group(self, source: str, variant: str) -> int:
        index = self._group_at.setdefault((source, variant), len(self.groups))
        if index == len(self.groups):
            self.groups.append([source, variant])
        return index
