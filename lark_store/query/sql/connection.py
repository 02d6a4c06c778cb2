"""A temporary DuckDB with the store's views, isolated from this machine, and rows from it."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl
import pyarrow as pa
from sqlalchemy import inspect, literal, select, union_all

from lark_store.core.arrow import skip_pandas
from lark_store.errors import QueryError, StoreBusyError
from lark_store.query.sql.datasets import whole_rows
from lark_store.query.sql.limits import Stop, too_large
from lark_store.query.sql.relations import relations
from lark_store.query.sql.sandbox import sandbox
from lark_store.query.sql.views import VIEWS
from lark_store.schema.catalog import (
    Checkpoint,
    CheckpointMetric,
    Correction,
    EifRun,
    Evaluation,
    EvaluationScore,
    FormatVariant,
    IngestRun,
    ProbeRun,
    ScoreRun,
    Sketcher,
    Source,
    StoreMeta,
    Study,
)
from lark_store.schema.checksums import CHECKSUM
from lark_store.schema.column_types import Json, UtcTime
from lark_store.schema.table_schemas import SKETCH_COLUMNS, TABLES, sketch_schema, sketch_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import duckdb
    from sqlalchemy.orm import Session

    from lark_store.schema.catalog_base import Base
    from lark_store.schema.database import Database

    Parameters = Sequence[Any] | Mapping[str, Any]

_SNAPSHOT_ATTEMPTS = 10
_ROWS_PER_BATCH = 8192
_CATALOG: dict[str, type[Base]] = {
    "_checkpoint": Checkpoint,
    "_metric": CheckpointMetric,
    "_source": Source,
    "_variant": FormatVariant,
    "_sketcher": Sketcher,
    "_meta": StoreMeta,
    "_ingest_run": IngestRun,
    "_score_run": ScoreRun,
    "_probe_run": ProbeRun,
    "_eif_run": EifRun,
    "_study": Study,
    "_evaluation": Evaluation,
    "_evaluation_score": EvaluationScore,
    "_correction": Correction,
}


class TableFunction(Protocol):
    """A function that a query can select from."""

    @property
    def name(self) -> str:
        """Its name in SQL."""

    def register(self, connection: duckdb.DuckDBPyConnection, db: Database, stop: Stop) -> None:
        """Create the function on a connection."""


def _arrow(session: Session, kind: type[Base]) -> pa.Table:
    """Return a catalog table as Arrow, with the types of the column declarations, even if it is empty."""
    columns = [column for column in inspect(kind).columns if column.key != CHECKSUM]
    types = {
        column.key: pa.timestamp("us", "UTC")
        if isinstance(column.type, UtcTime)
        else pa.from_numpy_dtype({int: "int64", float: "float64"}.get(column.type.python_type, "O"))
        if column.type.python_type in (int, float)
        else pa.string()
        for column in columns
    }
    rows = session.execute(select(*columns)).all()
    values = {column.key: [row[i] for row in rows] for i, column in enumerate(columns)}
    for column in columns:
        if isinstance(column.type, Json):
            written = (column.type.process_bind_param(value, None) for value in values[column.key])  # type: ignore[arg-type]
            values[column.key] = list(written)
    return pa.Table.from_pydict(values, schema=pa.schema(list(types.items())))


def connect(
    db: Database,
    functions: Iterable[TableFunction] = (),
    *,
    query: str | None = None,
    stop: Stop | None = None,
    memory: int | None = None,
) -> duckdb.DuckDBPyConnection:
    """Open a temporary DuckDB with the store's views and some table functions, or only those that a query names.

    The functions check `stop` while they compute; `memory` limits DuckDB's bytes.
    """
    skip_pandas()
    connection = sandbox(memory)
    try:
        names = None if query is None else relations(query)
        _fill(db, connection, names)
        for function in functions:
            if names is None or function.name in names:
                function.register(connection, db, stop or Stop())
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET enable_progress_bar = false")  # DuckDB would draw it on stdout
        connection.execute("SET lock_configuration = true")
    except BaseException:
        connection.close()
        raise
    return connection


def _fill(db: Database, connection: duckdb.DuckDBPyConnection, names: frozenset[str] | None) -> None:
    """Create the views, or only those with these names."""
    _register(db, connection, names)
    if names is None or "_sketches" in names:
        _register_sketches(db, connection)
    for name, view in VIEWS.items():
        if names is None or name in names:
            connection.execute(f"CREATE TEMP VIEW {name} AS {view.sql}")


def _register_sketches(db: Database, connection: duckdb.DuckDBPyConnection) -> None:
    """Create a view of the sketches of all sketchers."""
    with db.session() as session:
        committed = select(IngestRun.fingerprint).where(IngestRun.status == "done", IngestRun.n_sketched > 0).distinct()
        tables = [sketch_table(fingerprint) for fingerprint in session.scalars(committed)]
    for name in tables:
        # Without the vector: DuckDB refuses datasets with a halffloat column.
        connection.register(f"_{name}", whole_rows(db.vectors.table(name).to_lance(), SKETCH_COLUMNS))
    connection.register("_no_sketches", sketch_schema(1, "float32").empty_table().select(SKETCH_COLUMNS))
    union = " UNION ALL ".join(f"FROM _{name}" for name in ["no_sketches", *tables])
    connection.execute(f"CREATE TEMP VIEW _sketches AS {union}")


def _register(db: Database, connection: duckdb.DuckDBPyConnection, names: frozenset[str] | None) -> None:
    """Register catalog and tables as of one moment; retries if a run was committed or superseded meanwhile."""
    catalog = {name: kind for name, kind in _CATALOG.items() if names is None or name in names}
    tables = [name for name in TABLES if names is None or f"_{name}" in names]
    for _ in range(_SNAPSHOT_ATTEMPTS):
        with db.session() as session:
            before = _statuses(session)
            for name, kind in catalog.items():
                connection.register(name, _arrow(session, kind))
        for name in tables:
            connection.register(f"_{name}", _rows(db, name))
        with db.session() as session:
            if _statuses(session) == before:
                return
    raise StoreBusyError("other processes keep committing runs while the views are created", "run the query again")


def _rows(db: Database, name: str) -> Any:
    """Return a table's rows for DuckDB; none if the store is a snapshot that is older than the table."""
    if db.is_snapshot and not db.vectors.has(name):
        return TABLES[name].empty_table()
    return whole_rows(db.vectors.table(name).to_lance(), TABLES[name].names)


def _statuses(session: Session) -> list[tuple[str, int, str]]:
    kinds = (ScoreRun, ProbeRun, EifRun)
    states = (select(literal(kind.__tablename__), kind.id, kind.status) for kind in kinds)
    return sorted((kind, run, status) for kind, run, status in session.execute(union_all(*states)))


def ask(db: Database, query: str, parameters: Parameters | None = None) -> pl.DataFrame:
    """Run a query over the store's views."""
    with closing(connect(db, query=query)) as connection:
        return fetch(connection, query, parameters)


def fetch(
    connection: duckdb.DuckDBPyConnection,
    query: str | duckdb.Statement,
    parameters: Parameters | None = None,
    *,
    max_rows: int | None = None,
    max_bytes: int | None = None,
) -> pl.DataFrame:
    """Run a query and return its rows, at most the first `max_rows`; more than `max_bytes` is an error."""
    reader = connection.sql(query, params=parameters).to_arrow_reader(_ROWS_PER_BATCH)
    batches, rows, size = [], 0, 0
    for batch in reader:
        part = batch if max_rows is None else batch.slice(0, max_rows - rows)
        batches.append(part)
        rows, size = rows + len(part), size + part.nbytes
        if max_bytes is not None and size > max_bytes:
            raise too_large("the result exceeded its memory limit")
        if max_rows is not None and rows >= max_rows:
            break
    return _frame(pa.Table.from_batches(batches, reader.schema))


def _frame(table: pa.Table) -> pl.DataFrame:
    try:
        frame = pl.from_arrow(table.rename_columns(distinct(table.column_names)))
    except pl.exceptions.PolarsError as error:
        raise QueryError(
            f"the result has a column with an unsupported type: {error}", "cast it, as in `x::VARCHAR`"
        ) from error
    assert isinstance(frame, pl.DataFrame)
    return frame.with_columns(_number(column) for column in frame if column.dtype.is_decimal())


def _number(column: pl.Series) -> pl.Series:
    """Convert DuckDB's wide numbers, such as sums of integers, to ordinary types."""
    if column.dtype == pl.Decimal(38, 0):
        integers = column.cast(pl.Int64, strict=False)
        if integers.null_count() == column.null_count():
            return integers
    return column.cast(pl.Float64)


def distinct(names: list[str]) -> list[str]:
    """Make repeated names, as in a self-join, distinct by numbers.

    >>> distinct(["a", "a", "a_1"])
    ['a', 'a_2', 'a_1']
    """
    used, out = set(names), []
    for i, name in enumerate(names):
        number, free = 1, name
        while name in names[:i] and free in used:
            free, number = f"{name}_{number}", number + 1
        used.add(free)
        out.append(free)
    return out
