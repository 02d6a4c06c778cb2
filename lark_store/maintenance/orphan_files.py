"""Find the missing and orphaned files of a Lance table."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from lark_store.maintenance.compact import clean

if TYPE_CHECKING:
    from lark_store.schema.database import Database
    from lark_store.schema.vectors import VectorStore

# Reading a version needs no transaction file; Lance lists only existing index files.
NEEDED = ("manifest", "data file", "deletion file")
_FOLDERS = ("data/", "_deletions/", "_indices/", "_transactions/")
_ALL_AGES = timedelta(days=36_500)


@dataclass(frozen=True)
class Files:
    """A table's versions, its number of missing files by (version, kind), and its orphaned files."""

    seen: set[int]
    lost: dict[tuple[int, str], int]
    orphans: list[str]


def files_of(vectors: VectorStore, table: str, versions: set[int]) -> Files:
    """Compare a table's files with those its versions need; `versions` are checked for missing files.

    Files are listed first, so the uncommitted files of a writer may look like orphans.
    """
    dataset = vectors.newest(table).to_lance()
    existing = {path for batch in dataset.all_files() for path in batch.column("path").to_pylist()}
    orphans = {path for path in existing if path.startswith(_FOLDERS)}
    seen: set[int] = set()
    lost: dict[tuple[int, str], int] = defaultdict(int)
    for batch in dataset.tracked_files():
        columns = (batch.column(name).to_pylist() for name in ("version", "path", "type"))
        for version, path, kind in zip(*columns, strict=True):
            seen.add(version)
            orphans.discard(path)
            if version in versions and path not in existing:
                lost[version, kind] += 1
    return Files(seen, dict(lost), sorted(orphans))


def remove_orphans(db: Database, table: str, files: set[str]) -> None:
    """Remove the given files if they are still orphans. Call it only if no process writes."""
    clean(db, table, _ALL_AGES, unverified=True)
    for path in files & set(files_of(db.vectors, table, set()).orphans):  # Lance leaves small files
        with suppress(OSError):  # already removed
            db.vectors.files.delete_file(f"{table}.lance/{path}")
