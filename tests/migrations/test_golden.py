"""Stores of released versions: an upgrade keeps their contents, and they take new work.

`golden/make.py` makes `golden/NNNN.tar.xz` and `golden/NNNN.json`, the old code's answers. A new golden is those
two files, and nothing here changes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import subprocess
import tarfile
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest
from alembic.script import ScriptDirectory
from golden.make import CHECKPOINTS, HERE, SKETCHER, answers, save_model, tops
from helpers.migrations import FAILING_MIGRATION, assert_not_a_store, execute_sql
from helpers.program import PROGRAM
from helpers.texts import write_jsonl
from helpers.users import run_as_nobody

from lark_store import Store, migrations
from lark_store.errors import NewerSchemaError, OlderSchemaError
from lark_store.schema.backends.base import VERSION_TABLE

NEWEST = migrations.newest()
GOLDEN = sorted(path.name.split(".")[0] for path in HERE.glob("*.tar.xz"))
OLDER = [schema for schema in GOLDEN if schema != NEWEST]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Folders of the golden stores, unpacked once."""
    root = tmp_path_factory.mktemp("golden")
    for schema in GOLDEN:
        with tarfile.open(HERE / f"{schema}.tar.xz") as archive:
            archive.extractall(root / schema, filter="data")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, seed) for seed, name in enumerate(CHECKPOINTS)}


@pytest.fixture
def old(request, packed, tmp_path):
    """A golden store, to change."""
    return Path(shutil.copytree(packed / request.param / "golden.store", tmp_path / "golden.store"))


def each(schemas):
    return pytest.mark.parametrize("old", schemas, indirect=True)


def schema_of(catalog):
    return execute_sql(catalog, f"SELECT version_num FROM {VERSION_TABLE}")[0][0]


def bytes_of(folder):
    """Every file but SQLite's two scratch files, which also a reader makes."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal")))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def recorded(schema):
    return json.loads((HERE / f"{schema}.json").read_text(encoding="utf-8"))


def same(store, recorded):
    """Compare stored values bit by bit, and the results computed from them."""
    assert answers(store) == recorded["answers"]
    result = tops(store)
    assert result.keys() == recorded["tops"].keys()
    for query, rows in result.items():
        assert [row[:3] for row in rows] == [row[:3] for row in recorded["tops"][query]]
        # The code of schema 0001 did not normalise a vector again after rounding it to float16.
        assert [row[3] for row in rows] == pytest.approx([row[3] for row in recorded["tops"][query]], abs=1e-4)


def test_every_schema_before_the_newest_has_a_golden_store():
    script = ScriptDirectory.from_config(migrations._config())
    assert sorted({r.revision for r in script.walk_revisions()} - {NEWEST}) == OLDER
    assert all((HERE / f"{schema}.tar.xz").stat().st_size < 60_000 for schema in GOLDEN)


@each(OLDER)
def test_older_store_is_neither_opened_nor_changed(old):
    schema, before = schema_of(old / "catalog.sqlite"), bytes_of(old)
    with pytest.raises(OlderSchemaError, match=f"has schema {schema}; this lark-store needs {NEWEST}"):
        Store.open(old)
    for line, output in (("show", "`lark-store db upgrade`"), ("db status", f"store {schema}, lark-store {NEWEST}")):
        completed = subprocess.run(
            [PROGRAM, *line.split(), "--store", old], capture_output=True, text=True, check=False
        )
        assert output in completed.stderr
    assert bytes_of(old) == before


@each(GOLDEN)
def test_upgraded_store_answers_like_the_old_code(old):
    """An older one when it was upgraded, one of the newest schema as it is."""
    schema = schema_of(old / "catalog.sqlite")
    before = catalog_rows(old / "catalog.sqlite")
    backup = Store.db_upgrade(old)
    if schema == NEWEST:
        assert backup is None
        with Store.open(old) as store:
            same(store, recorded(schema))
        return
    assert backup == old / f"catalog-{schema}.backup.sqlite"
    assert (schema_of(backup), schema_of(old / "catalog.sqlite")) == (schema, NEWEST)
    assert catalog_rows(backup) == before
    after = catalog_rows(old / "catalog.sqlite")
    assert {table: n for table, n in after.items() if table in before} == before
    with Store.open(old) as store:
        same(store, recorded(schema))
        assert set(store.db_check()["what"]) <= {"checkpoint files", "index"}  # the models' folder is gone


def catalog_rows(catalog):
    """How many rows each table has, those of the checkpoints' metrics and other children too."""
    tables = execute_sql(catalog, "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
    return {name: execute_sql(catalog, f"SELECT count(*) FROM {name}")[0][0] for (name,) in tables}


@each(OLDER)
def test_upgraded_store_is_fully_usable(old, models, tmp_path):
    Store.db_upgrade(old)
    with Store.open(old) as store:
        output = answers(store)
        go_on(store, models, tmp_path)
        # Sketches and scores of the old code are unchanged; only songs were scored again, and one sample is gone.
        result = answers(store)
        keys = {row[1] for row in output["sketches"]}
        kept = [row for row in result["sketches"] if row[1] in keys]
        assert kept == [row for row in output["sketches"] if not row[1].endswith("/song-0")]
        assert store.metrics(sketcher=SKETCHER).height > 0
        assert store.db_check(deep=20).is_empty()


def go_on(store, models, tmp_path):
    """Use a store: ingest, score, remove, snapshot."""
    for name, folder in models.items():
        kept = store.checkpoint_add(name, folder)
        assert (kept.learning_rate, list(kept.metrics)) == (1e-3, ["accuracy"])  # the weights' hash fits
    assert store.verify(sketches=30)["ok"].all()
    rows = [{"id": f"new-{i}", "text": f"A new song, about harbour {i}"} for i in range(5)]
    assert store.source_add("songs", write_jsonl(tmp_path / "new.jsonl", rows), stage="pretrain").n_added == 5
    report = store.ingest(CHECKPOINTS, ["songs"], ["raw"], sketcher=SKETCHER)
    assert report.units["n_sketched"].to_list() == [5, 5]
    assert report.failures["sample_id"].unique().to_list() == ["mute"]  # tried once more
    result = store.attribute(CHECKPOINTS, queries="test", sketcher=SKETCHER)
    assert result.filter(source="songs", variant="raw")["status"].to_list() == ["scored", "scored"]
    assert set(result.filter(variant="chatml")["status"]) == {"current"}
    built = store.index_build(SKETCHER)
    assert built["n_rows"].item() == store.sql("SELECT count(*) FROM sketches").item() == 30 + 10
    exact = store.top("q4", checkpoint="base", sketcher=SKETCHER, k=5)
    near = store.top("q4", checkpoint="base", sketcher=SKETCHER, k=5, approximate=True)
    assert near.frame["sample_id"].to_list() == exact.frame["sample_id"].to_list()
    store.snapshot_create("later")
    store.db_optimize(keep_versions_days=0)
    store.sample_remove("songs", ["song-0"])
    store.attribute(CHECKPOINTS, queries="test", sketcher=SKETCHER)
    assert "song-0" not in store.sql("SELECT sample_id FROM influence")["sample_id"].to_list()
    with Store.open(store.path, snapshot="later") as then:
        assert then.top("q4", checkpoint="base", sketcher=SKETCHER, k=5).frame.equals(exact.frame)
    store.index_build(SKETCHER)  # indices missing in old stores


@each(OLDER)
def test_snapshots_are_upgraded(old):
    there = sorted(path.name.removesuffix(".json") for path in (old / "snapshots").glob("*.json"))
    schema = schema_of(old / "catalog.sqlite")
    Store.db_upgrade(old)
    for name in there:
        assert schema_of(old / f"snapshot-{name}-{schema}.backup.sqlite") == schema
        with Store.open(old, snapshot=name) as then:
            assert set(then.sql("SELECT sample_id FROM samples WHERE source = 'songs'")["sample_id"]) == {
                "song-0", "song-1", "song-2"
            }  # fmt: skip
            assert then.sql("SELECT count(*) FROM sketches").item() == 24
            assert len(then.top("q4", checkpoint="base", sketcher=SKETCHER)) == 10
    assert bool(there) == (schema >= "0002")  # there were none before


@each([schema for schema in OLDER if schema >= "0002"])
def test_upgrade_killed_before_the_snapshots_resumes(old):
    schema, place = schema_of(old / "catalog.sqlite"), old / "snapshots" / "before.sqlite"
    before = place.read_bytes()
    Store.db_upgrade(old)
    place.write_bytes(before)  # as if it had ended between the catalog and the snapshot
    with pytest.raises(OlderSchemaError, match=f"has schema {schema}"):
        Store.open(old, snapshot="before")
    assert Store.db_upgrade(old) == old / f"snapshot-before-{schema}.backup.sqlite"
    with Store.open(old, snapshot="before") as then:
        assert then.sql("SELECT count(*) FROM sketches").item() == 24


@each([schema for schema in OLDER if schema >= "0002"])
def test_check_reports_and_repair_upgrades_older_snapshots(old):
    place = old / "snapshots" / "before.sqlite"
    before = place.read_bytes()
    Store.db_upgrade(old)
    with Store.open(old) as store:
        undisturbed = store.db_check()
        place.write_bytes(before)
        findings = store.db_check().filter(pl.col("where") == "snapshot before")
        assert findings.select("severity", "what", "repair").rows() == [("note", "older schema", "upgrade it")]
        store.db_repair()
        assert store.db_check().rows() == undisturbed.filter(pl.col("repair").is_null()).rows()
    with Store.open(old, snapshot="before") as then:
        assert then.sql("SELECT count(*) FROM sketches").item() == 24


@each(OLDER)
def test_failed_upgrade_leaves_every_byte(old, next_schema):
    next_schema(FAILING_MIGRATION)
    before = bytes_of(old)
    with pytest.raises(Exception, match="no_such_table"):
        Store.db_upgrade(old)
    after = bytes_of(old)
    kept = [name for name in after if ".backup." in name]
    assert {name: after[name] for name in after if name not in kept} == before
    assert len(kept) == 1


@each([schema for schema in OLDER if schema < "0008"])
def test_source_added_by_older_code_is_recognised_despite_white_space(old, tmp_path):
    """Older code stored texts without it."""
    Store.db_upgrade(old)
    rows = [{"id": f"song-{i}", "text": f"  A song about the sea, number {i}\n"} for i in range(4)]
    file = write_jsonl(tmp_path / "songs.jsonl", rows)
    query = "SELECT sample_id, text FROM samples WHERE source = 'songs' AND text <> 'x' ORDER BY sample_id"
    with Store.open(old) as store:
        before, n_sketches = store.sql(query).rows(), store.sql("SELECT count(*) FROM sketches").item()
        report = store.source_add("songs", file, stage="pretrain")
        assert (report.n_added, report.n_existing, report.n_stripped, report.n_changed) == (0, 4, 4, 0)
        assert store.sql(query).rows() == before
        assert store.sql("SELECT count(*) FROM sketches").item() == n_sketches
        replaced = store.source_add("songs", file, stage="pretrain", replace=True)
        assert (replaced.n_added, replaced.n_existing, replaced.n_replaced, replaced.n_changed) == (0, 0, 4, 0)
        assert store.sql(query).rows() == [(row["id"], row["text"]) for row in rows]


@each(OLDER)
def test_simultaneous_upgrades_all_succeed_and_keep_the_old_catalog(old):
    schema, before = schema_of(old / "catalog.sqlite"), catalog_rows(old / "catalog.sqlite")
    command = [PROGRAM, "db", "upgrade", "--store", old]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for process in running:
        _, output = process.communicate(timeout=300)
        assert process.returncode == 0, output
    backup = old / f"catalog-{schema}.backup.sqlite"
    assert (schema_of(backup), catalog_rows(backup)) == (schema, before)
    assert schema_of(old / "catalog.sqlite") == NEWEST


@each(OLDER)
def test_second_upgrade_does_not_overwrite_the_backup(old, monkeypatch):
    schema, check = schema_of(old / "catalog.sqlite"), migrations._check

    def late(result, label):
        """Another process upgrades after this one has read the version."""
        monkeypatch.setattr(migrations, "_check", check)
        Store.db_upgrade(old)
        check(result, label)

    monkeypatch.setattr(migrations, "_check", late)
    Store.db_upgrade(old)
    assert schema_of(old / f"catalog-{schema}.backup.sqlite") == schema


@pytest.mark.parametrize("end", [60, 5000, -4096])
@each(OLDER)
def test_truncated_older_store_is_not_a_store(old, end):
    catalog = old / "catalog.sqlite"
    catalog.write_bytes(catalog.read_bytes()[:end])
    before = catalog.read_bytes()
    assert_not_a_store(old)
    assert catalog.read_bytes() == before


@each(OLDER)
def test_store_upgraded_meanwhile_is_left_alone(old):
    with closing(sqlite3.connect(old / "catalog.sqlite")) as db, db:
        db.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    before = bytes_of(old)
    for refused in (Store.open, Store.db_upgrade):
        with pytest.raises(NewerSchemaError, match=r"has schema 9999, newer than this lark-store's schema \d{4}"):
            refused(old)
    assert bytes_of(old) == before


@pytest.mark.folder
@each(OLDER)
def test_older_store_of_another_user_is_not_upgraded(old, open_to_all):
    path = shutil.copytree(old, open_to_all / "old.store")
    before = bytes_of(path)
    for line in ("show", "db upgrade"):
        code, out, err = run_as_nobody(line, path, open_to_all)
        assert (code, out) == (1, "")
        assert "Traceback" not in err
    assert "permission denied" in err
    assert bytes_of(path) == before


@each(OLDER)
def test_upgraded_store_and_its_snapshots_have_the_new_tables(old):
    Store.db_upgrade(old)
    names = [None]
    with Store.open(old) as store:
        names += store.snapshot_list()["name"].to_list()
    for name in names:
        with Store.open(old, snapshot=name) as store:
            assert [store.sql(f"FROM {view}").height for view in ("probes", "eif", "eif_pairs")] == [0, 0, 0]
