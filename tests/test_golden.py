"""Stores as released code made them: upgraded, they hold what they held, and everything goes on in them.

`golden/make.py` makes `golden/NNNN.tar.xz` and `golden/NNNN.json`, what the old code answered. A new golden is those
two files, and nothing here changes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from conftest import write_jsonl
from golden.make import CHECKPOINTS, HERE, SKETCHER, answers, save_model, tops
from test_bad_input import as_nobody, open_to_all  # noqa: F401 - a fixture
from test_migrations import FAILING, execute, is_no_store, next_schema  # noqa: F401 - a fixture

from lark_store import Store, migrations
from lark_store.errors import NewerSchemaError, OlderSchemaError
from lark_store.schema.location import VERSION_TABLE

PROGRAM = Path(sys.executable).with_name("lark-store")
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
    return execute(catalog, f"SELECT version_num FROM {VERSION_TABLE}")[0][0]


def bytes_of(folder):
    """Every file but SQLite's two scratch files, which also a reader makes."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal")))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def recorded(schema):
    return json.loads((HERE / f"{schema}.json").read_text(encoding="utf-8"))


def same(store, said):
    """Compare what is stored, to the bit, and what is computed from it."""
    assert answers(store) == said["answers"]
    found = tops(store)
    assert found.keys() == said["tops"].keys()
    for asked, rows in found.items():
        assert [row[:3] for row in rows] == [row[:3] for row in said["tops"][asked]]
        # The code of schema 0001 did not bring a vector that was rounded to float16 back to norm 1.
        assert [row[3] for row in rows] == pytest.approx([row[3] for row in said["tops"][asked]], abs=1e-4)


def test_every_schema_before_the_newest_has_a_golden_store():
    script = ScriptDirectory.from_config(migrations._config())
    assert sorted({r.revision for r in script.walk_revisions()} - {NEWEST}) == OLDER
    assert all((HERE / f"{schema}.tar.xz").stat().st_size < 60_000 for schema in GOLDEN)


@each(OLDER)
def test_an_older_store_is_not_opened_and_not_touched(old):
    schema, before = schema_of(old / "catalog.sqlite"), bytes_of(old)
    with pytest.raises(OlderSchemaError, match=f"has schema {schema}; this lark-store needs {NEWEST}"):
        Store.open(old)
    for line, said in (("show", "`lark-store db upgrade`"), ("db status", f"store {schema}, lark-store {NEWEST}")):
        done = subprocess.run([PROGRAM, *line.split(), "--store", old], capture_output=True, text=True, check=False)
        assert said in done.stderr
    assert bytes_of(old) == before


@each(GOLDEN)
def test_a_store_answers_as_the_code_that_made_it_did(old):
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
    tables = execute(catalog, "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
    return {name: execute(catalog, f"SELECT count(*) FROM {name}")[0][0] for (name,) in tables}


@each(OLDER)
def test_an_upgraded_store_is_used_like_any_other(old, models, tmp_path):
    Store.db_upgrade(old)
    with Store.open(old) as store:
        said = answers(store)
        go_on(store, models, tmp_path)
        # What the old code sketched and scored is as it was; only songs were scored again, and one sample is gone.
        found = answers(store)
        keys = {row[1] for row in said["sketches"]}
        kept = [row for row in found["sketches"] if row[1] in keys]
        assert kept == [row for row in said["sketches"] if not row[1].endswith("/song-0")]
        assert store.metrics(sketcher=SKETCHER).height > 0
        assert store.db_check(deep=20).is_empty()


def go_on(store, models, tmp_path):
    """Do with a store what people do."""
    for name, folder in models.items():
        kept = store.checkpoint_add(name, folder)
        assert (kept.learning_rate, list(kept.metrics)) == (1e-3, ["accuracy"])  # the weights' hash fits
    assert store.verify(sketches=30)["ok"].all()
    rows = [{"id": f"new-{i}", "text": f"A new song, about harbour {i}"} for i in range(5)]
    assert store.source_add("songs", write_jsonl(tmp_path / "new.jsonl", rows), stage="pretrain").n_added == 5
    report = store.ingest(CHECKPOINTS, ["songs"], ["raw"], sketcher=SKETCHER)
    assert report.units["n_sketched"].to_list() == [5, 5]
    assert report.failures["sample_id"].unique().to_list() == ["mute"]  # tried once more
    done = store.attribute(CHECKPOINTS, queries="test", sketcher=SKETCHER)
    assert done.filter(source="songs", variant="raw")["status"].to_list() == ["scored", "scored"]
    assert set(done.filter(variant="chatml")["status"]) == {"current"}
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
    store.index_build(SKETCHER)  # indices that old code did not make


@each(OLDER)
def test_snapshots_within_are_upgraded_too(old):
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
def test_an_upgrade_that_was_killed_before_the_snapshots_goes_on(old):
    schema, place = schema_of(old / "catalog.sqlite"), old / "snapshots" / "before.sqlite"
    before = place.read_bytes()
    Store.db_upgrade(old)
    place.write_bytes(before)  # as if it had ended between the catalog and the snapshot
    with pytest.raises(OlderSchemaError, match=f"has schema {schema}"):
        Store.open(old, snapshot="before")
    assert Store.db_upgrade(old) == old / f"snapshot-before-{schema}.backup.sqlite"
    with Store.open(old, snapshot="before") as then:
        assert then.sql("SELECT count(*) FROM sketches").item() == 24


@each(OLDER)
def test_an_upgrade_that_fails_at_its_last_step_leaves_every_byte(old, next_schema):  # noqa: F811
    next_schema(FAILING)
    before = bytes_of(old)
    with pytest.raises(Exception, match="no_such_table"):
        Store.db_upgrade(old)
    after = bytes_of(old)
    kept = [name for name in after if ".backup." in name]
    assert {name: after[name] for name in after if name not in kept} == before
    assert len(kept) == 1


@each(OLDER)
def test_processes_that_upgrade_at_once_all_succeed_and_keep_the_old_catalog(old):
    schema, before = schema_of(old / "catalog.sqlite"), catalog_rows(old / "catalog.sqlite")
    command = [PROGRAM, "db", "upgrade", "--store", old]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    backup = old / f"catalog-{schema}.backup.sqlite"
    assert (schema_of(backup), catalog_rows(backup)) == (schema, before)
    assert schema_of(old / "catalog.sqlite") == NEWEST


@each(OLDER)
def test_an_upgrade_that_comes_second_does_not_overwrite_the_backup(old, monkeypatch):
    schema, check = schema_of(old / "catalog.sqlite"), migrations._check

    def late(found, label):
        """Another process upgrades after this one has read the version."""
        monkeypatch.setattr(migrations, "_check", check)
        Store.db_upgrade(old)
        check(found, label)

    monkeypatch.setattr(migrations, "_check", late)
    Store.db_upgrade(old)
    assert schema_of(old / f"catalog-{schema}.backup.sqlite") == schema


@pytest.mark.parametrize("end", [60, 5000, -4096])
@each(OLDER)
def test_an_older_store_that_was_cut_off_is_no_store(old, end):
    catalog = old / "catalog.sqlite"
    catalog.write_bytes(catalog.read_bytes()[:end])
    before = catalog.read_bytes()
    is_no_store(old)
    assert catalog.read_bytes() == before


@each(OLDER)
def test_an_older_store_whose_schema_became_newer_is_left_alone(old):
    with closing(sqlite3.connect(old / "catalog.sqlite")) as db, db:
        db.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    before = bytes_of(old)
    for refused in (Store.open, Store.db_upgrade):
        with pytest.raises(NewerSchemaError):
            refused(old)
    assert bytes_of(old) == before


@pytest.mark.folder
@each(OLDER)
def test_an_older_store_of_somebody_else_is_not_upgraded(old, open_to_all):  # noqa: F811
    path = shutil.copytree(old, open_to_all / "old.store")
    before = bytes_of(path)
    for line in ("show", "db upgrade"):
        code, out, err = as_nobody(line, path, open_to_all)
        assert (code, out) == (1, "")
        assert "Traceback" not in err
    assert "permission denied" in err
    assert bytes_of(path) == before
