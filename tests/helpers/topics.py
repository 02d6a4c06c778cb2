"""A store whose pretraining samples have a topic and a format in their metadata."""

from __future__ import annotations

from helpers.stores import copy_store
from helpers.texts import write_jsonl
from lark_store import Store

TOPICS, FORMATS = ("sea", "kidney", "law"), ("forum", "book")


def topic_rows(n: int) -> list[dict[str, object]]:
    """Texts with a topic (every seventh has none), a format, and a page number."""
    return [
        {
            "id": f"t{i}",
            "text": f"Text {i} about the {TOPICS[i % 3]} and a number of other things, {i * i}.",
            "topic": None if i % 7 == 6 else TOPICS[i % 3],
            "format": FORMATS[i % 2],
            "page": i // 4,
        }
        for i in range(n)
    ]


def topic_store(scored_path, root):
    """Copy the scored store, and add the source `web` at both checkpoints, as `raw`; returns its path."""
    path = copy_store(scored_path, root / "lark.store")
    with Store.open(path) as store:
        store.source_add("web", write_jsonl(root / "web.jsonl", topic_rows(24)), stage="pretrain", domain="web")
        store.ingest(["base", "epoch-1"], ["web"], ["raw"], sketcher="small")
        store.attribute(["base", "epoch-1"], queries="test", sketcher="small")
    return path
