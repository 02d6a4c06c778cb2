"""Where the store of a campaign is: all that a campaign knows of the kind of its place.

A place that is no folder is another class with these methods; no campaign needs to change for it.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from lark_store import migrations
from lark_store.schema.database import Location

# What takes a revision back, newest first. What that revision added is lost.
BACK = {
    "0004": ["DROP TABLE work", "DROP TABLE snapshot", "ALTER TABLE store_meta DROP COLUMN vectors"],
    "0003": ["DROP TABLE study"],
    "0002": ["DROP TABLE search_index"],
}


@dataclass(frozen=True)
class FolderPlace:
    """A store in a folder of its own, `root`; `env` is what its commands need in their environment."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> str:
        """What `--store` takes."""
        return str(self.root / "lark.store")

    def fresh(self, name: str) -> FolderPlace:
        """Return another place, with no store yet."""
        folder = self.root / name
        folder.mkdir()
        return replace(self, root=folder)

    def older(self, version: str) -> None:
        """Make the store one of an older schema, with its snapshots."""
        here = Location(Path(self.store))
        for place in (here, *(replace(here, snapshot=name) for name in here.snapshot_names())):
            if migrations.version(place) != migrations.newest():
                continue  # an upgrade that was killed did not come to it
            with closing(sqlite3.connect(place.catalog)) as catalog, catalog:
                for revision, statements in BACK.items():
                    for statement in statements if revision > version else ():
                        catalog.execute(statement)
                catalog.execute(f"UPDATE {migrations.VERSION_TABLE} SET version_num = ?", (version,))

    def backups(self) -> dict[str, str]:
        """Return the backups that upgrades left, with the schema that each has."""
        found = {}
        for path in sorted(Path(self.store).glob("*.backup.sqlite")):
            with closing(sqlite3.connect(path)) as backup:
                assert backup.execute("PRAGMA quick_check").fetchone() == ("ok",)
                (found[path.name],) = backup.execute(f"SELECT version_num FROM {migrations.VERSION_TABLE}").fetchone()
        return found

    def others(self) -> list[str]:
        """Return what lies beside the tables: the store's files that are not Lance's, SQLite's logs or locks."""
        folder = Path(self.store)
        paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        ours = [str(p) for p in paths if p.parts[0] not in {"vectors", "locks"} and p.suffix not in _LOGS]
        return sorted(ours + [path.name for path in self.root.iterdir() if path != folder])


_LOGS = {".sqlite-wal", ".sqlite-shm"}
