"""`db check`: a store that is as it should be has no finding; one that was broken behind its back has the right one."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from conftest import named, qa_rows, save_checkpoint, text_rows, write_jsonl
from test_cli import lark
from test_verify import rewrite, sketches

from lark_store import Store
from lark_store.errors import InputError, StoreBusyError
from lark_store.schema.locks import maintenance, working
from lark_store.schema.vectors import FAILURES, where
from lark_store.upkeep import moment

COLUMNS = ["severity", "what", "where", "n", "detail", "repair"]


def found(store, **options):
    return store.db_check(**options).select("severity", "what", "n").rows()


def catalog(store, *statements):
    """Change the catalog behind the store's back."""
    if store._db.engine.dialect.name == "postgresql":
        with store._db.location.catalog.transaction() as server:
            for statement in statements:
                server.exec_driver_sql(statement)
        return
    with closing(sqlite3.connect(store.path / "catalog.sqlite", isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def table(store, name):
    return store._db.vectors.table(name)


def take_rows(store, name, condition):
    return table(store, name).to_lance().to_table(filter=condition)


def replace_rows(store, name, condition, **columns):
    """Write rows anew with other values, and keep the indices as they were kept."""
    rows = take_rows(store, name, condition).to_pylist()
    schema = table(store, name).schema
    table(store, name).delete(condition)
    table(store, name).add(pa.Table.from_pylist([row | columns for row in rows], schema=schema))
    store._db.vectors.refresh_indices(table(store, name))


def change(store, sample, **columns):
    rewrite(store, sample, lambda _: columns)
    store._db.vectors.refresh_indices(sketches(store))


def change_vector(store, sample, make):
    rewrite(store, sample, lambda row: {"vector": make(row["vector"])})
    store._db.vectors.refresh_indices(sketches(store))


def twice(store, name, condition, n=1):
    some = take_rows(store, name, condition)
    for _ in range(n):
        table(store, name).add(some)
    store._db.vectors.refresh_indices(table(store, name))


def delete(store, name, condition):
    table(store, name).delete(condition)


def drop_folder(store, name):
    shutil.rmtree(store.path / "vectors" / f"{name}.lance")


def drop_file(store, name, pattern):
    next((store.path / "vectors" / f"{name}.lance").glob(pattern)).unlink()


def drop_files(store, name, pattern):
    for path in (store.path / "vectors" / f"{name}.lance").glob(pattern):
        path.unlink()


def orphan(store, name):
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"half a file")
        file.flush()
        store._db.vectors.files.upload_file(file.name, f"{name}.lance/data/0101orphan.lance")


def other_table(store):
    """A row that says it is of a run whose sketches are in another table."""
    store.sketcher_add("other", k=256)
    run = store.ingest(["base"], ["finetune"], ["raw"], sketcher="other").units["run"].item()
    (name,) = [
        n for n in store._db.vectors.sketch_tables() if table(store, n).schema.field("vector").type.list_size > 256
    ]
    replace_rows(store, name, "row_key = 'base/finetune/chatml/q1'", ingest_run=run)


def small(store):
    return sketches(store).name


def stop_in_the_middle(store):
    catalog(store, "UPDATE ingest_run SET status = 'running' WHERE id = 1", "UPDATE score_run SET status = 'failed'")


def cut_snapshot(store):
    store.snapshot_create("half")
    (store.path / "snapshots" / "half.json").unlink()


def lose_a_version(store):
    store.snapshot_create("paper")
    table(store, "samples").to_lance().tags.delete("lark-snapshot-paper")
    store.sample_remove("songs", ["sea-1"])
    store.attribute(["base", "epoch-1"], queries="test", sketcher="small")
    store.db_optimize(keep_versions_days=0)


def leave_locks(store):
    locks = store.path / "locks"
    locks.mkdir(exist_ok=True)
    (locks / "ingest-dead.json").write_text(json.dumps({"doing": "ingesting", "touches": None}))
    (locks / "score-0123.lock").touch()


def new_codes(store):
    name = small(store)
    rewrite(store, "q2", lambda row: {"code": [255 - byte for byte in row["code"]]})
    store._db.vectors.refresh_indices(table(store, name))


ROW = "row_key = 'base/finetune/chatml/q1'"
OTHER = {"source": "songs", "sample_id": "sea-1"}
FAILURE = {
    "ingest_run": 999,
    "checkpoint": "base",
    "source": "songs",
    "variant": "raw",
    "sample_id": "a",
    "reason": "b",
}
# How a store is broken; what the check finds then; and whether `db repair` can mend all of it.
BREAKS = {
    "a wrong count": (
        lambda s: catalog(s, "UPDATE ingest_run SET n_sketched = n_sketched + 2 WHERE id = 1"),
        {("error", "count", 2)},
    ),
    "rows that were lost": (
        lambda s: delete(s, small(s), ROW),
        {("error", "count", 1), ("error", "scores", 1)},
    ),
    "rows of no run": (
        lambda s: change(s, "q1", ingest_run=999),
        {("error", "orphan rows", 1), ("error", "count", 1), ("error", "scores", 1)},
    ),
    "a removal that was cut off": (
        lambda s: catalog(s, "UPDATE ingest_run SET status = 'superseded', n_sketched = 0 WHERE id = 5"),
        {("warning", "unfinished removal", 5), ("error", "scores", 1)},
    ),
    "a row of another table's run": (
        other_table,
        {("error", "fingerprint", 1), ("error", "count", 1), ("error", "scores", 1)},
    ),
    "a row that names another source": (lambda s: change(s, "q1", source="songs"), {("error", "names", 1)}),
    "a row that names no checkpoint": (lambda s: change(s, "q1", checkpoint="bass"), {("error", "names", 1)}),
    "a wrong key": (lambda s: change(s, "q1", row_key="q1"), {("error", "row key", 1)}),
    "a gradient without length": (lambda s: change(s, "q1", grad_norm=0.0), {("error", "norm", 1)}),
    "a gradient of infinite length": (lambda s: change(s, "q1", grad_norm=math.inf), {("error", "norm", 1)}),
    "a loss that is no number": (lambda s: change(s, "q1", loss=math.nan), {("error", "nan", 1)}),
    "a vector of zeros": (
        lambda s: change_vector(s, "q1", lambda v: [0.0] * len(v)),
        {("error", "norm", 1), ("warning", "code", 1)},
    ),
    "a vector that is too long": (
        lambda s: change_vector(s, "q1", lambda v: [2 * x for x in v]),
        {("error", "norm", 1)},
    ),
    "a vector with an infinite number": (
        lambda s: change_vector(s, "q1", lambda v: [math.inf, *v[1:]]),
        {("error", "nan", 1)},
    ),
    "another's code": (new_codes, {("warning", "code", 1)}),
    "a sketch that is there twice": (
        lambda s: twice(s, small(s), ROW, 2),
        {("error", "duplicate key", 2), ("error", "count", 2), ("error", "scores", 1)},
    ),
    "a sketch that two runs made": (
        lambda s: (twice(s, small(s), ROW), catalog(s, "UPDATE ingest_run SET n_sketched = 7 WHERE id = 1")),
        {("error", "duplicate key", 1), ("error", "scores", 1)},
    ),
    "a sample that is gone": (
        lambda s: delete(s, "samples", where(**OTHER)),
        {("error", "sample", 4), ("error", "scores", 1)},
    ),
    "a sample that is there twice": (
        lambda s: twice(s, "samples", where(**OTHER)),
        {("error", "duplicate key", 1)},
    ),
    "failures of no run": (
        lambda s: table(s, "failures").add(pa.Table.from_pylist([FAILURE], schema=FAILURES)),
        {("warning", "orphan rows", 1)},
    ),
    "a hit that was lost": (
        lambda s: delete(s, "influence", "score_run = 1 AND rank = 2 AND query_id = 'q101'"),
        {("error", "scores", 1)},
    ),
    "a maximum that is another": (
        lambda s: replace_rows(s, "source_influence", "score_run = 1 AND query_id = 'q101'", max=0.5),
        {("error", "scores", 1)},
    ),
    "a query whose sums were lost": (
        lambda s: delete(s, "source_influence", "score_run = 2 AND query_id = 'q101'"),
        {("error", "scores", 1)},
    ),
    "scores that are there twice": (lambda s: twice(s, "source_influence", "score_run = 3"), {("error", "scores", 1)}),
    "scores of other names": (
        lambda s: replace_rows(s, "influence", "score_run = 3", source="songs"),
        {("error", "scores", 2)},
    ),
    "scores that are no numbers": (
        lambda s: replace_rows(s, "source_influence", "score_run = 3", mean=math.nan),
        {("error", "scores", 1)},
    ),
    "a score run that counts other samples": (
        lambda s: catalog(s, "UPDATE score_run SET n_samples = 4 WHERE id = 1"),
        {("error", "scores", 3)},
    ),
    "scores of no run": (
        lambda s: replace_rows(s, "influence", "score_run = 3", score_run=999),
        {("error", "orphan rows", 20), ("error", "scores", 1)},
    ),
    "scores of a superseded run": (
        lambda s: catalog(s, "UPDATE score_run SET status = 'superseded' WHERE id = 1"),
        {("warning", "orphan rows", 24), ("warning", "orphan rows", 4)},
    ),
    "runs that were cut off": (
        stop_in_the_middle,
        {("note", "stale run", 6), ("note", "stale run", 28), ("note", "stale run", 24)},
    ),
    "a table of failures that is gone": (lambda s: drop_folder(s, "failures"), {("error", "missing table", 1)}),
    "a table of scores that is gone": (lambda s: drop_folder(s, "influence"), {("error", "missing table", 1)}),
    "a table of sketches that is gone": (
        lambda s: drop_folder(s, small(s)),
        {
            ("error", "missing table", 6),
            ("error", "missing table", 4),
            ("error", "missing table", 5),
            ("error", "scores", 2),
        },
    ),
    "an index file that is gone": (
        lambda s: drop_files(s, "samples", "_indices/*/*"),
        {("error", "index", 1)},
    ),
    "an index that is gone": (
        lambda s: table(s, "samples").drop_index("source_idx"),
        {("warning", "index", 1)},
    ),
    "rows that no index has": (
        lambda s: (
            table(s, "influence").delete("score_run = 999"),
            table(s, "influence").add(take_rows(s, "influence", "score_run = 1 AND rank = 1 AND query_id = 'q100'")),
            table(s, "influence").delete("score_run = 1"),
            catalog(s, "UPDATE score_run SET status = 'superseded' WHERE id = 1"),
            table(s, "influence").add(take_rows(s, "influence", "score_run = 2 AND rank = 1")),
        ),
        {("warning", "index", 1), ("warning", "orphan rows", 4), ("error", "scores", 1)},
    ),
    "a file that no version has": (lambda s: orphan(s, "samples"), {("warning", "unverified file", 1)}),
    "a snapshot that was cut off": (cut_snapshot, {("note", "snapshot", 1)}),
    "what killed processes left": (leave_locks, {("note", "lock", 2)}),
}
# What can't be made again.
LOSSES = {
    "a text that changed": (
        lambda s: replace_rows(s, "samples", where(**OTHER), text="another"),
        {("error", "content", 1)},
    ),
    "a sample that is there twice with two texts": (
        lambda s: (twice(s, "samples", where(**OTHER)), replace_one(s)),
        {("error", "duplicate key", 1), ("error", "content", 1)},
    ),
    "samples of a source that is not in the catalog": (
        lambda s: (
            replace_rows(s, "samples", "source = 'songs' AND sample_id = 'sea-1'", source="sonnets"),
            table(s, small(s)).delete("sample_id = 'sea-1'"),
            s.db_repair(),
        ),
        {("warning", "unknown source", 1)},
    ),
    "the samples' table is gone": (lambda s: drop_folder(s, "samples"), {("error", "missing table", 1)}),
    "a data file that is gone": (
        lambda s: drop_file(s, "samples", "data/*.lance"),
        {("error", "missing file", 1), ("error", "unreadable", 1)},
    ),
    "a version that a snapshot needs": (lose_a_version, {("error", "missing version", 1)}),
    "a snapshot's catalog": (
        lambda s: (s.snapshot_create("paper"), (s.path / "snapshots" / "paper.sqlite").unlink()),
        {("error", "snapshot", 1)},
    ),
    "a checkpoint's folder": (
        lambda s: catalog(s, "UPDATE checkpoint SET path = '/nowhere/base' WHERE id = 1"),
        {("note", "checkpoint files", 1)},
    ),
}


def replace_one(store):
    """Change the text of one of two samples of the same name."""
    row = take_rows(store, "samples", where(**OTHER)).to_pylist()[0]
    delete(store, "samples", where(**OTHER))
    rows = [row, row | {"text": "another"}]
    table(store, "samples").add(pa.Table.from_pylist(rows, schema=table(store, "samples").schema))
    store._db.vectors.refresh_indices(table(store, "samples"))


IN_A_FOLDER = (
    *("the samples' table is gone", "a data file that is gone", "what killed processes left", "a snapshot's catalog"),
    *("a version that a snapshot needs", "a table of failures that is gone", "a table of scores that is gone"),
    *("a table of sketches that is gone", "an index file that is gone", "a snapshot that was cut off"),
)


def cases(broken):
    """Return what is broken and the findings, as parameters of a test."""
    return [
        pytest.param(*case, id=name, marks=[pytest.mark.folder] if name in IN_A_FOLDER else [])
        for name, case in broken.items()
    ]


@pytest.mark.parametrize(("break_it", "expected"), cases(BREAKS | LOSSES))
def test_what_was_broken_is_found_by_name(scored_copy, break_it, expected):
    break_it(scored_copy)
    assert set(found(scored_copy)) == expected


def test_each_finding_says_where_and_what_repair_would_do(scored_copy):
    change(scored_copy, "q1", grad_norm=0.0)
    report = scored_copy.db_check()
    assert report.columns == COLUMNS
    (row,) = report.rows(named=True)
    assert row["where"] == small(scored_copy)
    assert row["detail"] == "the gradient's norm is not a positive number: `base/finetune/chatml/q1`"
    assert row["repair"] == "delete the rows; `ingest` makes them again"


# --- a store that is as it should be -------------------------------------------------------------------------------


def test_a_store_that_was_used_in_every_way_is_clean(scored_copy, tmp_path):
    store = scored_copy
    assert found(store, deep=8) == []
    store.snapshot_create("a")
    store.sample_remove("songs", ["sea-1"])
    store.source_remove("medical")
    assert found(store) == []
    store.snapshot_create("b")
    changed = [{**qa_rows(1)[0], "answer": "changed"}, *qa_rows(6)[1:]]
    store.source_add("finetune", write_jsonl(tmp_path / "f.jsonl", changed), stage="finetune", replace=True)
    assert found(store) == []
    store.ingest(["base", "epoch-1"], ["finetune"], ["chatml"], sketcher="small")
    store.attribute(["base", "epoch-1"], queries="test", sketcher="small", hits=3)
    for method in ("bm25", "hybrid", "dot"):
        store.attribute(["base"], queries="test", sketcher="small", method=method)
    store.attribute(["base", "epoch-1"], queries="test", sketcher="small", method="tracin")
    store.index_build("small")
    assert found(store) == []
    store.db_optimize(keep_versions_days=0)
    store.snapshot_remove("a")
    store.checkpoint_remove("epoch-1")
    assert found(store, deep=4) == []


def test_failed_samples_imports_and_a_fresh_store_are_clean(store, tmp_path):
    assert found(store) == []
    odd = [{"id": "long", "prompt": "why?", "response": "because " * 200}, {"id": "ok", "prompt": "a", "response": "b"}]
    store.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", odd), stage="finetune")
    store.variant_add("short", template="chatml", max_length=64)
    store.ingest(["base"], ["odd"], ["short"], sketcher="small")
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(5, 2)).astype(np.float16))
    (tmp_path / "ids.txt").write_text("".join(f"{row['id']}\n" for row in text_rows(5)))
    store.sketcher_import(
        "x", tmp_path / "v.npy", checkpoint="base", source="songs", variant="raw", ids=tmp_path / "ids.txt"
    )
    assert found(store, deep=2) == []


def test_a_running_ingest_is_no_finding_and_is_not_disturbed(store):
    seen = []

    def look(progress):
        if progress.total:
            with Store.open(store.path) as other:
                seen.append(found(other))

    assert store.ingest(["base"], ["songs", "finetune"], ["chatml"], sketcher="small", on_progress=look).n_failed == 0
    assert seen
    assert all(findings == [] for findings in seen)
    assert found(store) == []


def test_scores_that_are_being_made_are_no_finding(scored_copy):
    seen = []

    def look(_):
        with Store.open(scored_copy.path) as other:
            seen.append(found(other))

    scored_copy.attribute(["base"], queries="test", sketcher="small", hits=2, on_progress=look)
    assert seen
    assert all(findings == [] for findings in seen)


BESIDE = """
import sys
from lark_store import Store
with Store.open(sys.argv[1]) as store:
    store.ingest(["base", "epoch-1"], ["many"], ["raw", "chatml"], sketcher="small", batch_tokens=256)
    for hits in (5, 6, 7):
        store.attribute(["base", "epoch-1"], queries="test", sketcher="small", hits=hits)
"""


def test_checks_beside_another_process_that_ingests_and_scores_find_nothing(scored_copy, tmp_path):
    texts = write_jsonl(tmp_path / "many.jsonl", text_rows(200, "many"))
    scored_copy.source_add("many", texts, stage="pretrain")
    before = sketches(scored_copy).version
    seen, versions = [], set()
    command = [sys.executable, "-c", BESIDE, named(scored_copy.path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as writer:
        while writer.poll() is None:
            seen += found(scored_copy)
            versions.add(sketches(scored_copy).version - before)
        assert writer.returncode == 0, writer.stderr.read()
    assert seen == []
    assert len(versions) > 1  # it was looked at while rows came in; how often depends on the machine
    assert found(scored_copy) == []


KILLED = """
import os, signal, sys
from lark_store import Store
def stop(progress):
    if progress.done >= 70:
        os.kill(os.getpid(), signal.SIGKILL)
with Store.open(sys.argv[1]) as store:
    store.ingest(["base"], ["many"], ["raw"], sketcher="small", batch_tokens=128, on_progress=stop)
"""


def test_a_killed_ingest_leaves_notes_and_the_next_a_clean_store(store, tmp_path):
    store.source_add("many", write_jsonl(tmp_path / "many.jsonl", text_rows(90, "many")), stage="pretrain")
    done = subprocess.run([sys.executable, "-c", KILLED, named(store.path)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    after = {(severity, what) for severity, what, _ in found(store)}
    assert {("note", "stale run"), ("note", "lock")} <= after
    assert after <= {("note", "stale run"), ("note", "lock"), ("warning", "index"), ("warning", "unverified file")}
    units = store.ingest(["base"], ["many"], ["raw"], sketcher="small").units
    assert units["n_existing"].item() >= 64
    assert found(store) == []


def test_keys_are_compared_in_portions_of_bounded_size(scored_copy, monkeypatch):
    twice(scored_copy, small(scored_copy), ROW)
    monkeypatch.setattr(moment, "_HASHES_AT_ONCE", 7)
    assert ("error", "duplicate key", 1) in found(scored_copy)


# --- computed again ------------------------------------------------------------------------------------------------


def test_deep_computes_sketches_again(scored_copy):
    change_vector(scored_copy, "q1", lambda v: v[::-1])
    assert {what for _, what, _ in found(scored_copy)} == {"code"}
    report = scored_copy.db_check(deep=100).filter(what="sketch")
    assert report["where"].to_list() == ["small: base/finetune/chatml/q1"]
    assert report["severity"].item() == "error"


def test_checkpoint_files_that_changed_are_a_note(store, tmp_path):
    path = save_checkpoint(tmp_path / "moving")
    store.checkpoint_add("moving", path)
    store.ingest(["moving"], ["finetune"], ["raw"], sketcher="small")
    save_checkpoint(path, seed=9)
    assert found(store) == []
    (row,) = store.db_check(deep=5).rows(named=True)
    assert (row["severity"], row["what"], row["where"]) == ("note", "checkpoint files", "checkpoint moving")
    assert "changed since it was added; its sketches were not computed again" in row["detail"]
    with pytest.raises(InputError, match="-1 sketches"):
        store.db_check(deep=-1)


# --- what is unreadable --------------------------------------------------------------------------------------------


@pytest.mark.folder
def test_a_file_that_is_cut_short_is_said_and_nothing_is_concluded_from_it(scored_copy):
    for path in (scored_copy.path / "vectors" / f"{small(scored_copy)}.lance" / "data").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert found(scored_copy) == [("error", "unreadable", 1)]


@pytest.mark.folder
def test_a_table_that_can_not_be_opened_is_said(scored_copy):
    for path in (scored_copy.path / "vectors" / "source_influence.lance" / "_versions").glob("*.manifest"):
        path.write_bytes(b"nothing")
    assert found(scored_copy) == [("error", "unreadable", 1)]


@pytest.mark.folder
@pytest.mark.parametrize("name", ["influence", "samples"])
def test_who_asks_a_table_that_is_gone_is_sent_to_the_check(scored_copy, name):
    drop_folder(scored_copy, name)
    asked = lark(f"sql 'SELECT count(*) FROM {name}'", store=scored_copy.path)
    assert asked.code == 1
    assert asked.err.startswith(f"error: the table `{name}` of the store is gone\n\nhint: `lark-store db check` says")


@pytest.mark.folder
def test_by_a_damaged_catalog_nothing_is_mended(scored_copy):
    catalog(scored_copy, "PRAGMA foreign_keys = OFF", "UPDATE ingest_run SET source_id = 77 WHERE id = 1")
    report = scored_copy.db_check()
    assert ("error", "catalog") in report.select("severity", "what").rows()
    assert report["repair"].null_count() == len(report)
    before = sketches(scored_copy).count_rows()
    assert scored_copy.db_repair().mended.is_empty()
    assert sketches(scored_copy).count_rows() == before


def test_a_check_waits_for_nobody(scored_copy):
    location = scored_copy._db.location
    with maintenance(location), pytest.raises(StoreBusyError, match="another process is removing"):
        scored_copy.db_check()
    orphan(scored_copy, "samples")
    with working(location, "some", "ingesting", {"source": ["songs"]}):
        assert found(scored_copy) == []  # it may be that work's file
    assert found(scored_copy) == [("warning", "unverified file", 1)]


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_command_prints_findings_and_ends_with_1_if_there_is_an_error(scored_copy):
    run = partial(lark, store=scored_copy.path)
    clean = run("db check -f json")
    assert (clean.code, clean.rows, clean.err.splitlines()[-1]) == (0, [], "all is well")
    orphan(scored_copy, "samples")
    warned = run("db check -f json")
    assert (warned.code, warned.err.splitlines()[-1]) == (0, "1 warnings")
    change(scored_copy, "q1", grad_norm=0.0)
    wrong = run("db check --deep 3 -f json")
    assert wrong.code == 1
    assert wrong.columns("severity", "what") == [("error", "norm"), ("warning", "unverified file")]
    assert wrong.err.splitlines()[-1] == "1 errors, 1 warnings"
