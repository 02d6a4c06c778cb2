"""Tied scores: ordered by groups and ids, independent of the order of writing."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.texts import write_jsonl

from lark_store import Store
from lark_store.stats.running_top_k import Tally

ALIKE = ["c_1", "a", "b", "a_1"]
ORDER = ["a", "a_1", "b", "c_1"]


@pytest.fixture(scope="module")
def path(tmp_path_factory, checkpoints):
    """Two sources of four samples with one text each, and a query."""
    root = tmp_path_factory.mktemp("ties")
    with Store.create(root / "lark.store") as store:
        store.checkpoint_add("base", checkpoints["base"], learning_rate=1e-3)
        for name, text in (("z_one", "a song about the sea"), ("one", "the night train to the old harbour")):
            rows = [{"id": item, "text": text} for item in (ALIKE if name == "one" else ALIKE[::-1])]
            store.source_add(name, write_jsonl(root / f"{name}.jsonl", rows), stage="pretrain")
        queries = [{"id": "q_1", "prompt": "a song about", "response": "the train"}]
        store.source_add("test", write_jsonl(root / "test.jsonl", queries), stage="query")
        store.sketcher_add("small", k=1024)
        store.ingest(["base"], ["z_one", "one", "test"], ["raw"], sketcher="small", batch_tokens=1)
        store.attribute(["base"], queries="test", sketcher="small")
    return root / "lark.store"


def by_source(frame):
    return {name[0]: rows["sample_id"].to_list() for name, rows in frame.group_by("source", maintain_order=True)}


@pytest.mark.parametrize("method", ["cosine", "dot", "bm25", "hybrid"])
@pytest.mark.parametrize("opponents", [False, True])
def test_tied_hits_are_ordered_by_id(path, method, opponents):
    with Store.open(path) as store:
        options = {"checkpoint": "base", "method": method, "opponents": opponents, "sketcher": "small"}
        hits = store.top("q_1", k=8, **options).frame
        assert by_source(hits) == dict.fromkeys(by_source(hits), ORDER)
        assert hits["score"].n_unique() == 2
        assert store.top("q_1", k=2, **options).frame["sample_id"].to_list() == ORDER[:2]


def test_stored_tied_hits_are_ordered_by_id(path):
    with Store.open(path) as store:
        rows = store.sql("select source, sample_id from influence order by source, rank")
        assert by_source(rows) == {"one": ORDER, "z_one": ORDER}
        assert store.sql("select distinct argmax from source_influence")["argmax"].to_list() == ["a"]
        longest = store.self_influence(checkpoints=["base"], k=8, sketcher="small")
        assert by_source(longest) == dict.fromkeys(by_source(longest), ORDER)
        alike = store.similar_text("q_1", k=8)
        assert by_source(alike) == dict.fromkeys(by_source(alike), ORDER)


def test_a_tally_orders_ties_by_code():
    tally = Tally(2, 4)
    tally.take(np.array([3, 1]), np.array([[0.5, 0.5], [0.1, 0.2]], np.float32))
    tally.take(np.array([2, 0]), np.array([[0.5, 0.25], [0.2, 0.3]], np.float32))
    result = tally.result()
    assert result.top_codes.tolist() == [[1, 2, 3, 0], [0, 1, 2, 3]]
    assert result.argmax.tolist() == [1, 0]
