"""The vector store: all access to the Lance tables.

Batch sizes, file sizes and indices come from measurements: without scalar indices, a search of one group reads every
vector; scans with Lance's default batch size take gigabytes of memory; batches of 64 rows write fastest.
"""

from __future__ import annotations

import json
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from lark_store.core.fork import use_lance
from lark_store.errors import StoreError
from lark_store.schema.table import Table, open_table
from lark_store.schema.table_schemas import (
    EMBEDDING_PREFIX,
    INDICES,
    SKETCH_PREFIX,
    TABLES,
    embedding_schema,
    kind_of,
    projection,
    sketch_schema,
    sketch_table,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import polars as pl
    import pyarrow as pa

ROWS_PER_BATCH = 64
ROWS_PER_TEXT_BATCH = 4096
_INDEX_ATTEMPTS = 5
# Cache limits for indices and version metadata. Lance's defaults are 6 GiB and 1 GiB, which a long-running writer fills
# with old versions.
CACHES = {"index_cache_size_bytes": 32 << 20, "metadata_cache_size_bytes": 32 << 20}


def row_key(checkpoint: str, source: str, variant: str, sample_id: str) -> str:
    """Return a sketch's key within its table; it is unambiguous because slugs have no `/`.

    >>> row_key("epoch-2", "pubmed", "raw", "21645374")
    'epoch-2/pubmed/raw/21645374'
    """
    return f"{checkpoint}/{source}/{variant}/{sample_id}"


def quoted(value: str) -> str:
    """Return a text as a literal for Lance filters.

    >>> quoted("it's")
    "'it''s'"
    """
    return "'" + value.replace("'", "''") + "'"


def where(**equal: str | int | Iterable[str] | Iterable[int]) -> str:
    """Return a Lance filter: each column equals its value, or one of its values.

    >>> where(source="pubmed", ingest_run=[3, 4])
    "source = 'pubmed' AND ingest_run IN (3, 4)"
    """

    def literal(value: str | int) -> str:
        return quoted(value) if isinstance(value, str) else str(value)

    terms = []
    for column, value in equal.items():
        if isinstance(value, str | int):
            terms.append(f"{column} = {literal(value)}")
        else:
            values = [literal(v) for v in value]
            terms.append(f"{column} IN ({', '.join(values)})" if values else "false")
    return " AND ".join(terms)


class VectorStore:
    """The LanceDB database at `uri`; all reads and writes of Lance tables go through it.

    With a snapshot's `versions`, each table is read at its version and other tables are hidden. Without `use_indices`,
    `scan` and `read` ignore indices, which may be damaged.
    """

    def __init__(self, uri: str, versions: dict[str, int] | None = None, *, use_indices: bool = True) -> None:
        self.uri = uri
        self.versions = versions
        self.use_indices = use_indices
        self._connection: Any = None

    @property
    def connection(self) -> Any:
        """The LanceDB connection, opened by the first write: see `lark_store.schema.table`."""
        if self._connection is None:
            use_lance()
            import lancedb

            self._connection = lancedb.connect(self.uri, session=lancedb.Session(**CACHES))
        return self._connection

    @cached_property
    def files(self) -> Any:
        """A `lance.file.LanceFileSession` for the files below `uri`, local or in a bucket."""
        use_lance()
        from lance.file import LanceFileSession

        return LanceFileSession(self.uri)

    def create(self) -> None:
        """Create the empty tables of a new store."""
        use_lance()
        import lance

        for name, schema in TABLES.items():
            lance.write_dataset(schema.empty_table(), self._path(name), mode="create")

    def create_missing(self, names: Iterable[str]) -> None:
        """Create tables that an older store lacks, empty."""
        for name in names:
            if not self.has(name):
                self.connection.create_table(name, schema=TABLES[name], exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self.uri}/{name}.lance"

    def table_names(self) -> list[str]:
        """Return the names of all tables."""
        if self.versions is not None:
            return sorted(self.versions)
        if "://" in self.uri:
            return list(self.connection.list_tables(limit=10_000).tables)
        folder = Path(self.uri)
        return sorted(path.stem for path in folder.iterdir() if path.suffix == ".lance") if folder.is_dir() else []

    def newest(self, name: str) -> Table:
        """Open a table at its newest version, even where a snapshot has an older one."""
        return self._open(name, None)

    def _open(self, name: str, version: int | None) -> Table:
        return open_table(name, self._path(name), version, lambda: self.connection)

    def table(self, name: str) -> Table:
        """Open a table at its newest version, or read-only at the snapshot's version."""
        if self.versions is None:
            try:
                return self.newest(name)
            except ValueError as error:
                if "not found" not in str(error):
                    raise
                raise StoreError(
                    f"the table `{name}` of the store is missing",
                    "`lark-store db check` lists the problems and their repair",
                ) from error
        if name not in self.versions:
            raise ValueError(f"the snapshot has no table {name}")
        try:
            return self._open(name, self.versions[name])
        except (ValueError, RuntimeError, OSError) as error:
            raise StoreError(
                f"version {self.versions[name]} of the table `{name}`, which the snapshot needs, can't be read",
                "check whether another program changed the store; `lark-store snapshot remove` removes the snapshot",
            ) from error

    def tags(self, name: str) -> Any:
        """Return a table's version tags, with methods to list, create, update and delete them.

        Local tables are opened as `file-object-store://`; otherwise Lance leaves an empty folder with a percent-encoded
        name next to each new tag.
        """
        if "://" in self.uri:
            return self.table(name).to_lance().tags
        use_lance()
        import lance

        return lance.dataset(f"file-object-store://{quote(self.table(name).to_lance().uri)}").tags

    def has(self, name: str) -> bool:
        """Tell whether a table can be opened; a table being created is listed earlier."""
        if self.versions is not None:
            return name in self.versions
        try:
            self.newest(name)
        except (ValueError, FileNotFoundError) as error:
            if "not found" not in str(error).lower():  # a server that does not respond is another error
                raise
            return False
        return True

    def sketches(self, fingerprint: str, *, k: int, dtype: str) -> Any:
        """Open a sketcher's table, creating it if needed; older tables may lack codes."""
        name = sketch_table(fingerprint)
        if self.has(name):
            return self.table(name)
        return self.connection.create_table(name, schema=sketch_schema(k, dtype), exist_ok=True)

    def embeddings(self, name: str, dimensions: int) -> Any:
        """Open an encoder's embedding table, creating it if needed."""
        return self.connection.create_table(name, schema=embedding_schema(dimensions), exist_ok=True)

    def append(self, table: Any, rows: pa.Table) -> int:
        """Add rows in one atomic commit; returns the new version."""
        return int(table.add(rows).version)

    def put(self, table: Any, rows: pa.Table | pa.RecordBatch, keys: list[str]) -> int:
        """Insert or replace rows by their keys in one commit. Only for narrow rows, as it takes memory."""
        merge = table.merge_insert(keys).when_matched_update_all().when_not_matched_insert_all()
        return int(merge.execute(rows).version)

    def sketch_tables(self) -> list[str]:
        """Return the names of the sketch tables that can be opened."""
        return self._openable_tables(SKETCH_PREFIX)

    def embedding_tables(self) -> list[str]:
        """Return the names of the embedding tables that can be opened."""
        return self._openable_tables(EMBEDDING_PREFIX)

    def _openable_tables(self, prefix: str) -> list[str]:
        return sorted(name for name in self.table_names() if name.startswith(prefix) and self.has(name))

    def write_files(self, table: Any, rows: pa.Table) -> list[str]:
        """Write rows to uncommitted data files; returns the arguments for `append_files`."""
        from lance.fragment import write_fragments

        fragments = write_fragments(rows, table.to_lance().uri, schema=table.schema, mode="append")
        return [json.dumps(fragment.to_json()) for fragment in fragments]

    def append_files(self, table: Any, files: list[str]) -> int:
        """Commit data files, written by this or another process; returns the new version."""
        from lance import FragmentMetadata, LanceDataset, LanceOperation

        dataset = table.to_lance()
        fragments = [FragmentMetadata.from_json(file) for file in files]
        version = LanceDataset.commit(
            dataset.uri, LanceOperation.Append(fragments), read_version=dataset.version
        ).version
        table.checkout_latest()
        return int(version)

    def refresh_indices(self, table: Any) -> None:
        """Update the scalar indices of a table to cover all rows, and build missing ones.

        Give up after a few conflicts: another process is doing the same, and indices only affect speed.
        """
        if table.count_rows() == 0:
            return
        for attempt in range(_INDEX_ATTEMPTS):
            try:
                self._build_indices(table, INDICES[kind_of(table.name)])
            except (OSError, RuntimeError) as error:
                if "conflict" not in str(error).lower():
                    raise
                time.sleep(0.1 * 2**attempt)
                table.checkout_latest()
            else:
                return

    def _build_indices(self, table: Any, kinds: dict[str, str]) -> None:
        from lancedb.index import Bitmap, BTree

        indexed = {column for index in table.list_indices() for column in index.columns}
        for column, kind in kinds.items():
            if column not in indexed:
                table.create_index(column, config=Bitmap() if kind == "bitmap" else BTree())
        table.to_lance().optimize.optimize_indices()
        table.checkout_latest()

    def scan(
        self,
        table: str,
        columns: Iterable[str],
        filter_: str | None = None,
        batch_rows: int = ROWS_PER_TEXT_BATCH,
    ) -> Iterator[pa.RecordBatch]:
        """Stream a table's columns in record batches of at most `batch_rows` rows."""
        yield from self._scanner(table, columns, filter_, batch_rows).to_batches()

    def read(self, table: str, columns: Iterable[str], filter_: str | None = None) -> pl.DataFrame:
        """Read a table's columns into a polars frame; for small results."""
        import polars as pl

        frame = pl.from_arrow(self._scanner(table, columns, filter_, ROWS_PER_TEXT_BATCH).to_table())
        assert isinstance(frame, pl.DataFrame)
        return frame

    def read_table(self, table: str, columns: Iterable[str], filter_: str | None = None) -> pa.Table:
        """Read a table's columns into an Arrow table; for a few rows."""
        return self._scanner(table, columns, filter_, ROWS_PER_BATCH).to_table()

    def _scanner(self, table: str, columns: Iterable[str], filter_: str | None, batch_rows: int) -> Any:
        dataset = self.table(table).to_lance()
        return dataset.scanner(
            columns=projection(dataset.schema, columns),
            filter=filter_,
            batch_size=batch_rows,
            use_scalar_index=self.use_indices,
        )
