"""The place of a campaign's store: a folder or a cluster.

A place that is no folder is another class with these methods; no campaign needs to change for it.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lark_store import migrations
from lark_store.schema.backends.base import VERSION_TABLE
from lark_store.schema.backends.open import location_at

if TYPE_CHECKING:
    import pytest
    from helpers.cluster import Server

# Statements which undo a revision, newest first. Data added by the revision is lost.
_CHECKED = (
    *("store_meta", "checkpoint", "checkpoint_metric", "source", "format_variant", "sketcher", "correction"),
    *("ingest_run", "score_run", "search_index", "study", "evaluation", "evaluation_score"),
)
BACK = {
    "0011": ["DROP TABLE probe_run", "DROP TABLE eif_run"],
    "0010": ["ALTER TABLE format_variant DROP COLUMN answers"],
    "0009": ["ALTER TABLE format_variant DROP COLUMN loss", "ALTER TABLE checkpoint DROP COLUMN parts"],
    "0008": [
        *(f"ALTER TABLE {table} DROP COLUMN checksum" for table in _CHECKED),
        "ALTER TABLE source DROP COLUMN is_stripped",
    ],
    "0007": ["ALTER TABLE store_meta DROP COLUMN sketcher"],
    "0006": [
        "DELETE FROM sketcher WHERE name = 'adam'",  # which new stores have since then
        "DROP TABLE evaluation_score",
        "DROP TABLE evaluation",
        "ALTER TABLE sketcher DROP COLUMN power",
        "ALTER TABLE score_run DROP COLUMN over_checkpoints",
    ],
    "0005": [
        "DROP TABLE correction",
        "ALTER TABLE sketcher DROP COLUMN damping",
        "ALTER TABLE sketcher DROP COLUMN min_ndim",
    ],
    "0004": ["DROP TABLE work", "DROP TABLE snapshot", "ALTER TABLE store_meta DROP COLUMN vectors"],
    "0003": ["DROP TABLE study"],
    "0002": ["DROP TABLE search_index"],
}


class Place(Protocol):
    """Where a store is, or is to be."""

    env: dict[str, str]

    @property
    def store(self) -> str:
        """The value for `--store`."""

    @property
    def init(self) -> list[str]:
        """The command which creates the store."""

    def fresh(self, name: str) -> Place:
        """Return another place, with no store yet."""

    def older(self, version: str) -> None:
        """Make the store one of an older schema, with its snapshots, where there were such stores."""

    def others(self) -> list[str]:
        """Return the extra files, which should not accumulate."""


@dataclass(frozen=True)
class FolderPlace:
    """A store in a folder of its own, `root`; `env` is the environment of its commands."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> str:
        """The value for `--store`."""
        return str(self.root / "lark.store")

    @property
    def init(self) -> list[str]:
        """The command which creates the store."""
        return ["init"]

    def fresh(self, name: str) -> FolderPlace:
        """Return another place, with no store yet."""
        folder = self.root / name
        folder.mkdir()
        return replace(self, root=folder)

    def older(self, version: str) -> None:
        """Make the store one of an older schema, with its snapshots."""
        here = location_at(Path(self.store))
        catalogs = [Path(self.store) / "catalog.sqlite"]
        catalogs += [Path(self.store) / "snapshots" / f"{name}.sqlite" for name in here.snapshots.names()]
        for path in catalogs:
            with closing(sqlite3.connect(path)) as catalog, catalog:
                if catalog.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone() != (migrations.newest(),):
                    continue  # an upgrade that was killed did not come to it
                for revision, statements in BACK.items():
                    for statement in statements if revision > version else ():
                        catalog.execute(statement)
                catalog.execute(f"UPDATE {VERSION_TABLE} SET version_num = ?", (version,))

    def backups(self) -> dict[str, str]:
        """Return the backups left by upgrades, with their schemas."""
        results = {}
        for path in sorted(Path(self.store).glob("*.backup.sqlite")):
            with closing(sqlite3.connect(path)) as backup:
                assert backup.execute("PRAGMA quick_check").fetchone() == ("ok",)
                (results[path.name],) = backup.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()
        return results

    def others(self) -> list[str]:
        """Return the extra files: neither Lance's nor SQLite's logs nor locks."""
        folder = Path(self.store)
        paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        ours = [str(p) for p in paths if p.parts[0] not in {"vectors", "locks"} and p.suffix not in _LOGS]
        return sorted(ours + [path.name for path in self.root.iterdir() if path != folder])


_LOGS = {".sqlite-wal", ".sqlite-shm"}


@dataclass(frozen=True)
class ClusterPlace:
    """A store in a schema of a PostgreSQL database and a prefix of a bucket, named after `root`."""

    root: Path
    server: Server
    env: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> str:
        """The value for `--store`."""
        return self.server.place(self.root)

    @property
    def init(self) -> list[str]:
        """The command which creates the store."""
        return ["init", "--vectors", self.server.vectors(self.root)]

    def fresh(self, name: str) -> ClusterPlace:
        """Return another place, with no store yet."""
        return replace(self, root=self.root / name)

    def older(self, version: str) -> None:
        """Do nothing: the first schema in PostgreSQL is the newest."""

    def others(self) -> list[str]:
        """Return the remaining notes of work."""
        return location_at(self.store).locks.notes()


def cluster_place(root: Path, request: pytest.FixtureRequest) -> ClusterPlace:
    """Return a place in the servers of this test run."""
    server = request.getfixturevalue("server")
    return ClusterPlace(root, server, server.env)
