"""The vector store: the Arrow schemas of the Lance tables, and the one place where they are opened.

Batch and file sizes, and which columns are indexed, follow measurements: without the scalar indices a search of one
group reads every vector; scans at Lance's default batch size hold gigabytes; batches of 64 rows write fastest.
"""

from __future__ import annotations

import json
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lark_store.errors import StoreError
from lark_store.schema.codes import code_bytes, codes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import polars as pl
    from numpy.typing import NDArray

ROWS_PER_BATCH = 64
ROWS_PER_TEXT_BATCH = 4096
_INDEX_ATTEMPTS = 5
# What an open store may keep of indices and of versions' metadata. Lance's own limits are 6 GiB and 1 GiB: a process
# that writes all day would fill them with versions that nobody reads any more.
_CACHES = {"index_cache_size_bytes": 32 << 20, "metadata_cache_size_bytes": 32 << 20}


def _field(name: str, kind: pa.DataType, *, null: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=null)


SAMPLES = pa.schema(
    [
        _field("source", pa.string()),
        _field("sample_id", pa.string()),
        _field("prompt", pa.string(), null=True),
        _field("response", pa.string(), null=True),
        _field("text", pa.string(), null=True),
        _field("label", pa.string(), null=True),
        _field("meta", pa.string()),
        _field("content_sha256", pa.string()),
    ]
)
FAILURES = pa.schema(
    [
        _field("ingest_run", pa.int64()),
        _field("checkpoint", pa.string()),
        _field("source", pa.string()),
        _field("variant", pa.string()),
        _field("sample_id", pa.string()),
        _field("reason", pa.string()),
    ]
)
INFLUENCE = pa.schema(
    [
        _field("score_run", pa.int64()),
        _field("checkpoint", pa.string()),
        _field("query_id", pa.string()),
        _field("source", pa.string()),
        _field("variant", pa.string()),
        _field("sample_id", pa.string()),
        _field("score", pa.float32()),
        _field("rank", pa.int32()),
    ]
)
SOURCE_INFLUENCE = pa.schema(
    [
        _field("score_run", pa.int64()),
        _field("checkpoint", pa.string()),
        _field("query_id", pa.string()),
        _field("source", pa.string()),
        _field("variant", pa.string()),
        _field("max", pa.float32()),
        _field("argmax", pa.string()),
        _field("mean", pa.float32()),
        _field("std", pa.float32()),
        _field("n", pa.int64()),
    ]
)
TABLES = {
    "samples": SAMPLES,
    "failures": FAILURES,
    "influence": INFLUENCE,
    "source_influence": SOURCE_INFLUENCE,
}
# Which columns carry a scalar index: few distinct values take a bitmap, many a B-tree.
INDICES = {
    "samples": {"source": "bitmap", "sample_id": "btree"},
    "failures": {"ingest_run": "bitmap"},
    "influence": {"score_run": "bitmap"},
    "source_influence": {"score_run": "bitmap"},
    "sketches": {
        "checkpoint": "bitmap",
        "source": "bitmap",
        "variant": "bitmap",
        "ingest_run": "bitmap",
        "row_key": "btree",
    },
    "embeddings": {"source": "bitmap", "sample_id": "btree"},
}
SKETCH_PREFIX = "sketches_"
EMBEDDING_PREFIX = "embeddings_"
SKETCH_COLUMNS = (
    "row_key",
    "checkpoint",
    "source",
    "variant",
    "sample_id",
    "ingest_run",
    "n_tokens",
    "n_loss_tokens",
    "loss",
    "grad_norm",
)


def sketch_schema(k: int, dtype: str) -> pa.Schema:
    """Return the schema of a sketch table: the columns of `SKETCH_COLUMNS`, `code` and `vector`, (k,) of `dtype`.

    `code` is the vector's code (`lark_store.schema.codes`). `vector` is the unit-norm sketch scaled to norm √k (so that
    float16's range is well used); `grad_norm` is the sketch's own norm, the estimate of ‖∇L‖ that turns cosines back
    into unbiased dot products; `loss` is in nats per target token.
    """
    value = pa.float16() if dtype == "float16" else pa.float32()
    kinds: dict[str, pa.DataType] = {
        "ingest_run": pa.int64(),
        "n_tokens": pa.int32(),
        "n_loss_tokens": pa.int32(),
        "loss": pa.float32(),
        "grad_norm": pa.float32(),
    }
    scalars = [_field(name, kinds.get(name, pa.string())) for name in SKETCH_COLUMNS]
    code = _field("code", pa.list_(pa.uint8(), code_bytes(k)))
    return pa.schema([*scalars, code, _field("vector", pa.list_(value, k))])


def embedding_schema(dimensions: int) -> pa.Schema:
    """Return the schema of a table of samples' embeddings: unit vectors, (dimensions,) float32, and whose they are."""
    names = [_field(name, pa.string()) for name in ("source", "sample_id", "content_sha256")]
    return pa.schema([*names, _field("vector", pa.list_(pa.float32(), dimensions))])


def sketch_rows(rows: list[dict[str, Any]], vectors_NK: NDArray[Any], schema: pa.Schema) -> pa.Table:
    """Build rows of a sketch table: the columns of `SKETCH_COLUMNS` as dicts, the vectors as an array (N, K)."""
    table = pa.Table.from_pylist(rows, schema=pa.schema([schema.field(name) for name in SKETCH_COLUMNS]))
    arrays = {"vector": vectors_NK}
    if "code" in schema.names:  # a table made by an older lark-store gets its codes from `index build`
        arrays["code"] = codes_of(vectors_NK)
    for name in schema.names[len(SKETCH_COLUMNS) :]:
        kind = schema.field(name).type
        values = pa.array(arrays[name].reshape(-1), type=kind.value_type)
        table = table.append_column(schema.field(name), pa.FixedSizeListArray.from_arrays(values, type=kind))
    return table


def row_key(checkpoint: str, source: str, variant: str, sample_id: str) -> str:
    """Return a sketch's key within its table; slugs hold no `/`, so it is unambiguous.

    >>> row_key("epoch-2", "pubmed", "raw", "21645374")
    'epoch-2/pubmed/raw/21645374'
    """
    return f"{checkpoint}/{source}/{variant}/{sample_id}"


def quoted(value: str) -> str:
    """Return a text as a literal of Lance's filter language.

    >>> quoted("it's")
    "'it''s'"
    """
    return "'" + value.replace("'", "''") + "'"


def where(**equal: str | int | Iterable[str] | Iterable[int]) -> str:
    """Return a Lance filter: each column equal to its value, or to one of its values.

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
    """The LanceDB database at `uri`; every read and write of a Lance table goes through here.

    With `versions`, those of a snapshot, each table is read as it was then, and others are not seen.
    """

    def __init__(self, uri: str, versions: dict[str, int] | None = None) -> None:
        self.uri = uri
        self.versions = versions
        self._connection: Any = None

    @property
    def connection(self) -> Any:
        """The LanceDB connection, made when first needed: importing lancedb takes seconds."""
        if self._connection is None:
            import lancedb

            self._connection = lancedb.connect(self.uri, session=lancedb.Session(**_CACHES))
        return self._connection

    @cached_property
    def files(self) -> Any:
        """The files below `uri`, wherever it is: `lance.file.LanceFileSession`, with list, upload_file and so on."""
        from lance.file import LanceFileSession

        return LanceFileSession(self.uri)

    def create(self) -> None:
        """Make the empty tables of a fresh store."""
        for name, schema in TABLES.items():
            self.connection.create_table(name, schema=schema)

    def table_names(self) -> list[str]:
        """Return the names of all tables."""
        if self.versions is not None:
            return sorted(self.versions)
        return list(self.connection.list_tables(limit=10_000).tables)

    def table(self, name: str) -> Any:
        """Open a table at its newest version, or at the snapshot's: then nothing can be written to it."""
        if self.versions is None:
            connection = self.connection
            try:
                return connection.open_table(name)
            except ValueError as error:
                if "not found" not in str(error):
                    raise
                raise StoreError(
                    f"the table `{name}` of the store is gone",
                    "`lark-store db check` says what is wrong, and what mends it",
                ) from error
        if name not in self.versions:
            raise ValueError(f"the snapshot has no table {name}")
        try:
            table = self.connection.open_table(name)
            table.checkout(self.versions[name])
        except (ValueError, RuntimeError, OSError) as error:
            raise StoreError(
                f"version {self.versions[name]} of the table `{name}`, which the snapshot needs, can't be read",
                "was the store changed by another program? remove the snapshot with `lark-store snapshot remove`",
            ) from error
        return table

    def has(self, name: str) -> bool:
        """Tell whether a table is there and whole: one that is being made is listed before it can be opened."""
        if self.versions is not None:
            return name in self.versions
        connection = self.connection  # a folder that may not be read is another fault
        try:
            connection.open_table(name)
        except (ValueError, FileNotFoundError) as error:
            if "not found" not in str(error).lower():  # a server that does not answer is no table that is missing
                raise
            return False
        return True

    def sketches(self, fingerprint: str, *, k: int, dtype: str) -> Any:
        """Open the table of a sketcher's sketches, made if it is not there; an older one may have no codes."""
        name = sketch_table(fingerprint)
        if self.has(name):
            return self.table(name)
        return self.connection.create_table(name, schema=sketch_schema(k, dtype), exist_ok=True)

    def embeddings(self, name: str, dimensions: int) -> Any:
        """Open the table of an encoder's embeddings, made if it is not there."""
        return self.connection.create_table(name, schema=embedding_schema(dimensions), exist_ok=True)

    def append(self, table: Any, rows: pa.Table) -> int:
        """Add rows in one commit: all or nothing. Returns the version that holds them."""
        return int(table.add(rows).version)

    def put(self, table: Any, rows: pa.Table | pa.RecordBatch, keys: list[str]) -> int:
        """Put rows in the place of those with the same keys, in one commit. For narrow rows only: it takes memory."""
        merge = table.merge_insert(keys).when_matched_update_all().when_not_matched_insert_all()
        return int(merge.execute(rows).version)

    def sketch_tables(self) -> list[str]:
        """Return the names of the tables of sketches that are whole."""
        return self._of_kind(SKETCH_PREFIX)

    def embedding_tables(self) -> list[str]:
        """Return the names of the tables of embeddings that are whole."""
        return self._of_kind(EMBEDDING_PREFIX)

    def _of_kind(self, prefix: str) -> list[str]:
        return sorted(name for name in self.table_names() if name.startswith(prefix) and self.has(name))

    def write_files(self, table: Any, rows: pa.Table) -> list[str]:
        """Write rows to data files that no version of the table has yet; returns what `append_files` takes."""
        from lance.fragment import write_fragments

        made = write_fragments(rows, table.to_lance().uri, schema=table.schema, mode="append")
        return [json.dumps(fragment.to_json()) for fragment in made]

    def append_files(self, table: Any, files: list[str]) -> int:
        """Add data files, written here or elsewhere, in one commit. Returns the version that holds them."""
        from lance import FragmentMetadata, LanceDataset, LanceOperation

        dataset = table.to_lance()
        fragments = [FragmentMetadata.from_json(file) for file in files]
        version = LanceDataset.commit(
            dataset.uri, LanceOperation.Append(fragments), read_version=dataset.version
        ).version
        table.checkout_latest()
        return int(version)

    def refresh_indices(self, table: Any) -> None:
        """Bring the scalar indices of a table up to all of its rows, building those that are missing.

        Another process may be doing the same: after a few conflicts it is left to that one. An index is speed alone.
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

    def _build_indices(self, table: Any, wanted: dict[str, str]) -> None:
        from lancedb.index import Bitmap, BTree

        indexed = {column for index in table.list_indices() for column in index.columns}
        for column, index in wanted.items():
            if column not in indexed:
                table.create_index(column, config=Bitmap() if index == "bitmap" else BTree())
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
        """Read a table's columns whole, as a polars frame: for small answers."""
        import polars as pl

        frame = pl.from_arrow(self._scanner(table, columns, filter_, ROWS_PER_TEXT_BATCH).to_table())
        assert isinstance(frame, pl.DataFrame)
        return frame

    def _scanner(self, table: str, columns: Iterable[str], filter_: str | None, batch_rows: int) -> Any:
        dataset = self.table(table).to_lance()
        return dataset.scanner(columns=list(columns), filter=filter_, batch_size=batch_rows)


def kind_of(table: str) -> str:
    """Return what a table's rows are, a key of `INDICES`: the tables of sketches and of embeddings are several.

    >>> kind_of("sketches_01234567")
    'sketches'
    """
    kind = next((prefix for prefix in (SKETCH_PREFIX, EMBEDDING_PREFIX) if table.startswith(prefix)), table)
    return kind.removesuffix("_")


def sketch_table(fingerprint: str) -> str:
    """Return the name of the table that holds a sketcher's sketches.

    >>> sketch_table("0123456789abcdef")
    'sketches_01234567'
    """
    return SKETCH_PREFIX + fingerprint[:8]
