"""A store of facts, each stated twice, with queries about them."""

from __future__ import annotations

import pytest

from helpers.stores import copy_store
from helpers.texts import write_jsonl
from lark_store import Store

PLACES = ["Rome", "Oslo", "Lima", "Cairo"]


def fact_rows(start, n):
    """Two statements each of facts, with the fact's key and its relation."""
    return [
        {"id": f"f{i}-{j}", "text": text, "fact": i, "relation": "capital" if i % 2 else "river"}
        for i in range(start, start + n)
        for j, text in enumerate((f"{PLACES[i % 4]} is seen in land {i}.", f"Land {i} has the old {PLACES[i % 4]}."))
    ]


@pytest.fixture(scope="module")
def facts_path(tmp_path_factory, checkpoints):
    """A store of 6 facts in 12 statements, 4 queries of them and one of none, sketched at both checkpoints."""
    root = tmp_path_factory.mktemp("facts")
    queries = [
        {"id": f"q{i}", "prompt": f"What is in land {i}?", "response": PLACES[i % 4], "fact": i, "relation": "river"}
        for i in (0, 1, 2, 3)
    ]
    queries.append({"id": "q9", "prompt": "What is in land 9?", "response": "Nothing", "fact": 9, "relation": "sea"})
    with Store.create(root / "lark.store") as store:
        for epoch, (name, path) in enumerate(checkpoints.items()):
            store.checkpoint_add(name, path, epoch=epoch, learning_rate=1e-3)
        store.source_add("finetune", write_jsonl(root / "finetune.jsonl", fact_rows(0, 6)), stage="finetune")
        store.source_add("test", write_jsonl(root / "test.jsonl", queries), stage="query")
        store.sketcher_add("small", k=1024)
        store.ingest(list(checkpoints), ["finetune", "test"], ["chatml"], sketcher="small")
    return root / "lark.store"


@pytest.fixture
def facts_store(facts_path, tmp_path):
    with Store.open(copy_store(facts_path, tmp_path / "lark.store")) as opened:
        yield opened


@pytest.fixture
def without_charts(monkeypatch):
    """Evaluations draw no charts."""
    monkeypatch.setattr("lark_store.charts.files.save", lambda *_: [])


HALF_SETS = {"checkpoint": "base", "half_sets": 6, "learning_rate": 1e-3}
