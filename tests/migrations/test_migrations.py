"""The catalog's schema: the migrations' result, refused versions, and the traces of an upgrade."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from helpers.migrations import FAILING_MIGRATION, MIGRATION, NEWEST, NEXT, assert_not_a_store, execute_sql
from sqlalchemy import create_engine

from lark_store import Store, migrations
from lark_store.errors import NewerSchemaError, OlderSchemaError, StoreError, StoreExistsError
from lark_store.schema.backends.base import VERSION_TABLE
from lark_store.schema.backends.local import APPLICATION_ID
from lark_store.schema.catalog import METADATA

ORPHANING = MIGRATION + "    op.execute('DELETE FROM checkpoint')\n"


@pytest.fixture(scope="module")
def fresh_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("fresh") / "lark.store"
    Store.create(path).close()
    return path


@pytest.fixture
def path(fresh_path, tmp_path):
    return Path(shutil.copytree(fresh_path, tmp_path / "lark.store"))


@pytest.fixture
def catalog(path):
    return path / "catalog.sqlite"


def set_version(catalog, version):
    execute_sql(catalog, f"UPDATE {VERSION_TABLE} SET version_num = '{version}'")


def versions(path):
    status = Store.db_status(path)
    return status.schema, status.newest


def test_migrations_build_the_schema_of_the_models(catalog):
    engine = create_engine(f"sqlite:///{catalog}")
    options = {"compare_type": True, "compare_server_default": True, "version_table": VERSION_TABLE}
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        differences = compare_metadata(context, METADATA)
    engine.dispose()
    assert differences == []


def test_migrations_build_the_checks_and_keys_of_the_models(catalog, tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'models.sqlite'}")
    METADATA.create_all(engine)
    engine.dispose()

    def definitions(file):
        query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'lark_store_version'"
        return {
            name: sorted(filter(None, re.split(r"\s*[,\n)]\s*", sql.replace('"', ""))))
            for name, sql in execute_sql(file, query)
        }

    assert definitions(catalog) == definitions(tmp_path / "models.sqlite")


def test_every_table_of_the_catalog_is_strict(catalog):
    tables = execute_sql(catalog, "SELECT name, strict FROM pragma_table_list WHERE schema = 'main' AND type = 'table'")
    strict = {name for name, is_strict in tables if is_strict}
    assert strict == set(METADATA.tables)


def test_the_revisions_are_one_line_without_branches():
    script = ScriptDirectory.from_config(migrations._config())
    assert script.get_heads() == [migrations.newest()]
    assert len(script.get_bases()) == 1
    assert all(not revision.is_merge_point for revision in script.walk_revisions())
    assert sorted(revision.revision for revision in script.walk_revisions()) == migrations._versions()


def test_fresh_store_has_the_newest_schema_and_application_id(path, catalog):
    assert versions(path) == (migrations.newest(), migrations.newest())
    assert execute_sql(catalog, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert Store.db_upgrade(path) is None
    assert [file.name for file in path.glob("*.backup.*")] == []


def test_opening_and_reading_change_no_byte_of_the_catalog(path, catalog):
    before = catalog.read_bytes()
    with Store.open(path) as opened:
        opened.show()
        opened.sql("SELECT * FROM sources")
    Store.db_status(path)
    assert catalog.read_bytes() == before


def test_a_newer_schema_is_neither_opened_nor_upgraded(path, catalog):
    set_version(catalog, "9999")
    before = catalog.read_bytes()
    for refused in (Store.open, Store.db_upgrade):
        with pytest.raises(NewerSchemaError, match="has schema 9999, newer than this lark-store") as caught:
            refused(path)
        assert "pip install --upgrade lark-store" in caught.value.hint
    assert versions(path) == ("9999", migrations.newest())
    assert catalog.read_bytes() == before


def test_older_schema_is_neither_opened_nor_changed(path, catalog, next_schema):
    next_schema(MIGRATION)
    before = catalog.read_bytes()
    with pytest.raises(OlderSchemaError, match=f"has schema {NEWEST}; this lark-store needs {NEXT}") as caught:
        Store.open(path)
    assert "`Store.db_upgrade(...)`" in caught.value.hint
    assert versions(path) == (NEWEST, NEXT)
    assert catalog.read_bytes() == before


def test_upgrade_gives_the_newest_schema_and_keeps_a_backup(path, catalog, next_schema):
    execute_sql(catalog, "UPDATE sketcher SET name = 'kept' WHERE name = 'lark'")
    next_schema(MIGRATION)
    backup = Store.db_upgrade(path)
    assert versions(path) == (NEXT, NEXT)
    assert "note" in [row[1] for row in execute_sql(catalog, "PRAGMA table_info(source)")]
    names = "SELECT name FROM sketcher ORDER BY id"
    assert execute_sql(catalog, names) == execute_sql(backup, names) == [("kept",), ("adam",)]
    assert execute_sql(backup, f"SELECT version_num FROM {VERSION_TABLE}") == [(NEWEST,)]
    with Store.open(path) as opened:
        assert opened.show().sketchers["name"].to_list() == ["kept", "adam"]
    assert Store.db_upgrade(path) is None


def catalog_dump(catalog):
    with closing(sqlite3.connect(catalog)) as db:
        return list(db.iterdump())


def test_failed_upgrade_changes_nothing(path, catalog, next_schema):
    next_schema(FAILING_MIGRATION)
    before = catalog_dump(catalog)
    with pytest.raises(Exception, match="no_such_table"):
        Store.db_upgrade(path)
    assert catalog_dump(catalog) == before


def test_upgrade_breaking_references_changes_nothing(path, catalog, next_schema):
    execute_sql(
        catalog,
        "INSERT INTO checkpoint VALUES (1, 'c', 'm', 'p', NULL, 'w', 't', NULL, NULL, NULL, '2026-01-01', NULL, NULL)",
    )
    execute_sql(catalog, "INSERT INTO checkpoint_metric VALUES (1, 'accuracy', 0.5, NULL)")
    next_schema(ORPHANING)
    before = catalog_dump(catalog)
    with pytest.raises(StoreError, match="would break 1 references"):
        Store.db_upgrade(path)
    assert catalog_dump(catalog) == before


HALF_WAY = """
import os, signal, sqlite3, sys
catalog = sqlite3.connect(sys.argv[1], isolation_level=None)
catalog.execute("PRAGMA cache_size = 1")
catalog.execute("BEGIN IMMEDIATE")
numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n LIMIT 9999) SELECT i FROM n"
catalog.execute(f"CREATE TABLE half_way AS {numbers}")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_snapshot_with_a_killed_upgrade_is_read_and_upgraded(path, next_schema):
    with Store.open(path) as opened:
        opened.snapshot_create("then")
    copy = path / "snapshots" / "then.sqlite"
    subprocess.run([sys.executable, "-c", HALF_WAY, copy], check=False)
    assert copy.with_name("then.sqlite-journal").stat().st_size
    half_way = copy.read_bytes(), copy.with_name("then.sqlite-journal").read_bytes()
    with Store.open(path) as opened:
        assert opened.db_check().rows() == []
    copy.write_bytes(half_way[0])
    copy.with_name("then.sqlite-journal").write_bytes(half_way[1])
    next_schema(MIGRATION)
    assert Store.db_upgrade(path) is not None
    assert execute_sql(copy, f"SELECT version_num FROM {VERSION_TABLE}") == [(NEXT,)]


def test_missing_folder_is_not_a_store_and_not_created(tmp_path):
    assert assert_not_a_store(tmp_path / "none").fact.startswith("there is no lark-store at `")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["a folder", "a file", "an empty catalog", "a folder as catalog"])
def test_other_files_are_not_a_store(tmp_path, kind):
    path = tmp_path / "other"
    if kind == "a file":
        path.write_text("text", encoding="utf-8")
    else:
        path.mkdir()
    if kind == "an empty catalog":
        (path / "catalog.sqlite").touch()
    if kind == "a folder as catalog":
        (path / "catalog.sqlite").mkdir()
    assert_not_a_store(path)


def test_another_programs_database_is_not_a_store(tmp_path):
    execute_sql(tmp_path / "catalog.sqlite", "CREATE TABLE source (id INTEGER)")
    before = (tmp_path / "catalog.sqlite").read_bytes()
    assert_not_a_store(tmp_path)
    assert (tmp_path / "catalog.sqlite").read_bytes() == before


@pytest.mark.parametrize("end", [50, 1000, 4096, 50_000, -5000, -1000])
def test_truncated_catalog_is_not_a_store(path, catalog, end):
    catalog.write_bytes(catalog.read_bytes()[:end])
    assert_not_a_store(path)


def test_catalog_without_schema_version_is_not_a_store(path, catalog):
    execute_sql(catalog, f"DROP TABLE {VERSION_TABLE}")
    assert "can't be read as a catalog: no such table" in assert_not_a_store(path).fact


def test_catalog_with_empty_version_table_is_not_a_store(path, catalog):
    execute_sql(catalog, f"DELETE FROM {VERSION_TABLE}")
    assert_not_a_store(path)


def test_store_without_vectors_is_refused(path):
    shutil.rmtree(path / "vectors")
    with pytest.raises(StoreError, match="/vectors` is missing"), Store.open(path) as opened:
        opened.show()


@pytest.mark.parametrize("there", ["store", "folder", "file"])
def test_create_refuses_existing_paths_and_leaves_them_alone(path, tmp_path, there):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text", encoding="utf-8")
    target = path if there == "store" else tmp_path / there
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreExistsError, match="a store at" if there == "store" else "something at"):
        Store.create(target)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["file/under.store", "x" * 250])
def test_failed_create_is_a_store_error_and_leaves_nothing(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="can't create a store at"):
        Store.create(tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("make", [Store.create, Store.open])
def test_too_long_name_is_a_store_error(tmp_path, make):
    with pytest.raises(StoreError, match=r"a store can't be at .* long"):
        make(tmp_path / ("x" * 300))


def test_error_during_create_leaves_no_draft(tmp_path, next_schema):
    next_schema(FAILING_MIGRATION)
    with pytest.raises(Exception, match="no_such_table"):
        Store.create(tmp_path / "made" / "lark.store")
    assert list((tmp_path / "made").iterdir()) == []


def test_create_makes_parents_and_leaves_no_draft(tmp_path):
    with Store.create(tmp_path / "new" / "deep" / "lark.store") as store:
        assert store.show().variants["name"].to_list() == ["raw", "chatml"]
    assert [file.name for file in (tmp_path / "new" / "deep").iterdir()] == ["lark.store"]
    assert (store.path / "catalog.sqlite").stat().st_mode & 0o777 == 0o644
    assert store.path.stat().st_mode & 0o777 == 0o755
