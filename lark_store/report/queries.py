"""The data of a page's picker of queries: compact, with each text once; rows refer to samples and groups by index.

The script `page.js` reads checkpoints, tuning, against, colours, groups, samples and queries: see
`lark_store.study.explorer`. A report of a store adds `series`, the names whose values are in each query's `phi`, and
`words`, the words of its labels. A chat's text is a list of [role, text].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import polars as pl

LONGEST = 1_500  # characters of a sample's text
LONGEST_QUERY = 4_000
DIGITS = 4
_FIRST, _LAST = 4, 8  # messages of a long chat
Text = str | list[list[str]]


def cut(text: str | None, limit: int) -> str | None:
    """Cut the middle out of a text longer than `limit`: the end may hold the question."""
    if text is None or len(text) <= limit:
        return text
    start = limit * 2 // 3
    return f"{text[:start].rstrip()} […] {text[start - limit :].lstrip()}"


def shortened(text: Text, limit: int) -> Text:
    """Return a text cut to `limit`; of a chat each message to its share, and of a long one the first and last."""
    if isinstance(text, str):
        return cut(text, limit) or ""
    left_out = len(text) - _FIRST - _LAST
    if left_out > 1:
        text = [*text[:_FIRST], ["", f"[… {left_out} messages …]"], *text[-_LAST:]]
    if sum(len(words) for _, words in text) <= limit:
        return text
    return [[role, cut(words, max(limit // len(text), 60)) or ""] for role, words in text]


def short(value: float | None) -> float | None:
    """Round a number to the displayed digits; None if it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


class TopRows:
    """Collects the samples and groups of all queries, each once."""

    def __init__(self, checkpoints: list[str], texts: Mapping[tuple[str, str], tuple[Text, str | None]]) -> None:
        self.groups: list[list[str]] = []
        self.samples: list[list[Any]] = []
        self._checkpoints = {name: i for i, name in enumerate(checkpoints)}
        self._texts = texts
        self._group_at: dict[tuple[str, str], int] = {}
        self._sample_at: dict[tuple[str, str], int] = {}

    def of_query(self, scores: pl.DataFrame) -> dict[str, Any]:
        """Return a query's rows [sample, group, scores by checkpoint], and the top rows' indices by checkpoint.

        Columns: source, variant, sample_id, checkpoint, score, place (or null), and for a fourth entry, the q-values by
        checkpoint, q_value.
        """
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
            row: list[Any] = [self._sample(source, sample_id), self._group(source, variant), along]
            if "q_value" in part.columns:
                q_values: list[float | None] = [None] * len(self._checkpoints)
                for name, q_value in part.select("checkpoint", "q_value").iter_rows():
                    q_values[self._checkpoints[name]] = short(q_value)
                row.append(q_values)
            rows.append(row)
        return {"rows": rows, "top": [[n for _, n in sorted(places)] for places in top]}

    def _sample(self, source: str, sample_id: str) -> int:
        index = self._sample_at.setdefault((source, sample_id), len(self.samples))
        if index == len(self.samples):
            text, response = self._texts.get((source, sample_id), ("", None))
            self.samples.append([source, sample_id, shortened(text, LONGEST), cut(response, LONGEST)])
        return index

    def _group(self, source: str, variant: str) -> int:
        index = self._group_at.setdefault((source, variant), len(self.groups))
        if index == len(self.groups):
            self.groups.append([source, variant])
        return index
