"""The files of a Lance table: which its versions need, which are lost, and which no version has."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from lark_store.upkeep.optimize import clean

if TYPE_CHECKING:
    from lark_store.schema.database import Database
    from lark_store.schema.vectors import VectorStore

# A version is read without its transaction file; of index files Lance names those that it finds.
NEEDED = ("manifest", "data file", "deletion file")
_PLACES = ("data/", "_deletions/", "_indices/", "_transactions/")
_EVER = timedelta(days=36_500)


@dataclass(frozen=True)
class Files:
    """Of a table: the versions that it has, files lost by (version, kind), and the files that no version has."""

    seen: set[int]
    lost: dict[tuple[int, str], int]
    orphans: list[str]


def files_of(vectors: VectorStore, table: str, versions: set[int]) -> Files:
    """Compare the files that a table's versions name with those that are there; `versions` must be whole.

    What is there is listed first: of a writer that is about to commit, the files may look like orphans.
    """
    dataset = vectors.connection.open_table(table).to_lance()
    there = {path for batch in dataset.all_files() for path in batch.column("path").to_pylist()}
    orphans = {path for path in there if path.startswith(_PLACES)}
    seen: set[int] = set()
    lost: dict[tuple[int, str], int] = defaultdict(int)
    for batch in dataset.tracked_files():
        columns = (batch.column(name).to_pylist() for name in ("version", "path", "type"))
        for version, path, kind in zip(*columns, strict=True):
            seen.add(version)
            orphans.discard(path)
            if version in versions and path not in there:
                lost[version, kind] += 1
    return Files(seen, dict(lost), sorted(orphans))


def remove_orphans(db: Database, table: str, known: set[str]) -> None:
    """Remove files that no version has, of those that are known as such. When nobody writes."""
    clean(db, table, _EVER, unverified=True)
    for path in known & set(files_of(db.vectors, table, set()).orphans):  # Lance leaves small ones
        with suppress(OSError):  # somebody else removed it
            db.vectors.files.delete_file(f"{table}.lance/{path}")
