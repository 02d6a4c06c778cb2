"""A test suite for backends: the contract of a catalog, its locks and its snapshots.

Needs pytest. A backend implements the protocols `Catalog`, `Locks` and `Snapshots`. To test one, subclass
`BackendSuite` in a pytest module, with a fixture `location` that returns the `Location` of a fresh store:

    class TestMyBackend(BackendSuite):
        @pytest.fixture
        def location(self, tmp_path):
            Store.create(tmp_path / "lark.store").close()
            return location_at(tmp_path / "lark.store")
"""

from __future__ import annotations

import sqlite3
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
from filelock import Timeout
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from lark_store import migrations

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy import Engine

    from lark_store.schema.backends.base import Location

NOTE = {"doing": "ingesting songs", "touches": {"source": ["songs"]}}
RECORD = {"created_at": "2026-01-01T00:00:00+00:00", "tables": {"samples": 3}, "rows": 5}
_UPDATE = text("UPDATE store_meta SET sketcher = :name")
_SELECT = text("SELECT sketcher FROM store_meta")


def default_sketcher(engine: Engine) -> str:
    """Return the default sketcher recorded in a catalog."""
    with engine.connect() as connection:
        return str(connection.scalar(_SELECT))


def set_default_sketcher(engine: Engine, name: str) -> None:
    """Record another default sketcher."""
    with engine.begin() as connection:
        connection.execute(_UPDATE, {"name": name})


@contextmanager
def opened(engine: Engine) -> Iterator[Engine]:
    """Dispose of an engine at the end."""
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def held(location: Location, name: str) -> Iterator[None]:
    """Hold a lock of a store."""
    lock = location.locks.lock(name)
    lock.acquire(timeout=5)
    try:
        yield
    finally:
        lock.release()


class BackendSuite:
    """The contract of a backend. Subclasses provide the fixture `location`, of a fresh store."""

    @pytest.fixture
    def engine(self, location: Location) -> Iterator[Engine]:
        """Yield an engine of the catalog."""
        with opened(location.catalog.engine()) as engine:
            yield engine

    # --- the catalog -----------------------------------------------------------------------------------------------

    def test_catalog_has_the_newest_schema(self, location: Location) -> None:
        """A fresh store has the newest schema version, no faults, and takes up space."""
        assert location.catalog.schema() == migrations.newest()
        assert location.catalog.faults() == []
        assert sum(location.catalog.sizes()) > 0

    def test_engine_commits(self, location: Location, engine: Engine) -> None:
        """Another engine sees a committed transaction and no uncommitted one."""
        before = default_sketcher(engine)
        with opened(location.catalog.engine()) as reader, engine.connect() as connection:
            connection.execute(_UPDATE, {"name": "tensor"})
            assert default_sketcher(reader) == before
            connection.commit()
            assert default_sketcher(reader) == "tensor"

    def test_failed_migration_changes_nothing(self, location: Location, engine: Engine) -> None:
        """An error in a migration rolls back rows and schema."""
        before = default_sketcher(engine)
        with suppress(KeyboardInterrupt), location.catalog.migrating() as connection:
            connection.execute(text("ALTER TABLE source ADD COLUMN note TEXT"))
            connection.execute(_UPDATE, {"name": "half"})
            raise KeyboardInterrupt
        assert default_sketcher(engine) == before
        with engine.connect() as connection, pytest.raises(DBAPIError):
            connection.execute(text("SELECT note FROM source"))

    def test_migration_is_committed(self, location: Location, engine: Engine) -> None:
        """A migration's schema change is visible after it."""
        with location.catalog.migrating() as connection:
            connection.execute(text("ALTER TABLE source ADD COLUMN note TEXT"))
        with engine.connect() as connection:
            assert connection.execute(text("SELECT note FROM source")).all() == []

    def test_frozen_catalog_is_readable_and_commits_no_run(self, location: Location, engine: Engine) -> None:
        """While the catalog is frozen, readers go on and the commit of a run waits."""
        short = {"postgresql": "SET LOCAL lock_timeout = '100ms'", "sqlite": "PRAGMA busy_timeout = 100"}
        commit = text("UPDATE ingest_run SET status = status")
        with location.catalog.frozen(), engine.connect() as connection:
            default_sketcher(engine)
            connection.execute(text(short[engine.dialect.name]))
            with pytest.raises(DBAPIError):
                connection.execute(commit)
        with engine.begin() as connection:
            connection.execute(commit)

    def test_copy_is_a_readable_catalog(self, location: Location, engine: Engine, tmp_path: Path) -> None:
        """A copy is one SQLite file with the same rows; later changes don't reach it."""
        target, before = tmp_path / "copy.sqlite", default_sketcher(engine)
        location.catalog.copy(target)
        set_default_sketcher(engine, "tensor")
        with closing(sqlite3.connect(target)) as copy:
            assert copy.execute("SELECT sketcher FROM store_meta").fetchall() == [(before,)]
            assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]

    # --- locks -----------------------------------------------------------------------------------------------------

    def test_lock_excludes_others_until_released(self, location: Location) -> None:
        """A lock is held by one object at a time, and another lock of the store is free."""
        first, second = location.locks.lock("unit"), location.locks.lock("unit")
        first.acquire(timeout=0)
        assert first.is_locked
        with pytest.raises(Timeout):
            second.acquire(timeout=0)
        assert not second.is_locked
        other = location.locks.lock("other")
        other.acquire(timeout=0)
        location.locks.ensure()
        other.release()
        first.release()
        second.acquire(timeout=5)
        second.release()

    def test_notes_of_locks(self, location: Location) -> None:
        """A note is read as written, replaced by the next one, and gone once removed."""
        locks = location.locks
        assert (locks.read("unit"), locks.notes()) == (None, [])
        with held(location, "unit"):
            locks.write("unit", NOTE)
            locks.write("unit", NOTE | {"touches": None})
            assert locks.read("unit") == NOTE | {"touches": None}
            assert locks.notes() == ["unit"]
        locks.remove("unit")
        locks.remove("unit")
        assert (locks.read("unit"), locks.notes(), locks.unnoted()) == (None, [], [])

    # --- snapshots -------------------------------------------------------------------------------------------------

    def keep(self, location: Location) -> None:
        """Keep a snapshot `paper` of the catalog."""
        with location.snapshots.making("paper") as copy:
            location.catalog.copy(copy)
            assert location.snapshots.names() == []
            location.snapshots.keep("paper", copy, RECORD)

    def test_snapshot_stays_as_it_was(self, location: Location, engine: Engine) -> None:
        """A snapshot is complete once its record is kept; it is read-only and keeps its rows."""
        snapshots, before = location.snapshots, default_sketcher(engine)
        self.keep(location)
        set_default_sketcher(engine, "tensor")
        assert (snapshots.names(), snapshots.parts()) == (["paper"], {"paper"})
        assert snapshots.record("paper") == RECORD
        assert sum(snapshots.sizes()) > 0
        with opened(snapshots.engine("paper")) as frozen:
            assert default_sketcher(frozen) == before
            with pytest.raises(DBAPIError):
                set_default_sketcher(frozen, "other")

    def test_snapshot_can_be_migrated(self, location: Location) -> None:
        """Changes to a snapshot's catalog are kept."""
        self.keep(location)
        with location.snapshots.catalog("paper") as catalog:
            assert catalog.schema() == migrations.newest()
            with catalog.migrating() as connection:
                connection.execute(_UPDATE, {"name": "migrated"})
        with opened(location.snapshots.engine("paper")) as engine:
            assert default_sketcher(engine) == "migrated"

    def test_snapshot_is_gone_without_its_record(self, location: Location) -> None:
        """Without its record a snapshot doesn't exist; `clear` removes the rest of it."""
        self.keep(location)
        location.snapshots.forget("paper")
        assert location.snapshots.names() == []
        with pytest.raises((OSError, KeyError)):
            location.snapshots.record("paper")
        location.snapshots.clear("paper")
        assert location.snapshots.parts() == set()
