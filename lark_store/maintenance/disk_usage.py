"""Disk usage of a store by table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.schema.vectors import VectorStore

if TYPE_CHECKING:
    from lark_store.schema.backends.base import Location

TABLES = {
    "table": pl.String,
    "rows": pl.Int64,
    "files": pl.Int64,
    "versions": pl.Int64,
    "bytes": pl.Int64,
}


def files_in(vectors: VectorStore, table: str) -> dict[str, int]:
    """Return the sizes in bytes of a Lance table's files, by path below its folder."""
    sizes: dict[str, int] = {}
    for batch in vectors.table(table).to_lance().all_files():
        sizes |= dict(zip(batch.column("path").to_pylist(), batch.column("size_bytes").to_pylist(), strict=True))
    return sizes


def n_files(table: Any) -> int:
    """Return the number of data files in a table's newest version."""
    return sum(len(fragment.data_files()) for fragment in table.to_lance().get_fragments())


def tables(location: Location) -> pl.DataFrame:
    """Return one row per Lance table, then the catalog and the snapshots' catalogs."""
    vectors = VectorStore(location.vectors)
    rows: list[tuple[str, int | None, int, int | None, int]] = []
    for name in sorted(vectors.table_names()):
        if not vectors.has(name):
            continue
        table, files = vectors.table(name), files_in(vectors, name)
        n_versions = sum(path.startswith("_versions/") and path.endswith(".manifest") for path in files)
        rows.append((name, int(table.count_rows()), n_files(table), n_versions, sum(files.values())))
    for name, sizes in (("catalog", location.catalog.sizes()), ("snapshots", location.snapshots.sizes())):
        rows.append((name, None, len(sizes), None, sum(sizes)))
    return pl.DataFrame(rows, schema=TABLES, orient="row")
