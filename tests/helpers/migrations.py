"""A migration newer than this version, and checks of stores which can not be opened."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from lark_store import Store, migrations
from lark_store.errors import NotAStoreError

NEWEST = migrations.newest()
NEXT = f"{int(NEWEST) + 1:04d}"
MIGRATION = f"""
import sqlalchemy as sa
from alembic import op

revision = "{NEXT}"
down_revision = "{NEWEST}"


def upgrade():
    op.add_column("source", sa.Column("note", sa.Text(), nullable=True))
"""
FAILING_MIGRATION = (
    MIGRATION + "    op.execute('UPDATE source SET domain = NULL')\n    op.drop_table('no_such_table')\n"
)


@pytest.fixture
def next_schema(tmp_path, monkeypatch):
    """Return a function which installs a migration after the newest one, as a newer lark-store would."""
    package, folder, config_of = Path(migrations.__file__).parent, tmp_path / "migrations", migrations._config

    def config(connection=None):
        result = config_of(connection)
        result.set_main_option("script_location", str(folder))
        return result

    def install(script):
        shutil.copytree(package, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "versions" / f"{NEXT}_next.py").write_text(script, encoding="utf-8")
        monkeypatch.setattr(migrations, "_config", config)
        monkeypatch.setattr(migrations, "FOLDER", folder)

    return install


def execute_sql(catalog, statement):
    with closing(sqlite3.connect(catalog)) as db, db:
        return db.execute(statement).fetchall()


def assert_not_a_store(path):
    for refused in (Store.open, Store.db_status, Store.db_upgrade):
        with pytest.raises(NotAStoreError) as caught:
            refused(path)
        assert str(path) in caught.value.fact
        assert "`path=PATH`" in caught.value.hint
    return caught.value
