"""`export`: stream rows to a Parquet, CSV or JSON file.

Writes to a draft beside the file and renames it when complete: an interrupted export leaves nothing. Memory is bounded
by `_CHUNK_BYTES`, whatever the store's size (apart from DuckDB's own need to sort or group).
"""

from __future__ import annotations

import json
import logging
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import polars as pl
import pyarrow as pa
from sqlalchemy import select

from lark_store.core.paths import exists, is_folder
from lark_store.core.tabular import writable
from lark_store.errors import InputError, NameUnknownError, NothingToScoreError, QueryError
from lark_store.query.select.hints import for_sketches
from lark_store.query.select.resolve import Group, committed_groups
from lark_store.query.select.sketchers import with_sketcher
from lark_store.query.sql.connection import distinct
from lark_store.query.sql.engine import answer
from lark_store.query.sql.views import VIEWS
from lark_store.schema.catalog import Checkpoint, FormatVariant, Sketcher, Source
from lark_store.schema.database import Database, find, find_sketcher
from lark_store.schema.table_schemas import SKETCH_COLUMNS, sketch_schema
from lark_store.schema.vectors import ROWS_PER_BATCH, ROWS_PER_TEXT_BATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    import duckdb

    from lark_store.specs import ExportSpec

    Write = Callable[[pa.Table], None]

_LOG = logging.getLogger(__name__)
_CHUNK_BYTES = 32 << 20
_CAST = "cast it, as in `x::VARCHAR`"
VECTOR = "the unit sketch times the square root of k: divide by it, or scale to norm 1, for cosines"


def export(db: Database, view_or_query: str, path: Path, *, overwrite: bool) -> int:
    """Write the rows of a view or of a SELECT; see `Store.export`."""
    _check(path, overwrite=overwrite)

    def written(connection: duckdb.DuckDBPyConnection, statement: duckdb.Statement) -> int:
        reader = connection.sql(statement).to_arrow_reader(ROWS_PER_TEXT_BATCH)
        schema = _schema(reader.schema)
        return _write(path, schema, _batches(reader, schema), overwrite=overwrite)

    return answer(db, _query(view_or_query), written)


def export_vectors(db: Database, path: Path, spec: ExportSpec) -> int:
    """Write committed sketches with their vectors; see `Store.export`."""
    _check(path, overwrite=spec.overwrite)
    if path.suffix.lower() != ".parquet":
        raise InputError(
            f"`{path.name}` is not a .parquet file; vectors can only be written as Parquet",
            "choose a .parquet file",
        )
    sketcher_row, groups = _groups(db, spec)
    facts = {"sketcher": sketcher_row.name, "k": sketcher_row.k, "dtype": sketcher_row.dtype, "vector": VECTOR}
    columns = [*SKETCH_COLUMNS, "vector"]
    stored = sketch_schema(sketcher_row.k, sketcher_row.dtype)
    schema = pa.schema([stored.field(name) for name in columns], {"lark_store": json.dumps(facts)})
    rows = (b for g in groups for b in db.vectors.scan(g.table, columns, g.filter, ROWS_PER_BATCH))
    tables = (pa.Table.from_batches([batch]).cast(schema) for batch in rows)
    return _write(path, schema, tables, overwrite=spec.overwrite)


def _groups(db: Database, spec: ExportSpec) -> tuple[Sketcher, list[Group]]:
    """Return the sketcher and its committed groups with these names; an empty list selects all."""
    spec, notes = with_sketcher(db, spec)
    with db.session() as session:
        sketcher_row = find_sketcher(session, spec.sketcher)
        checkpoint_rows = [find(session, Checkpoint, name) for name in spec.checkpoints]
        for kind, names in ((Source, spec.sources), (FormatVariant, spec.variants)):
            for name in names:
                find(session, kind, name)
        everywhere = list(session.scalars(select(Checkpoint).order_by(Checkpoint.id)))
        groups = [
            group
            for checkpoint in checkpoint_rows or everywhere
            for group in committed_groups(session, sketcher_row, checkpoint)
            if (not spec.sources or group.source.name in spec.sources)
            and (not spec.variants or group.variant.name in spec.variants)
        ]
    if not groups:
        place = checkpoint_rows[0] if checkpoint_rows else None
        raise NothingToScoreError(
            f"no committed `{sketcher_row.name}` sketches match these filters",
            for_sketches(db, sketcher_row, place, spec.sources, spec.variants),
        )
    for note in notes:
        _LOG.warning(note)
    return sketcher_row, groups


def _query(view_or_query: str) -> str:
    """Return the SELECT for a view's rows, or the given SELECT itself."""
    if view_or_query in VIEWS:
        return f"FROM {view_or_query}"
    if view_or_query.isidentifier():
        raise NameUnknownError.of("view", view_or_query, VIEWS, "the views are always there")
    return view_or_query


def _check(path: Path, *, overwrite: bool) -> None:
    if path.suffix.lower() not in _WRITERS:
        raise InputError(f"unsupported file extension of `{path}`", f"use one of {', '.join(_WRITERS)}")
    if exists(path) and not (overwrite and path.is_file()):
        kind = "a file" if path.is_file() else "something other than a file"
        raise InputError(
            f"there is {kind} at `{path}` already", "choose another path, or replace a file with `--overwrite`"
        )
    if not is_folder(path.parent):
        raise InputError(f"there is no folder `{path.parent}`", "create it first")


# --- rows ----------------------------------------------------------------------------------------------------------


def _schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema of the written columns."""
    for f in schema:
        if not _is_exportable(f.type):
            raise QueryError(f"column `{f.name}` has a type that can't be exported: {f.type}", _CAST)
    return pa.schema([pa.field(name, _kind(f.type)) for name, f in zip(distinct(schema.names), schema, strict=True)])


def _is_exportable(kind: pa.DataType) -> bool:
    if pa.types.is_interval(kind) or pa.types.is_union(kind):
        return False
    return not pa.types.is_nested(kind) or all(_is_exportable(kind.field(i).type) for i in range(kind.num_fields))


def _kind(kind: pa.DataType) -> pa.DataType:
    """Return the type a column is written as: ordinary numbers instead of DuckDB's wide ones."""
    if pa.types.is_decimal(kind):
        return pa.int64() if (kind.precision, kind.scale) == (38, 0) else pa.float64()
    return kind


def _batches(reader: pa.RecordBatchReader, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield a query's rows; raises failures on the way as query errors."""
    try:
        for batch in reader:
            yield pa.table([_cast(column, f) for column, f in zip(batch.columns, schema, strict=True)], schema=schema)
    except OSError as error:  # DuckDB's errors, once rows are streaming
        raise QueryError(str(error).strip()) from error


def _cast(column: pa.Array, to: pa.Field) -> pa.Array:
    if column.type == to.type:
        return column
    try:
        return column.cast(to.type)
    except pa.ArrowInvalid as error:
        raise QueryError(
            f"column `{to.name}` has a number that doesn't fit in 64 bits", "cast it, as in `x::DOUBLE`"
        ) from error


def _chunks(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Combine small tables into chunks of useful size."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        if sum(part.nbytes for part in pending) >= _CHUNK_BYTES:
            yield pa.concat_tables(pending)
            pending = []
    if pending:
        yield pa.concat_tables(pending)


# --- files ---------------------------------------------------------------------------------------------------------


def _write(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], *, overwrite: bool) -> int:
    """Write tables of one schema to a file; return the number of rows."""
    n = 0
    try:
        with _draft(path, overwrite=overwrite) as file, _WRITERS[path.suffix.lower()](file, schema) as write:
            for chunk in _chunks(tables):
                if len(chunk):
                    write(chunk)
                n += len(chunk)
    except (pa.ArrowNotImplementedError, pl.exceptions.PolarsError) as error:
        raise QueryError(f"a column has a type that can't be written to `{path.suffix}`: {error}", _CAST) from error
    return n


@contextmanager
def _draft(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Open a draft file; rename it to `path` when complete."""
    draft = path.with_name(f".{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        with draft.open("xb") as file:
            yield file
        _check(path, overwrite=overwrite)  # another process may have created it meanwhile
        draft.replace(path)
    except OSError as error:
        if error.strerror is None:
            raise
        raise InputError(f"can't write `{path}`: {error.strerror}", "choose another file") from error
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _parquet(file: BinaryIO, schema: pa.Schema) -> Iterator[Write]:
    from pyarrow import parquet

    texts = [f.name for f in schema if pa.types.is_string(f.type)]  # dictionaries of vectors would gain nothing
    plain = [f.name for f in schema if not pa.types.is_nested(f.type)]
    options: dict[str, Any] = {"use_dictionary": texts, "write_statistics": plain, "compression": "zstd"}
    with parquet.ParquetWriter(file, schema, **options) as writer:
        yield writer.write_table


def _frame(table: pa.Table, *, nested: bool) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return writable(frame, nested=nested)


@contextmanager
def _csv(file: BinaryIO, schema: pa.Schema) -> Iterator[Write]:
    _frame(schema.empty_table(), nested=False).write_csv(file)
    yield lambda table: _frame(table, nested=False).write_csv(file, include_header=False)


@contextmanager
def _jsonl(file: BinaryIO, schema: pa.Schema) -> Iterator[Write]:  # noqa: ARG001  # JSON lines have no header
    yield lambda table: _frame(table, nested=True).write_ndjson(file)


@contextmanager
def _json(file: BinaryIO, schema: pa.Schema) -> Iterator[Write]:  # noqa: ARG001  # JSON has no header
    before = b"[\n"

    def write(table: pa.Table) -> None:
        nonlocal before
        rows = _frame(table, nested=True).write_ndjson().removesuffix("\n")
        file.write(before + rows.replace("\n", ",\n").encode())
        before = b",\n"

    yield write
    file.write(b"[]\n" if before == b"[\n" else b"\n]\n")


_WRITERS: dict[str, Callable[[BinaryIO, pa.Schema], AbstractContextManager[Write]]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _jsonl,
}
