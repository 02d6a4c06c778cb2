"""`export`: rows to a Parquet, CSV or JSON file, streamed.

A file is written beside its place, under a name of its own, and moved there when it is whole: an export that breaks off
leaves nothing. Memory is bounded by `_CHUNK_BYTES`, whatever the store's size (but for what DuckDB itself must hold to
sort or group).
"""

from __future__ import annotations

import json
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import polars as pl
import pyarrow as pa
from sqlalchemy import select

from lark_store.errors import InputError, NameUnknownError, NothingToScoreError, QueryError
from lark_store.query.groups import Group, committed_groups
from lark_store.query.sql.engine import checked, distinct
from lark_store.query.sql.views import VIEWS
from lark_store.schema.catalog import Checkpoint, FormatVariant, Sketcher, Source
from lark_store.schema.database import Database, find
from lark_store.schema.frames import writable
from lark_store.schema.paths import exists, is_folder
from lark_store.schema.vectors import ROWS_PER_BATCH, ROWS_PER_TEXT_BATCH, SKETCH_COLUMNS, sketch_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    Write = Callable[[pa.Table], None]

_CHUNK_BYTES = 32 << 20
_CAST = "cast it, as in `x::VARCHAR`"
VECTOR = "the unit sketch times the square root of k: divide by it, or scale to norm 1, for cosines"


def export(db: Database, what: str, path: Path, *, overwrite: bool = False) -> int:
    """Write a view's rows, or a SELECT's; see `Store.export`."""
    _check(path, overwrite=overwrite)
    with checked(db, _query(what)) as (connection, statement):
        reader = connection.sql(statement).to_arrow_reader(ROWS_PER_TEXT_BATCH)
        schema = _schema(reader.schema)
        return _write(path, schema, _batches(reader, schema), overwrite=overwrite)


def export_vectors(
    db: Database,
    path: Path,
    *,
    checkpoints: Sequence[str],
    sources: Sequence[str],
    variants: Sequence[str],
    sketcher: str,
    overwrite: bool = False,
) -> int:
    """Write committed sketches with their vectors; see `Store.export`."""
    _check(path, overwrite=overwrite)
    if path.suffix.lower() != ".parquet":
        raise InputError(
            f"`{path.name}`: vectors are written as Parquet only; as text they take several times the space",
            "name a .parquet file",
        )
    by, groups = _groups(db, checkpoints, sources, variants, sketcher)
    facts = {"sketcher": by.name, "k": by.k, "dtype": by.dtype, "vector": VECTOR}
    columns = [*SKETCH_COLUMNS, "vector"]
    stored = sketch_schema(by.k, by.dtype)
    schema = pa.schema([stored.field(name) for name in columns], {"lark_store": json.dumps(facts)})
    rows = (b for g in groups for b in db.vectors.scan(g.table, columns, g.filter, ROWS_PER_BATCH))
    tables = (pa.Table.from_batches([batch]).cast(schema) for batch in rows)
    return _write(path, schema, tables, overwrite=overwrite)


def _groups(
    db: Database, checkpoints: Sequence[str], sources: Sequence[str], variants: Sequence[str], sketcher: str
) -> tuple[Sketcher, list[Group]]:
    """Return the sketcher and its committed groups with these names, all where none are given."""
    with db.session() as session:
        by = find(session, Sketcher, sketcher)
        at = [find(session, Checkpoint, name) for name in checkpoints]
        for kind, names in ((Source, sources), (FormatVariant, variants)):
            for name in names:
                find(session, kind, name)
        everywhere = list(session.scalars(select(Checkpoint).order_by(Checkpoint.id)))
        groups = [
            group
            for checkpoint in at or everywhere
            for group in committed_groups(session, by, checkpoint)
            if (not sources or group.source.name in sources) and (not variants or group.variant.name in variants)
        ]
    if not groups:
        raise NothingToScoreError(
            f"there are no committed `{sketcher}` sketches of this kind", "`lark-store show` lists what there is"
        )
    return by, groups


def _query(what: str) -> str:
    """Return the SELECT of a view's rows, or the SELECT that it is."""
    if what in VIEWS:
        return f"FROM {what}"
    if what.isidentifier():
        raise NameUnknownError.of("view", what, VIEWS, "the views are always there")
    return what


def _check(path: Path, *, overwrite: bool) -> None:
    if path.suffix.lower() not in _WRITERS:
        raise InputError(f"`{path}` has none of the endings that are written", f"they are {', '.join(_WRITERS)}")
    if exists(path) and not (overwrite and path.is_file()):
        fact = "a file" if path.is_file() else "something that is no file"
        raise InputError(f"there is {fact} at `{path}` already", "name another, or replace a file with `--overwrite`")
    if not is_folder(path.parent):
        raise InputError(f"there is no folder `{path.parent}`", "make it first")


# --- rows ----------------------------------------------------------------------------------------------------------


def _schema(schema: pa.Schema) -> pa.Schema:
    """Return the columns that are written of a query's."""
    for f in schema:
        if not _has_form(f.type):
            raise QueryError(f"column `{f.name}` is of a type that files have no form for: {f.type}", _CAST)
    return pa.schema([pa.field(name, _kind(f.type)) for name, f in zip(distinct(schema.names), schema, strict=True)])


def _has_form(kind: pa.DataType) -> bool:
    if pa.types.is_interval(kind) or pa.types.is_union(kind):
        return False
    return not pa.types.is_nested(kind) or all(_has_form(kind.field(i).type) for i in range(kind.num_fields))


def _kind(kind: pa.DataType) -> pa.DataType:
    """Return the type that a column is written as: numbers that every tool takes instead of DuckDB's wide ones."""
    if pa.types.is_decimal(kind):
        return pa.int64() if (kind.precision, kind.scale) == (38, 0) else pa.float64()
    return kind


def _batches(reader: pa.RecordBatchReader, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield a query's rows; what fails on the way is an error of the query."""
    try:
        for batch in reader:
            yield pa.table([_cast(column, f) for column, f in zip(batch.columns, schema, strict=True)], schema=schema)
    except OSError as error:  # DuckDB's own, once rows are flowing
        raise QueryError(str(error).strip()) from error


def _cast(column: pa.Array, to: pa.Field) -> pa.Array:
    if column.type == to.type:
        return column
    try:
        return column.cast(to.type)
    except pa.ArrowInvalid as error:
        raise QueryError(
            f"column `{to.name}` holds a number that does not fit 64 bits", "cast it, as in `x::DOUBLE`"
        ) from error


def _chunks(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Put tables together to some that are worth writing."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(each.nbytes for each in held) >= _CHUNK_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


# --- files ---------------------------------------------------------------------------------------------------------


def _write(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], *, overwrite: bool) -> int:
    """Write tables of one schema to a file, and return how many rows they had."""
    n = 0
    try:
        with _draft(path, overwrite=overwrite) as file, _WRITERS[path.suffix.lower()](file, schema) as write:
            for chunk in _chunks(tables):
                if len(chunk):
                    write(chunk)
                n += len(chunk)
    except (pa.ArrowNotImplementedError, pl.exceptions.PolarsError) as error:
        raise QueryError(f"a column is of a type that `{path.suffix}` has no form for: {error}", _CAST) from error
    return n


@contextmanager
def _draft(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Open a file that takes its place when it is whole."""
    draft = path.with_name(f".{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        with draft.open("xb") as file:
            yield file
        _check(path, overwrite=overwrite)  # somebody else may have been here meanwhile
        draft.replace(path)
    except OSError as error:
        if error.strerror is None:
            raise
        raise InputError(f"`{path}` can't be written: {error.strerror}", "name another file") from error
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _parquet(file: BinaryIO, schema: pa.Schema) -> Iterator[Write]:
    from pyarrow import parquet

    texts = [f.name for f in schema if pa.types.is_string(f.type)]  # a dictionary of vectors would only cost
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
def _jsonl(file: BinaryIO, schema: pa.Schema) -> Iterator[Write]:  # noqa: ARG001  # lines need no heading
    yield lambda table: _frame(table, nested=True).write_ndjson(file)


@contextmanager
def _json(file: BinaryIO, schema: pa.Schema) -> Iterator[Write]:  # noqa: ARG001  # the same
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
