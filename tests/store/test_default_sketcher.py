"""A store's default sketcher: chosen at creation or later."""

from __future__ import annotations

import pytest
from helpers.program import lark
from helpers.stores import fill_store

from lark_store import Store
from lark_store.errors import NameUnknownError


@pytest.fixture
def by_adam(tmp_path, checkpoints, texts):
    """A store with the default sketcher `adam`."""
    with Store.create(tmp_path / "adam.store", sketcher="adam") as store:
        fill_store(store, checkpoints, texts)
        yield store


def test_default_sketcher_is_used_everywhere(by_adam):
    by_adam.ingest(["base"], ["finetune", "test"], ["chatml"])
    by_adam.ingest(["base"], ["songs"], ["chatml"])
    assert by_adam.sql("select distinct sketcher from ingest_runs")["sketcher"].to_list() == ["adam"]
    by_adam.attribute(["base"], queries="test")
    query = by_adam.sql("select sample_id from samples where source = 'test' order by all limit 1").item()
    hits = by_adam.top(query, checkpoint="base", k=3)
    named = by_adam.top(query, checkpoint="base", k=3, sketcher="adam")
    assert hits.score == named.score
    assert "adam" in hits.score
    assert hits.frame.equals(named.frame)
    assert by_adam.sql("select distinct sketcher from influence")["sketcher"].to_list() == ["adam"]
    by_sql = by_adam.sql("from top_influence(query := ?, checkpoint := 'base', k := 3)", [query])
    assert by_sql["sample_id"].to_list() == hits.frame["sample_id"].to_list()
    assert by_adam.metrics()["scored_by"].unique().to_list() == [hits.score]
    assert by_adam.ft_pt("base")["scored_by"].unique().to_list() == [hits.score]
    assert not by_adam.self_influence(checkpoints=["base"], k=3).is_empty()


def test_default_can_change_and_snapshots_keep_theirs(store):
    assert store.default_sketcher == "lark"
    store.snapshot_create("before")
    store.sketcher_default("small")
    assert store.default_sketcher == "small"
    assert store.sql("select name from sketchers where is_default").to_series().to_list() == ["small"]
    with Store.open(store.path, snapshot="before") as before:
        assert before.default_sketcher == "lark"
    with pytest.raises(NameUnknownError, match="no sketcher `smal`"):
        store.sketcher_default("smal")
    assert store.default_sketcher == "small"


def test_the_commands(tmp_path):
    path = tmp_path / "made.store"
    wrong = lark("init --sketcher adm", store=path)
    assert (wrong.code, path.exists()) == (1, False)
    assert "no built-in sketcher `adm`" in wrong.err
    assert "hint: did you mean `adam`?" in wrong.err
    assert lark("init --sketcher adam", store=path).err.strip().endswith("its default sketcher is `adam`")
    assert lark("sketcher default lark", store=path).err.strip() == "the default sketcher is `lark`"
    result = lark("sql", "select name, is_default from sketchers order by name", "-f", "json", store=path)
    assert result.rows == [{"name": "adam", "is_default": False}, {"name": "lark", "is_default": True}]
