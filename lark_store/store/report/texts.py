"""The texts of a report: a prompt with its response, a text, or the messages of a chat."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lark_store.schema.chats import message_text
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from lark_store.schema.database import Database

Texts = dict[tuple[str, str], tuple[Any, str | None]]


def texts_of(db: Database, hits: pl.DataFrame, queries: str, ids: Sequence[str]) -> Texts:
    """Return the texts of hits and of queries by source and id: a text or [role, text] pairs, and a response."""
    by_source = dict(hits.group_by("source", maintain_order=True).agg("sample_id").iter_rows())
    by_source[queries] = [*by_source.get(queries, []), *ids]
    texts: Texts = {}
    for source, members in by_source.items():
        columns = ["source", "sample_id", "prompt", "response", "text", "completion", "messages"]
        condition = where(source=source, sample_id=sorted(set(members)))
        for row in db.vectors.read("samples", columns, condition).iter_rows(named=True):
            texts[source, row["sample_id"]] = _text(row)
    return texts


def _text(row: dict[str, Any]) -> tuple[Any, str | None]:
    if row["messages"] is not None:
        return [[str(message.get("role", "")), message_text(message)] for message in json.loads(row["messages"])], None
    text = row["prompt"] if row["prompt"] is not None else row["text"] or ""
    return text, row["response"] if row["response"] is not None else row["completion"]
