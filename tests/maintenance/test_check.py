"""`db check`: an intact store has no finding; each damage has the right one."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import polars as pl
import pytest
from helpers.checkpoints import save_checkpoint
from helpers.corruption import (
    BREAKS,
    LOSSES,
    ROW,
    add_orphan_file,
    change_catalog,
    change_sketch,
    change_vector,
    check_findings,
    damage_cases,
    drop_folder,
    duplicate_rows,
    sketch_table_name,
)
from helpers.program import add_source_and_kill_its_ingest, lark
from helpers.stores import sketch_table, store_label
from helpers.texts import qa_rows, text_rows, write_jsonl

from lark_store import Store
from lark_store.errors import InputError, StoreBusyError
from lark_store.maintenance.check import frozen_store
from lark_store.maintenance.check.rows import _changed
from lark_store.schema.locks import maintenance, working
from lark_store.schema.table_schemas import INFLUENCE, SOURCE_INFLUENCE
from lark_store.schema.vectors import where

COLUMNS = ["severity", "what", "where", "n", "detail", "repair"]


@pytest.mark.parametrize(("break_it", "expected"), damage_cases(BREAKS | LOSSES))
def test_check_reports_each_damage(scored_copy, break_it, expected):
    break_it(scored_copy)
    assert set(check_findings(scored_copy)) == expected


def test_findings_name_the_place_and_the_repair(scored_copy):
    change_sketch(scored_copy, "q1", grad_norm=0.0)
    report = scored_copy.db_check()
    assert report.columns == COLUMNS
    (row,) = report.rows(named=True)
    assert row["where"] == sketch_table_name(scored_copy)
    assert row["detail"] == "the gradient's norm is not a positive number: `base/finetune/chatml/q1`"
    assert row["repair"] == "delete the rows; `ingest` recomputes them"


# --- intact stores -------------------------------------------------------------------------------------------------


def test_fully_used_store_is_clean(scored_copy, tmp_path):
    store = scored_copy
    assert check_findings(store, deep=8) == []
    store.snapshot_create("a")
    store.sample_remove("songs", ["sea-1"])
    store.source_remove("medical")
    assert check_findings(store) == []
    store.snapshot_create("b")
    changed = [{**qa_rows(1)[0], "answer": "changed"}, *qa_rows(6)[1:]]
    store.source_add("finetune", write_jsonl(tmp_path / "f.jsonl", changed), stage="finetune", replace=True)
    assert check_findings(store) == []
    store.ingest(["base", "epoch-1"], ["finetune"], ["chatml"], sketcher="small")
    store.attribute(["base", "epoch-1"], queries="test", sketcher="small", hits=3)
    for method in ("bm25", "hybrid", "dot"):
        store.attribute(["base"], queries="test", sketcher="small", method=method)
    store.attribute(["base", "epoch-1"], queries="test", sketcher="small", method="tracin")
    store.index_build("small")
    assert check_findings(store) == []
    store.db_optimize(keep_versions_days=0)
    store.snapshot_remove("a")
    store.checkpoint_remove("epoch-1")
    assert check_findings(store, deep=4) == []


def test_failed_samples_imports_and_a_fresh_store_are_clean(store, tmp_path):
    assert check_findings(store) == []
    odd = [{"id": "long", "prompt": "why?", "response": "because " * 200}, {"id": "ok", "prompt": "a", "response": "b"}]
    store.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", odd), stage="finetune")
    store.variant_add("short", template="chatml", max_length=64)
    store.ingest(["base"], ["odd"], ["short"], sketcher="small")
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(5, 2)).astype(np.float16))
    (tmp_path / "ids.txt").write_text("".join(f"{row['id']}\n" for row in text_rows(5)))
    store.sketcher_import(
        "x", tmp_path / "v.npy", checkpoint="base", source="songs", variant="raw", ids=tmp_path / "ids.txt"
    )
    assert check_findings(store, deep=2) == []


def test_running_ingest_is_not_a_finding(store):
    seen = []

    def look(progress):
        if progress.total:
            with Store.open(store.path) as other:
                seen.append(check_findings(other))

    assert store.ingest(["base"], ["songs", "finetune"], ["chatml"], sketcher="small", on_progress=look).n_failed == 0
    assert seen
    assert all(findings == [] for findings in seen)
    assert check_findings(store) == []


def test_running_scoring_is_not_a_finding(scored_copy):
    seen = []

    def look(_):
        with Store.open(scored_copy.path) as other:
            seen.append(check_findings(other))

    scored_copy.attribute(["base"], queries="test", sketcher="small", hits=2, on_progress=look)
    assert seen
    assert all(findings == [] for findings in seen)


BESIDE = """
import sys
from lark_store import Store
with Store.open(sys.argv[1]) as store:
    store.ingest(["base", "epoch-1"], ["many"], ["raw", "chatml"], sketcher="small", batch_tokens=256)
    for hits in (5, 6):
        store.attribute(["base", "epoch-1"], queries="test", sketcher="small", hits=hits)
"""


def test_checks_beside_ingest_and_scoring_find_nothing(scored_copy, tmp_path):
    texts = write_jsonl(tmp_path / "many.jsonl", text_rows(80, "many"))
    scored_copy.source_add("many", texts, stage="pretrain")
    before = sketch_table(scored_copy).version
    seen, versions = [], set()
    command = [sys.executable, "-c", BESIDE, store_label(scored_copy.path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as writer:
        while writer.poll() is None:
            seen += check_findings(scored_copy)
            versions.add(sketch_table(scored_copy).version - before)
        assert writer.returncode == 0, writer.stderr.read()
    assert seen == []
    assert len(versions) > 1  # it was looked at while rows came in; how often depends on the machine
    assert check_findings(scored_copy) == []


def test_killed_ingest_leaves_notes_and_the_next_cleans_up(store, tmp_path):
    add_source_and_kill_its_ingest(store, tmp_path)
    after = {(severity, kind) for severity, kind, _ in check_findings(store)}
    assert {("note", "stale run"), ("note", "lock")} <= after
    assert after <= {("note", "stale run"), ("note", "lock"), ("warning", "index"), ("warning", "unverified file")}
    units = store.ingest(["base"], ["many"], ["raw"], sketcher="small").units
    assert units["n_existing"].item() >= 64
    assert check_findings(store) == []


def test_keys_are_compared_in_bounded_portions(scored_copy, monkeypatch):
    duplicate_rows(scored_copy, sketch_table_name(scored_copy), ROW)
    monkeypatch.setattr(frozen_store, "_HASHES_PER_PASS", 7)
    assert ("error", "duplicate key", 1) in check_findings(scored_copy)


# --- computed again ------------------------------------------------------------------------------------------------


def test_deep_check_recomputes_sketches(scored_copy):
    change_vector(scored_copy, "q1", lambda v: v[::-1])
    assert {kind for _, kind, _ in check_findings(scored_copy)} == {"code"}
    report = scored_copy.db_check(deep=100).filter(what="sketch")
    assert report["where"].to_list() == ["small: base/finetune/chatml/q1"]
    assert report["severity"].item() == "error"


def test_changed_checkpoint_files_are_a_note(store, tmp_path):
    path = save_checkpoint(tmp_path / "moving")
    store.checkpoint_add("moving", path)
    store.ingest(["moving"], ["finetune"], ["raw"], sketcher="small")
    save_checkpoint(path, seed=9)
    assert check_findings(store) == []
    (row,) = store.db_check(deep=5).rows(named=True)
    assert (row["severity"], row["what"], row["where"]) == ("note", "checkpoint files", "checkpoint moving")
    assert "changed since it was added; its sketches were not recomputed" in row["detail"]
    with pytest.raises(InputError, match="`deep` must not be negative, not -1"):
        store.db_check(deep=-1)


# --- unreadable parts ----------------------------------------------------------------------------------------------


@pytest.mark.folder
def test_truncated_file_is_reported_without_conclusions(scored_copy):
    for path in (scored_copy.path / "vectors" / f"{sketch_table_name(scored_copy)}.lance" / "data").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert check_findings(scored_copy) == [("error", "unreadable", 1)]


@pytest.mark.folder
def test_unopenable_table_is_reported(scored_copy):
    for path in (scored_copy.path / "vectors" / "source_influence.lance" / "_versions").glob("*.manifest"):
        path.write_bytes(b"nothing")
    assert check_findings(scored_copy) == [("error", "unreadable", 1)]


@pytest.mark.folder
@pytest.mark.parametrize("name", ["influence", "samples"])
def test_query_of_a_missing_table_hints_the_check(scored_copy, name):
    drop_folder(scored_copy, name)
    result = lark(f"sql 'SELECT count(*) FROM {name}'", store=scored_copy.path)
    assert result.code == 1
    assert result.err.startswith(
        f"error: the table `{name}` of the store is missing\n\nhint: `lark-store db check` lists"
    )


@pytest.mark.folder
def test_damaged_catalog_is_not_repaired(scored_copy):
    change_catalog(scored_copy, "PRAGMA foreign_keys = OFF", "UPDATE ingest_run SET source_id = 77 WHERE id = 1")
    report = scored_copy.db_check()
    assert ("error", "catalog") in report.select("severity", "what").rows()
    assert report["repair"].null_count() == len(report)
    before = sketch_table(scored_copy).count_rows()
    assert scored_copy.db_repair().mended.is_empty()
    assert sketch_table(scored_copy).count_rows() == before


def test_check_waits_for_no_lock(scored_copy):
    location = scored_copy._db.location
    with maintenance(location), pytest.raises(StoreBusyError, match="another process is removing"):
        scored_copy.db_check()
    add_orphan_file(scored_copy, "samples")
    with working(location, "some", "ingesting", {"source": ["songs"]}):
        assert check_findings(scored_copy) == []  # it may be that work's file
    assert check_findings(scored_copy) == [("warning", "unverified file", 1)]


# --- the command line ----------------------------------------------------------------------------------------------


def test_command_prints_findings_and_exits_with_1_on_errors(scored_copy):
    run = partial(lark, store=scored_copy.path)
    clean = run("db check -f json")
    assert (clean.code, clean.rows, clean.err.splitlines()[-1]) == (0, [], "no problems found")
    add_orphan_file(scored_copy, "samples")
    warned = run("db check -f json")
    assert (warned.code, warned.err.splitlines()[-1]) == (0, "1 warnings")
    change_sketch(scored_copy, "q1", grad_norm=0.0)
    wrong = run("db check --deep 100 -f json")  # every row, so the changed one is drawn
    assert wrong.code == 1
    assert wrong.columns("severity", "what") == [("error", "norm"), ("error", "sketch"), ("warning", "unverified file")]
    assert wrong.err.splitlines()[-1] == "2 errors, 1 warnings"


@pytest.mark.parametrize("difference", [-1, 1])
def test_scores_with_a_smaller_or_larger_checksum_are_changed(scored, difference):
    of_run = where(score_run=1)
    tops = scored._db.vectors.read("influence", INFLUENCE.names, of_run)
    sums = scored._db.vectors.read("source_influence", SOURCE_INFLUENCE.names, of_run)
    assert list(_changed(tops, sums)) == []
    other = sums.with_columns(pl.col("checksum") + difference)
    assert list(_changed(tops, other)) == [f"the scores of {len(sums)} queries changed after they were written"]
