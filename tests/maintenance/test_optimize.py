"""Optimize and status: fewer files, the same rows; removed rows leave the disk; others may write meanwhile."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import numpy as np
import polars as pl
import pytest
from helpers.stores import store_contents
from helpers.texts import text_rows, write_jsonl

from lark_store import Store
from lark_store.core import retry
from lark_store.errors import InputError, StoreBusyError
from lark_store.maintenance import compact as compaction
from lark_store.schema import vectors
from lark_store.schema.catalog import ScoreRun
from lark_store.schema.table_schemas import sketch_rows
from lark_store.schema.vectors import VectorStore, where


def wide(table, start, n, k=256):
    """Rows of sketches as an ingest commits them."""
    same = dict.fromkeys(("checkpoint", "source", "variant"), "x") | {"ingest_run": 1, "n_tokens": 1}
    same |= {"n_loss_tokens": 1, "loss": 1.0, "grad_norm": 1.0}
    rows = [same | {"row_key": str(i), "sample_id": str(i)} for i in range(start, start + n)]
    values = (np.arange(start * k, (start + n) * k) % 1009).astype(np.float16).reshape(n, k)
    return sketch_rows(rows, values, table.schema)


def fill_wide(store, commits=20, n=64):
    table = store._db.vectors.sketches("feedfacefeedface", k=256, dtype="float16")
    for i in range(commits):
        store._db.vectors.append(table, wide(table, i * n, n))
    return table.name


def read_all(store, name):
    return pl.from_arrow(store._db.vectors.table(name).to_arrow()).sort(pl.col("row_key").cast(pl.Int64))


def test_optimize_merges_files_and_keeps_every_row(store):
    name = fill_wide(store)
    before = read_all(store, name)
    report = store.db_optimize(keep_versions_days=0).row(by_predicate=pl.col("table") == name, named=True)
    assert (report["rows"], report["files_before"], report["files_after"]) == (1280, 20, 1)
    assert report["bytes_after"] < report["bytes_before"]
    assert read_all(store, name).equals(before)
    dataset = store._db.vectors.table(name).to_lance()
    assert len(dataset.versions()) == 1
    indexed = [index.columns for index in store._db.vectors.table(name).list_indices()]
    assert ["row_key"] in indexed
    assert all(
        store._db.vectors.table(name).index_stats(i.name).num_unindexed_rows == 0
        for i in store._db.vectors.table(name).list_indices()
    )
    assert store._db.vectors.read(name, ["sample_id"], where(row_key="700")).rows() == [("700",)]


@pytest.mark.folder
def test_optimize_frees_removed_rows(scored_copy, tmp_path):
    rare = "zanzibar-7351"
    path = write_jsonl(tmp_path / "rare.jsonl", [*text_rows(40, "plain"), {"id": "s", "text": f"The word {rare}."}])
    scored_copy.source_add("notes", path, stage="pretrain")
    scored_copy.ingest(["base"], ["notes"], ["raw"], sketcher="small")

    def on_disk():
        return [p for p in (scored_copy.path / "vectors").rglob("*") if p.is_file() and rare.encode() in p.read_bytes()]

    assert on_disk()
    scored_copy.sample_remove("notes", ["s"])
    scored_copy.db_optimize()
    assert on_disk()  # old versions are kept for a week
    scored_copy.db_optimize(keep_versions_days=0)
    assert on_disk() == []
    assert len(scored_copy.top("q100", checkpoint="base", sketcher="small", k=99, sources=["notes"])) == 40


def test_answers_are_equal_after_optimizing(scored_copy):
    before = store_contents(scored_copy)
    top = scored_copy.top("q100", checkpoint="base", sketcher="small", k=50).frame
    report = scored_copy.db_optimize()
    assert report["table"].to_list() == sorted(scored_copy._db.vectors.table_names())
    assert store_contents(scored_copy) == before
    again = scored_copy.top("q100", checkpoint="base", sketcher="small", k=50).frame
    numbers = ["score", "noise", "p_value", "q_value"]  # batches are cut elsewhere: the last bits of a sum may differ
    assert again.drop(numbers).equals(top.drop(numbers))
    np.testing.assert_allclose(again.select(numbers), top.select(numbers), rtol=1e-5)
    assert scored_copy.ingest(["base"], ["finetune"], ["chatml"], sketcher="small").units["n_existing"].item() == 6


def test_rows_may_be_added_and_read_while_a_table_is_optimized(store):
    name = fill_wide(store, commits=10)
    stop, n, faults = threading.Event(), [640], []

    def append():
        vectors = VectorStore(store._db.vectors.uri)
        table = vectors.table(name)
        while not stop.is_set():
            time.sleep(0.02)  # an ingest takes longer between its commits
            try:
                vectors.append(table, wide(table, n[0], 16))
                n[0] += 16
                if n[0] % 160 == 0:  # as at the end of a unit
                    vectors.refresh_indices(table)
                assert vectors.table(name).count_rows() >= 640
            except Exception as error:  # noqa: BLE001  # told below, in the test's own thread
                faults.append(error)
                return

    thread = threading.Thread(target=append)
    thread.start()
    try:
        for _ in range(4):
            store.db_optimize()
    finally:
        stop.set()
        thread.join()
    assert faults == []
    assert n[0] > 640
    assert read_all(store, name)["row_key"].to_list() == [str(i) for i in range(n[0])]


def test_conflict_is_retried_and_then_reported(monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.0)
    left = iter([OSError("Retryable commit conflict for version 3")] * 2)

    def meet_twice():
        error = next(left, None)
        if error:
            raise error
        return "done"

    assert retry.retry(meet_twice, "x") == "done"

    def meet():
        raise OSError("Commit conflict")

    with pytest.raises(StoreBusyError, match=r"`samples` can't be compacted: 6 attempts conflicted") as caught:
        retry.retry(meet, "`samples` can't be compacted")
    assert "run the command again" in caught.value.hint
    with pytest.raises(OSError, match="disk full"):
        retry.retry(lambda: (_ for _ in ()).throw(OSError("disk full")), "x")


def test_large_tables_are_compacted_in_several_commits(store, monkeypatch):
    monkeypatch.setattr(compaction, "SKETCHES_PER_FILE", 128)
    monkeypatch.setattr(compaction, "_SKETCHES_PER_PASS", 512)
    name = fill_wide(store, commits=30)
    before, version = read_all(store, name), store._db.vectors.table(name).version
    report = store.db_optimize().row(by_predicate=pl.col("table") == name, named=True)
    assert report["files_after"] == 15
    assert store._db.vectors.table(name).version >= version + 4
    assert read_all(store, name).equals(before)


def test_recent_versions_are_kept(store):
    name = fill_wide(store, commits=3)
    n_before = len(store._db.vectors.table(name).to_lance().versions())
    store.db_optimize()
    dataset = store._db.vectors.table(name).to_lance()
    assert len(dataset.versions()) > n_before
    assert all(
        v["timestamp"].timestamp() > time.time() - timedelta(hours=1).total_seconds() for v in dataset.versions()
    )
    with pytest.raises(InputError, match="`keep_versions_days` must be at least 0 and below 100,000, not -1"):
        store.db_optimize(keep_versions_days=-1)


@pytest.mark.folder
def test_status_reports_the_files_on_disk(scored_copy):
    scored_copy.snapshot_create("now")
    tables = Store.db_status(scored_copy.path).tables
    rows_of = dict(tables.select("table", "rows").rows())
    assert (rows_of["samples"], rows_of["source_influence"], rows_of["catalog"]) == (20, 40, None)
    assert sum(n or 0 for name, n in rows_of.items() if name.startswith("sketches_")) == 60
    on_disk = sum(path.stat().st_size for path in (scored_copy.path / "vectors").rglob("*") if path.is_file())
    assert tables.filter(pl.col("rows").is_not_null())["bytes"].sum() == on_disk
    assert tables.filter(table="snapshots")["files"].item() == 1
    samples = tables.row(by_predicate=pl.col("table") == "samples", named=True)
    assert samples["files"] == len(list((scored_copy.path / "vectors" / "samples.lance" / "data").iterdir()))
    assert samples["versions"] == len(scored_copy._db.vectors.table("samples").to_lance().versions())


def test_empty_runs_are_deleted_and_their_numbers_not_reused(scored_copy):
    def runs(kind, **equal):
        return set(scored_copy.sql(f"SELECT * FROM {kind}s").filter(**equal)[kind].to_list())

    scored_copy.sample_remove("songs", ["sea-0"])
    scored_copy.attribute(["base", "epoch-1"], queries="test", sketcher="small")
    scored_copy.sample_remove("songs", [f"sea-{i}" for i in range(1, 5)])  # nothing of these ingests is left
    before, answered = store_contents(scored_copy), runs("score_run", status="done")
    superseded, emptied = runs("score_run", status="superseded"), runs("ingest_run", source="songs")
    assert len(superseded) == 8
    assert len(emptied) == 4
    last = max(superseded | answered)
    scored_copy.db_optimize()
    assert runs("score_run", status="superseded") == superseded  # seven days have not passed
    scored_copy.db_optimize(keep_versions_days=0)
    assert runs("score_run") == answered | {last}
    assert runs("ingest_run", source="songs") == {max(emptied)}  # the newest of all
    kept = {
        name: rows for name, rows in store_contents(scored_copy).items() if name not in {"score_runs", "ingest_runs"}
    }
    assert kept == {name: rows for name, rows in before.items() if name in kept}
    assert scored_copy.db_check().is_empty()
    report = scored_copy.attribute(["base"], queries="test", sketcher="small", hits=3)
    assert report["score_run"].min() > last


def test_superseded_run_with_rows_is_kept(scored_copy):
    """A scoring killed before it deleted the replaced scores: a repair, or the next removal, deletes them."""
    with scored_copy._db.session() as session:
        run = session.get_one(ScoreRun, 1)
        run.status = "superseded"
    scored_copy.db_optimize(keep_versions_days=0)
    findings = scored_copy.db_check()
    assert findings["what"].to_list() == ["orphan rows", "orphan rows"]
    assert set(findings["severity"]) == {"warning"}  # not `no score run has their number`
    scored_copy.db_repair()
    scored_copy.db_optimize(keep_versions_days=0)
    assert 1 not in scored_copy.sql("SELECT score_run FROM score_runs")["score_run"].to_list()
    assert scored_copy.db_check().is_empty()


def test_memory_of_an_open_store_is_bounded(store, monkeypatch):
    import lancedb

    results, session = [], lancedb.Session
    monkeypatch.setattr(vectors, "CACHES", {"index_cache_size_bytes": 60_000, "metadata_cache_size_bytes": 60_000})
    monkeypatch.setattr(lancedb, "Session", lambda **sizes: results.append(session(**sizes)) or results[0])
    with Store.open(store.path) as other:
        for i in range(60):
            table = other._db.vectors.sketches("feedfacefeedface", k=256, dtype="float16")
            other._db.vectors.append(table, wide(table, i * 4, 4))
            table.count_rows(where(row_key=str(i)))
    assert len(results) == 1
    assert 0 < results[0].size_bytes <= 120_000


@pytest.mark.folder
def test_work_leaves_no_lock_file(scored_copy, tmp_path):
    scored_copy.source_add("more", write_jsonl(tmp_path / "more.jsonl", text_rows(2)), stage="pretrain")
    scored_copy.ingest(["base"], ["more"], ["raw"], sketcher="small")
    scored_copy.attribute(["base"], queries="test", sketcher="small")
    scored_copy.source_remove("more")
    left = {path.name for path in (scored_copy.path / "locks").iterdir()}
    assert left == {"gate.lock", "maintenance.lock"}


def test_lexical_scores_are_equal_after_compaction(scored_copy):
    """The newest version of the samples may then be one that rewrote indices."""
    ask = {"checkpoint": "base", "queries": "test", "sketcher": "small", "method": "bm25"}
    before = scored_copy.top("q100", **ask).frame
    scored_copy.sample_remove("songs", ["sea-1"])
    scored_copy.db_optimize(keep_versions_days=0)
    with Store.open(scored_copy.path) as opened:
        after = opened.top("q100", **ask).frame
    assert len(before) == len(after) > 0
