"""The report's data per query: its text, its course over the epochs, and its top samples.

The data is part of the page, so it is compact: each text occurs once, and rows refer to samples and groups by index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lark_store.report.queries import LONGEST, LONGEST_QUERY, TopRows, cut, short
from lark_store.study.chart_style import source_colours
from lark_store.study.groups import SKETCHER

if TYPE_CHECKING:
    import polars as pl

    from lark_store.store import Store
    from lark_store.study.results import Results

METHOD = "cosine"
TOP = 5

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
    tops = TopRows(recipe.checkpoints, texts)
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
