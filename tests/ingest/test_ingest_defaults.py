"""An ingest without names takes every checkpoint, every source, and each source in its usual variants."""

from __future__ import annotations

import logging

import pytest
from helpers.program import lark

from lark_store import Store
from lark_store.errors import InputError

KEYS = ["checkpoint", "source", "variant"]
SMALL = {"sketcher": "small"}


def units(report):
    return report.units.select(KEYS).rows()


def test_a_new_store_is_ingested_whole_as_chatml(store, caplog):
    caplog.set_level(logging.INFO, "lark_store")
    planned, report = store.plan(**SMALL), store.ingest(**SMALL)
    sources = ("finetune", "medical", "songs", "test")
    assert units(report) == [(at, source, "chatml") for at in ("base", "epoch-1") for source in sources]
    assert units(planned) == units(report)
    assert report.n_failed == 0
    assert caplog.messages[:2] == [
        "every checkpoint: `base` and `epoch-1`",
        "every source: `finetune` as `chatml`; `medical` as `chatml`; `songs` as `chatml`; `test` as `chatml`",
    ]
    assert store.ingest(**SMALL).units["n_sketched"].sum() == 0


def test_a_source_keeps_the_variants_it_has(store):
    store.ingest(["base"], ["medical"], ["raw", "chatml"], **SMALL)
    store.ingest(["base"], ["songs"], ["raw"], **SMALL)
    report = store.ingest("epoch-1", **SMALL)
    assert units(report) == [
        ("epoch-1", "finetune", "chatml"),
        ("epoch-1", "medical", "raw"),
        ("epoch-1", "medical", "chatml"),
        ("epoch-1", "songs", "raw"),
        ("epoch-1", "test", "chatml"),
    ]
    assert units(store.plan("epoch-1", "songs", **SMALL)) == [("epoch-1", "songs", "raw")]
    assert units(store.plan("epoch-1", "songs", "chatml", **SMALL)) == [("epoch-1", "songs", "chatml")]


def test_variants_of_the_same_sketcher_come_first(store):
    store.ingest(["base"], ["songs"], ["chatml"], **SMALL)
    store.sketcher_add("other", k=256)
    assert units(store.plan("base", "songs", sketcher="other")) == [("base", "songs", "chatml")]
    store.ingest(["base"], ["songs"], ["raw"], sketcher="other")
    assert units(store.plan("epoch-1", "songs", sketcher="other")) == [("epoch-1", "songs", "raw")]


def test_a_source_of_candidates_is_not_taken_whole_unless_named(store):
    store.ingest(["base"], ["finetune"], ["raw"], candidates=1, **SMALL)
    for method in (store.plan, store.ingest):
        with pytest.raises(InputError, match=r"^source `finetune` has sketches of candidates only \(bm25 for `test`\)"):
            method("epoch-1", **SMALL)
    assert units(store.plan("epoch-1", "finetune", candidates=1, **SMALL)) == [("epoch-1", "finetune", "raw")]
    assert units(store.plan("epoch-1", "finetune", **SMALL)) == [("epoch-1", "finetune", "raw")]
    store.ingest(["base"], ["finetune"], ["raw"], **SMALL)
    assert len(units(store.plan("epoch-1", **SMALL))) == 4


def test_an_empty_store_has_nothing_to_take(tmp_path, checkpoints):
    with Store.create(tmp_path / "empty") as store:
        with pytest.raises(
            InputError, match=r"^the store has no checkpoint\n\nhint: add one with `store.checkpoint_add"
        ):
            store.ingest()
        store.checkpoint_add("base", checkpoints["base"])
        with pytest.raises(InputError, match=r"^the store has no source\n"):
            store.plan()


def test_the_commands_say_what_they_chose(store):
    result = lark("ingest --sketcher small -c base -f json", store=store.path)
    assert (result.code, len(result.rows)) == (0, 4)
    assert result.err.startswith("every source: `finetune` as `chatml`; `medical` as `chatml`; ")
    assert "every checkpoint" not in result.err
    dry = lark("ingest --sketcher small --dry-run -f json", store=store.path)
    assert [unit["n_existing"] for unit in dry.rows["units"]] == [6, 5, 5, 4, 0, 0, 0, 0]
    assert dry.err.startswith("every checkpoint: `base` and `epoch-1`\nevery source: ")
    named = lark("plan --sketcher small -c base -s songs -v raw", store=store.path)
    assert "every" not in named.err
    assert "usual variants: `songs` as `chatml`" in lark("plan --sketcher small -s songs", store=store.path).err
