"""Snapshots: a frozen view of the store, whatever happens to the store later."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing

import polars as pl
import pytest
from helpers.migrations import MIGRATION, NEWEST, NEXT, execute_sql
from helpers.program import lark
from helpers.stores import (
    CHECKPOINTS,
    attribute_all,
    copy_store,
    count_rows,
    read_answers,
    store_contents,
    store_label,
    version_tags,
)
from helpers.texts import text_rows, write_jsonl
from sqlalchemy.exc import OperationalError

from lark_store import Store
from lark_store.errors import (
    NameInvalidError,
    NameTakenError,
    NameUnknownError,
    StoreBusyError,
    StoreError,
)
from lark_store.maintenance import snapshots
from lark_store.schema.backends import base
from lark_store.schema.backends.base import VERSION_TABLE
from lark_store.schema.backends.local import CatalogFile
from lark_store.schema.catalog import Source


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.source_remove("songs"),
        lambda store: store.source_remove("test"),
        lambda store: store.checkpoint_remove("epoch-1"),
        lambda store: store.sample_remove("medical", ["kidney-0", "kidney-3"]),
    ],
    ids=["a source", "the queries", "a checkpoint", "samples"],
)
def test_a_snapshot_outlives_removal_and_optimize(scored_copy, change):
    before = read_answers(scored_copy)
    scored_copy.snapshot_create("paper")
    change(scored_copy)
    scored_copy.db_optimize(keep_versions_days=0)
    scored_copy.db_optimize(keep_versions_days=0)
    after = store_contents(scored_copy)
    with Store.open(scored_copy.path, snapshot="paper") as then:
        assert read_answers(then) == before
    assert store_contents(scored_copy) == after


def test_snapshot_does_not_see_later_changes(scored_copy, tmp_path):
    before = read_answers(scored_copy)
    scored_copy.snapshot_create("then")
    scored_copy.source_add("later", write_jsonl(tmp_path / "later.jsonl", text_rows(3, "later")), stage="pretrain")
    scored_copy.sketcher_add("other", k=256)
    scored_copy.ingest(["base"], ["later"], ["raw"], sketcher="small")
    scored_copy.ingest(["base"], ["later", "test"], ["raw"], sketcher="other")
    scored_copy.source_add(
        "songs", write_jsonl(tmp_path / "s.jsonl", [{"id": "sea-0", "text": "new"}]), stage="pretrain", replace=True
    )
    attribute_all(scored_copy)
    with Store.open(scored_copy.path, snapshot="then") as then:
        assert read_answers(then) == before
        assert len(then._db.vectors.table_names()) < len(scored_copy._db.vectors.table_names())
    assert count_rows(scored_copy, "samples", "source = 'later'") == 3


def test_snapshots_are_independent_and_removal_frees_rows(scored_copy):
    first = read_answers(scored_copy)
    scored_copy.snapshot_create("first")
    scored_copy.sample_remove("songs", ["sea-1"])
    attribute_all(scored_copy)
    second = read_answers(scored_copy)
    scored_copy.snapshot_create("second")
    scored_copy.source_remove("songs")
    scored_copy.db_optimize(keep_versions_days=0)
    for name, expected in (("first", first), ("second", second)):
        with Store.open(scored_copy.path, snapshot=name) as then:
            assert read_answers(then) == expected
    assert scored_copy.snapshot_list()["name"].to_list() == ["first", "second"]
    assert version_tags(scored_copy) == {"lark-snapshot-first", "lark-snapshot-second"}
    size = sum(Store.db_status(scored_copy.path).tables["bytes"])
    scored_copy.snapshot_remove("first")
    scored_copy.db_optimize(keep_versions_days=0)
    assert sum(Store.db_status(scored_copy.path).tables["bytes"]) < size
    assert version_tags(scored_copy) == {"lark-snapshot-second"}
    with Store.open(scored_copy.path, snapshot="second") as then:
        assert read_answers(then) == second
    with pytest.raises(NameUnknownError, match="no snapshot `first`"):
        Store.open(scored_copy.path, snapshot="first")


def files(path):
    """The store's files with their bytes, but for the log that SQLite keeps while the live catalog is open."""
    result = (file for file in path.rglob("*") if file.is_file() and not file.name.startswith("catalog.sqlite-"))
    return {file: file.read_bytes() for file in result}


WRITES = {
    "checkpoint_add": lambda store: store.checkpoint_add("c", "nowhere"),
    "checkpoint_add_run": lambda store: store.checkpoint_add_run("c", "nowhere"),
    "source_add": lambda store: store.source_add("s", "nowhere.jsonl", stage="query"),
    "variant_add": lambda store: store.variant_add("v", template="raw"),
    "sketcher_add": lambda store: store.sketcher_add("k"),
    "sketcher_default": lambda store: store.sketcher_default("adam"),
    "study_keep": lambda store: store.study_keep("s", recipe={}, environment={}, hashes={}),
    "evaluation_keep": lambda store: store.evaluation_keep(
        "e", kind="facts", recipe={}, environment={}, scores=pl.DataFrame()
    ),
    "correction_fit": lambda store: store.correction_fit("base", samples=1),
    "ingest": lambda store: store.ingest(["base"], ["finetune"], ["raw"], sketcher="small"),
    "probe": lambda store: store.probe(["test"], ["base"]),
    "eif": lambda store: store.eif("base", "finetune", queries="test", max_samples=1),
    "attribute": lambda store: store.attribute(["base"], queries="test", sketcher="small"),
    "sketcher_import": lambda store: store.sketcher_import(
        "k", "nowhere.npy", checkpoint="base", source="songs", variant="raw"
    ),
    "index_build": lambda store: store.index_build("small"),
    "sample_remove": lambda store: store.sample_remove("songs", ["sea-1"]),
    "source_remove": lambda store: store.source_remove("songs"),
    "checkpoint_remove": lambda store: store.checkpoint_remove("base"),
    "db_optimize": lambda store: store.db_optimize(),
    "db_check": lambda store: store.db_check(),
    "db_repair": lambda store: store.db_repair(),
    "db_backup": lambda store: store.db_backup("nowhere"),
    "snapshot_create": lambda store: store.snapshot_create("b"),
    "snapshot_remove": lambda store: store.snapshot_remove("a"),
}


def test_a_snapshot_is_read_only(scored_copy):
    scored_copy.snapshot_create("a")
    before = files(scored_copy.path)
    with Store.open(scored_copy.path, snapshot="a") as then:
        for write in WRITES.values():
            with pytest.raises(StoreError, match="a snapshot is read-only: `a`") as caught:
                write(then)
            assert "without `snapshot`" in caught.value.hint
        with pytest.raises(StoreError, match="a snapshot is read-only"), then._db.session() as session:
            session.add(Source(name="x", stage="query", uri="x", columns={}))
        with pytest.raises(OperationalError, match="readonly"), then._db.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM score_run")
        with pytest.raises(ValueError, match="cannot be modified"):
            then._db.vectors.table("samples").delete("true")
        read_answers(then)
    assert files(scored_copy.path) == before


def test_every_writing_method_is_refused():
    reads = {"top", "metrics", "sql", "show", "plan", "verify", "variant_show", "sketcher_show", "snapshot_list"}
    reads |= {
        "ft_pt",
        "coverage",
        "trajectory",
        "similar_text",
        "eif_report",
        "self_influence",
        "export",
        "scores",
        "groups",
        "plot",
        "report",
    }
    reads |= {
        "checkpoint_distance",
        "default_sketcher",
        "evaluation_check",
        "trace",
        "explain",
        "explainer",
        "survival",
    }
    reads |= {"checkpoint_list", "source_list", "variant_list", "sketcher_list", "sample_list", "sample_show"}
    others = {"create", "open", "close", "path", "place", "db_status", "db_upgrade", "db_restore", "doctor"}
    methods = {name for name in dir(Store) if not name.startswith("_")}
    assert methods - reads - others == set(WRITES)


def test_names_of_snapshots(scored_copy):
    scored_copy.snapshot_create("a")
    with pytest.raises(NameTakenError, match="snapshot `a` already exists"):
        scored_copy.snapshot_create("a")
    with pytest.raises(NameInvalidError, match="`A b` is not a valid name"):
        scored_copy.snapshot_create("A b")
    with pytest.raises(NameUnknownError, match="no snapshot `b`") as caught:
        scored_copy.snapshot_remove("b")
    assert caught.value.hint == "the store has `a`"
    for name in ("a.sqlite", "a.json", "a.sqlite-wal"):
        scored_copy.snapshot_create(name)
    assert scored_copy.snapshot_list()["name"].to_list() == ["a", "a.sqlite", "a.json", "a.sqlite-wal"]
    scored_copy.snapshot_remove("a")
    with Store.open(scored_copy.path, snapshot="a.sqlite") as then:
        assert count_rows(then, "sketches") == 60
    scored_copy.snapshot_create("a")


@pytest.mark.parametrize("step", ["copy", "_tag", "keep"])
@pytest.mark.folder
def test_interrupted_snapshot_is_invisible_and_can_be_redone(scored_copy, monkeypatch, step):
    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "keep":
            patch.setattr("pathlib.Path.replace", cut)
        else:
            where = snapshots if step == "_tag" else CatalogFile
            original = getattr(where, step)
            patch.setattr(where, step, lambda *arguments: (original(*arguments), cut()))
        with pytest.raises(KeyboardInterrupt):
            scored_copy.snapshot_create("a")
    assert scored_copy.snapshot_list().is_empty()
    with pytest.raises(NameUnknownError, match="no snapshot `a`"):
        Store.open(scored_copy.path, snapshot="a")
    scored_copy.snapshot_remove("a")
    assert version_tags(scored_copy) == set()
    scored_copy.sample_remove("songs", ["sea-1"])
    scored_copy.snapshot_create("a")
    with Store.open(scored_copy.path, snapshot="a") as then:
        assert count_rows(then, "samples", "source = 'songs'") == 4


@pytest.mark.folder
def test_no_run_commits_during_a_snapshot(scored_copy, monkeypatch):
    tag = snapshots._tag
    seen = []

    def write_in_between(*arguments):
        with closing(sqlite3.connect(scored_copy.path / "catalog.sqlite", timeout=0)) as other:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("UPDATE score_run SET status = 'superseded'")
            seen.append(other.execute("SELECT count(*) FROM score_run").fetchone())
        return tag(*arguments)

    monkeypatch.setattr(snapshots, "_tag", write_in_between)
    scored_copy.snapshot_create("a")
    assert seen == [(10,)]
    scored_copy.sketcher_add("writes-again", k=256)


@pytest.mark.folder
def test_constantly_written_catalog_is_busy(scored_copy, monkeypatch):
    monkeypatch.setattr(base, "BUSY_TIMEOUT_S", 0)
    with closing(sqlite3.connect(scored_copy.path / "catalog.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusyError, match="the catalog has been locked by a writer"):
            scored_copy.snapshot_create("a")
        other.execute("ROLLBACK")
    scored_copy.snapshot_create("a")


@pytest.mark.folder
def test_upgrade_includes_the_snapshots(scored_copy, next_schema):
    before = scored_copy.sql("select * from source_influence order by all")
    scored_copy.snapshot_create("a")
    path = scored_copy.path
    scored_copy.source_remove("songs")
    scored_copy.close()
    next_schema(MIGRATION)
    backup = Store.db_upgrade(path)
    assert backup.name == f"catalog-{NEWEST}.backup.sqlite"
    for catalog in (path / "catalog.sqlite", path / "snapshots" / "a.sqlite"):
        assert execute_sql(catalog, f"SELECT version_num FROM {VERSION_TABLE}") == [(NEXT,)]
    assert execute_sql(path / f"snapshot-a-{NEWEST}.backup.sqlite", "SELECT count(*) FROM source") == [(4,)]
    with Store.open(path, snapshot="a") as then:
        assert then.sql("select * from source_influence order by all").equals(before)
    assert Store.db_upgrade(path) is None
    assert Store.db_status(path).newest == NEXT


def test_copied_store_has_its_snapshots(scored_copy, tmp_path):
    before = read_answers(scored_copy)
    scored_copy.snapshot_create("a")
    scored_copy.checkpoint_remove("base")
    scored_copy.close()
    with Store.open(copy_store(scored_copy.path, tmp_path / "moved"), snapshot="a") as then:
        result = read_answers(then)
    assert result == before


def test_versions_deleted_by_another_program_are_reported(scored_copy):
    scored_copy.snapshot_create("a")
    dataset = scored_copy._db.vectors.table("samples").to_lance()
    dataset.tags.delete("lark-snapshot-a")
    scored_copy.sample_remove("songs", ["sea-1"])
    scored_copy.db_optimize(keep_versions_days=0)
    with (
        Store.open(scored_copy.path, snapshot="a") as then,
        pytest.raises(StoreError, match="of the table `samples`, which the snapshot needs") as caught,
    ):
        then.sql("select * from samples")
    assert "`store.snapshot_remove(...)`" in caught.value.hint


WRITER = """
import sys
from lark_store import Store
with Store.open(sys.argv[1]) as store:
    for hits in range(1, 40):
        store.attribute(["base", "epoch-1"], queries="test", sketcher="small", hits=hits)
"""


def test_snapshots_during_rescoring_are_consistent(scored_copy):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, store_label(scored_copy.path)])
    try:
        for number in range(8):
            scored_copy.snapshot_create(f"s{number}")
            with Store.open(scored_copy.path, snapshot=f"s{number}") as then:
                assert count_rows(then, "source_influence") == 2 * 4 * 5
                runs = then.sql(
                    "select score_run, recipe->>'hits' as hits, n_samples from score_runs where status = 'done'"
                )
                per_run = dict(then.sql("select score_run, count(*) from influence group by all").rows())
                assert per_run == {run: 4 * min(int(hits), n) for run, hits, n in runs.rows()}
    finally:
        writer.kill()
        writer.wait()


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_commands_of_snapshots(scored_copy):
    store = scored_copy.path
    result = lark("snapshot create paper", store=store)
    assert (result.code, result.out) == (0, "")
    assert result.err.startswith("snapshot `paper`: 7 tables, ")
    lines = {
        "sql": "sql 'select count(*) as n from sketches' -f json",
        "top": "top q100 -c base --sketcher small -k 50 -f json",
        "metrics": "metrics --sketcher small -f json",
        "show": "show -f json",
    }
    before = {name: lark(line, store=store) for name, line in lines.items()}
    assert lark("source remove songs", store=store).code == 0
    assert lark("db optimize --keep-versions-days 0", store=store).code == 0
    for name, line in lines.items():
        assert lark(f"{line} --snapshot paper", store=store) == before[name]
        assert lark(line, store=store) != before[name]
    [row] = lark("snapshot list -f json", store=store).rows
    assert (row["name"], row["tables"]) == ("paper", 7)
    removed = lark("snapshot remove paper", store=store)
    assert (removed.code, removed.err) == (0, "removed snapshot `paper`\n")
    assert lark("snapshot list -f json", store=store).rows == []


@pytest.mark.parametrize("line", ["show --snapshot papr", "snapshot remove papr", "sql 'select 1' --snapshot papr"])
def test_missing_snapshot_is_an_error(scored_copy, line):
    scored_copy.snapshot_create("paper")
    result = lark(line, store=scored_copy.path)
    assert (result.code, result.out) == (1, "")
    assert result.err == "error: no snapshot `papr`\n\nhint: did you mean `paper`?\n"


def test_snapshot_keeps_the_checkpoint_order(scored_copy):
    scored_copy.snapshot_create("a")
    with Store.open(scored_copy.path, snapshot="a") as then:
        assert then.show().checkpoints["name"].to_list() == CHECKPOINTS
