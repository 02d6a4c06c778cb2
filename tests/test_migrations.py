"""The catalog's schema: what the migrations build, who may open it, and what an upgrade leaves behind."""

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
from sqlalchemy import create_engine

from lark_store import Store, migrations
from lark_store.errors import NewerSchemaError, NotAStoreError, OlderSchemaError, StoreError, StoreExistsError
from lark_store.schema.catalog import Base
from lark_store.schema.folder import APPLICATION_ID
from lark_store.schema.location import VERSION_TABLE

NOW = migrations.newest()
NEXT = f"{int(NOW) + 1:04d}"
MIGRATION = f"""
import sqlalchemy as sa
from alembic import op

revision = "{NEXT}"
down_revision = "{NOW}"


def upgrade():
    op.add_column("source", sa.Column("note", sa.Text(), nullable=True))
"""
FAILING = MIGRATION + "    op.execute('UPDATE source SET domain = NULL')\n    op.drop_table('no_such_table')\n"
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


@pytest.fixture
def next_schema(tmp_path, monkeypatch):
    """Return a function that puts a migration after the newest one, as a newer lark-store would."""
    package, folder, config_of = Path(migrations.__file__).parent, tmp_path / "migrations", migrations._config

    def config(connection=None):
        made = config_of(connection)
        made.set_main_option("script_location", str(folder))
        return made

    def install(script):
        shutil.copytree(package, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "versions" / f"{NEXT}_next.py").write_text(script, encoding="utf-8")
        monkeypatch.setattr(migrations, "_config", config)

    return install


def execute(catalog, statement):
    with closing(sqlite3.connect(catalog)) as db, db:
        return db.execute(statement).fetchall()


def set_version(catalog, version):
    execute(catalog, f"UPDATE {VERSION_TABLE} SET version_num = '{version}'")


def versions(path):
    status = Store.db_status(path)
    return status.schema, status.newest


def test_the_migrations_build_the_schema_of_the_models(catalog):
    engine = create_engine(f"sqlite:///{catalog}")
    options = {"compare_type": True, "compare_server_default": True, "version_table": VERSION_TABLE}
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        differences = compare_metadata(context, Base.metadata)
    engine.dispose()
    assert differences == []


def test_the_migrations_build_the_checks_and_keys_of_the_models(catalog, tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'models.sqlite'}")
    Base.metadata.create_all(engine)
    engine.dispose()

    def definitions(file):
        wanted = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'lark_store_version'"
        return {name: sorted(filter(None, re.split(r"\s*[,\n)]\s*", sql))) for name, sql in execute(file, wanted)}

    assert definitions(catalog) == definitions(tmp_path / "models.sqlite")


def test_every_table_of_the_catalog_is_strict(catalog):
    tables = execute(catalog, "SELECT name, strict FROM pragma_table_list WHERE schema = 'main' AND type = 'table'")
    strict = {name for name, is_strict in tables if is_strict}
    assert strict == set(Base.metadata.tables)


def test_the_revisions_are_one_line_without_branches():
    script = ScriptDirectory.from_config(migrations._config())
    assert script.get_heads() == [migrations.newest()]
    assert len(script.get_bases()) == 1
    assert all(not revision.is_merge_point for revision in script.walk_revisions())


def test_a_fresh_store_has_the_newest_schema_and_our_mark(path, catalog):
    assert versions(path) == (migrations.newest(), migrations.newest())
    assert execute(catalog, "PRAGMA application_id") == [(APPLICATION_ID,)]
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
        with pytest.raises(NewerSchemaError, match="has schema 9999, which this lark-store") as caught:
            refused(path)
        assert "pip install --upgrade lark-store" in caught.value.hint
    assert versions(path) == ("9999", migrations.newest())
    assert catalog.read_bytes() == before


def test_an_older_schema_is_not_opened_and_not_changed(path, catalog, next_schema):
    next_schema(MIGRATION)
    before = catalog.read_bytes()
    with pytest.raises(OlderSchemaError, match=f"has schema {NOW}; this lark-store needs {NEXT}") as caught:
        Store.open(path)
    assert "`lark-store db upgrade`" in caught.value.hint
    assert versions(path) == (NOW, NEXT)
    assert catalog.read_bytes() == before


def test_an_upgrade_brings_the_newest_schema_and_keeps_a_backup(path, catalog, next_schema):
    execute(catalog, "UPDATE sketcher SET name = 'kept' WHERE name = 'lark'")
    next_schema(MIGRATION)
    backup = Store.db_upgrade(path)
    assert versions(path) == (NEXT, NEXT)
    assert "note" in [row[1] for row in execute(catalog, "PRAGMA table_info(source)")]
    names = "SELECT name FROM sketcher ORDER BY id"
    assert execute(catalog, names) == execute(backup, names) == [("kept",), ("adam",)]
    assert execute(backup, f"SELECT version_num FROM {VERSION_TABLE}") == [(NOW,)]
    with Store.open(path) as opened:
        assert opened.show().sketchers["name"].to_list() == ["kept", "adam"]
    assert Store.db_upgrade(path) is None


def catalog_dump(catalog):
    with closing(sqlite3.connect(catalog)) as db:
        return list(db.iterdump())


def test_an_upgrade_that_fails_changes_nothing(path, catalog, next_schema):
    next_schema(FAILING)
    before = catalog_dump(catalog)
    with pytest.raises(Exception, match="no_such_table"):
        Store.db_upgrade(path)
    assert catalog_dump(catalog) == before


def test_an_upgrade_that_would_break_references_changes_nothing(path, catalog, next_schema):
    execute(catalog, "INSERT INTO checkpoint VALUES (1, 'c', 'm', 'p', NULL, 'w', 't', NULL, NULL, NULL, '2026-01-01')")
    execute(catalog, "INSERT INTO checkpoint_metric VALUES (1, 'accuracy', 0.5)")
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


def test_a_snapshot_whose_upgrade_was_killed_is_read_and_upgraded(path, next_schema):
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
    assert execute(copy, f"SELECT version_num FROM {VERSION_TABLE}") == [(NEXT,)]


def is_no_store(path):
    for refused in (Store.open, Store.db_status, Store.db_upgrade):
        with pytest.raises(NotAStoreError) as caught:
            refused(path)
        assert str(path) in caught.value.fact
        assert "--store PATH" in caught.value.hint
    return caught.value


def test_a_missing_folder_is_no_store_and_is_not_made(tmp_path):
    assert is_no_store(tmp_path / "none").fact.startswith("there is no lark-store at `")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["a folder", "a file", "an empty catalog", "a folder as catalog"])
def test_something_else_is_no_store(tmp_path, what):
    path = tmp_path / "other"
    if what == "a file":
        path.write_text("text", encoding="utf-8")
    else:
        path.mkdir()
    if what == "an empty catalog":
        (path / "catalog.sqlite").touch()
    if what == "a folder as catalog":
        (path / "catalog.sqlite").mkdir()
    is_no_store(path)


def test_the_database_of_another_program_is_no_store(tmp_path):
    execute(tmp_path / "catalog.sqlite", "CREATE TABLE source (id INTEGER)")
    before = (tmp_path / "catalog.sqlite").read_bytes()
    is_no_store(tmp_path)
    assert (tmp_path / "catalog.sqlite").read_bytes() == before


@pytest.mark.parametrize("end", [50, 1000, 4096, 50_000, -5000, -1000])
def test_a_truncated_catalog_is_no_store(path, catalog, end):
    catalog.write_bytes(catalog.read_bytes()[:end])
    is_no_store(path)


def test_a_catalog_without_a_schema_version_is_no_store(path, catalog):
    execute(catalog, f"DROP TABLE {VERSION_TABLE}")
    assert "can't be read as a catalog: no such table" in is_no_store(path).fact


def test_a_catalog_with_an_empty_version_table_is_no_store(path, catalog):
    execute(catalog, f"DELETE FROM {VERSION_TABLE}")
    is_no_store(path)


def test_a_store_that_lost_its_vectors_is_refused_as_a_store(path):
    shutil.rmtree(path / "vectors")
    with pytest.raises(StoreError), Store.open(path) as opened:
        opened.show()


@pytest.mark.parametrize("there", ["store", "folder", "file"])
def test_create_refuses_what_is_there_and_leaves_it_alone(path, tmp_path, there):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text", encoding="utf-8")
    target = path if there == "store" else tmp_path / there
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreExistsError, match="a store at" if there == "store" else "something at"):
        Store.create(target)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["file/under.store", "x" * 250])
def test_a_store_that_cant_be_made_is_a_store_error_and_leaves_nothing(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="a store can't be made at"):
        Store.create(tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("make", [Store.create, Store.open])
def test_a_name_that_is_too_long_is_a_store_error(tmp_path, make):
    with pytest.raises(StoreError):
        make(tmp_path / ("x" * 300))


def test_an_error_while_a_store_is_built_leaves_no_draft_behind(tmp_path, next_schema):
    next_schema(FAILING)
    with pytest.raises(Exception, match="no_such_table"):
        Store.create(tmp_path / "made" / "lark.store")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_store_is_made_whole_with_its_parents_and_no_draft_beside_it(tmp_path):
    with Store.create(tmp_path / "new" / "deep" / "lark.store") as made:
        assert made.show().variants["name"].to_list() == ["raw", "chatml"]
    assert [file.name for file in (tmp_path / "new" / "deep").iterdir()] == ["lark.store"]
    assert (made.path / "catalog.sqlite").stat().st_mode & 0o777 == 0o644
    assert made.path.stat().st_mode & 0o777 == 0o755
