"""What a store takes on disk, table by table."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.schema.vectors import VectorStore

if TYPE_CHECKING:
    from lark_store.schema.database import Location

TABLES = {
    "table": pl.String,
    "rows": pl.Int64,
    "files": pl.Int64,
    "versions": pl.Int64,
    "bytes": pl.Int64,
}


def bytes_in(folder: Path) -> int:
    """Return the bytes of all files below a folder; files may come and go meanwhile."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(where) / name).stat().st_size
    return total


def folder_of(vectors: VectorStore, table: str) -> Path:
    """Return the folder of a Lance table."""
    return Path(vectors.uri) / f"{table}.lance"


def n_files(table: Any) -> int:
    """Return how many data files the newest version of a table has."""
    return sum(len(fragment.data_files()) for fragment in table.to_lance().get_fragments())


def tables(location: Location) -> pl.DataFrame:
    """Return a row for each Lance table, for the catalog and for the snapshots' catalogs."""
    vectors = VectorStore(str(location.vectors))
    rows: list[tuple[str, int | None, int, int | None, int]] = []
    for name in sorted(vectors.table_names()):
        if not vectors.has(name):
            continue
        table, folder = vectors.table(name), folder_of(vectors, name)
        n_versions = sum(1 for _ in (folder / "_versions").glob("*.manifest"))
        rows.append((name, int(table.count_rows()), n_files(table), n_versions, bytes_in(folder)))
    catalog = [path for path in location.root.glob("catalog.sqlite*") if path.is_file()]
    rows.append(("catalog", None, len(catalog), None, sum(path.stat().st_size for path in catalog)))
    copies = list(location.snapshots.glob("*.sqlite"))
    rows.append(("snapshots", None, len(copies), None, bytes_in(location.snapshots)))
    return pl.DataFrame(rows, schema=TABLES, orient="row")
