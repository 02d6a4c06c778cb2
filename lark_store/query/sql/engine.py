"""SQL over the store: DuckDB on the catalog and the vector tables, read-only, with nothing else in reach."""

from __future__ import annotations

import re
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import duckdb
import polars as pl
import pyarrow as pa
from sqlalchemy import inspect, select

from lark_store.errors import InputError, LarkStoreError, QueryError
from lark_store.query.sql.functions import FUNCTIONS
from lark_store.query.sql.sandbox import one_select, sandbox
from lark_store.query.sql.stop import Stop, too_large
from lark_store.query.sql.views import VIEWS
from lark_store.schema.catalog import (
    Base,
    Checkpoint,
    CheckpointMetric,
    Correction,
    Evaluation,
    EvaluationScore,
    FormatVariant,
    IngestRun,
    Json,
    ScoreRun,
    Sketcher,
    Source,
    StoreMeta,
    Study,
    UtcTime,
)
from lark_store.schema.vectors import SKETCH_COLUMNS, sketch_schema, sketch_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sqlalchemy.orm import Session

    from lark_store.schema.database import Database

    Parameters = Sequence[Any] | Mapping[str, Any]

DEFAULT_MEMORY = "4GB"
_SNAPSHOT_ATTEMPTS = 10
_ROWS_PER_BATCH = 8192
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {"Ki": 1024, "Mi": 1024**2, "Gi": 1024**3, "Ti": 1024**4}
_CATALOG: dict[str, type[Base]] = {
    "_checkpoint": Checkpoint,
    "_metric": CheckpointMetric,
    "_source": Source,
    "_variant": FormatVariant,
    "_sketcher": Sketcher,
    "_meta": StoreMeta,
    "_ingest_run": IngestRun,
    "_score_run": ScoreRun,
    "_study": Study,
    "_evaluation": Evaluation,
    "_evaluation_score": EvaluationScore,
    "_correction": Correction,
}


def _arrow(session: Session, kind: type[Base]) -> pa.Table:
    """Return a catalog table as Arrow, its types from the columns' declarations, so that empty tables have them too."""
    columns = inspect(kind).columns
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


def connect(db: Database, *, stop: Stop | None = None, memory: int | None = None) -> duckdb.DuckDBPyConnection:
    """Open a throw-away DuckDB that sees the store's views and nothing else of this machine.

    `stop` is what the table functions look at while they compute; `memory` is the most bytes that DuckDB may take.
    """
    connection = sandbox(memory)
    try:
        _fill(db, connection, stop or Stop())
    except BaseException:
        connection.close()
        raise
    return connection


def _fill(db: Database, connection: duckdb.DuckDBPyConnection, stop: Stop) -> None:
    """Make the views and the table functions, and lock the door."""
    _register(db, connection)
    with db.session() as session:
        committed = select(IngestRun.fingerprint).where(IngestRun.status == "done", IngestRun.n_sketched > 0).distinct()
        tables = [sketch_table(fingerprint) for fingerprint in session.scalars(committed)]
    for name in tables:
        # Without the vector: DuckDB refuses a dataset that has a halffloat column anywhere.
        connection.register(f"_{name}", db.vectors.table(name).to_lance().scanner(columns=list(SKETCH_COLUMNS)))
    empty = sketch_schema(1, "float32").empty_table().select(SKETCH_COLUMNS)
    connection.register("_no_sketches", empty)
    union = " UNION ALL ".join(f"FROM _{name}" for name in ["no_sketches", *tables])
    connection.execute(f"CREATE TEMP VIEW _sketches AS {union}")
    for name, view in VIEWS.items():
        connection.execute(f"CREATE TEMP VIEW {name} AS {view.sql}")
    for function in FUNCTIONS.values():
        function.register(connection, db, stop)
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET enable_progress_bar = false")  # DuckDB would draw it on stdout
    connection.execute("SET lock_configuration = true")


def _register(db: Database, connection: duckdb.DuckDBPyConnection) -> None:
    """Register catalog and tables as of one moment: again, if a run was committed or superseded in between."""
    for _ in range(_SNAPSHOT_ATTEMPTS):
        with db.session() as session:
            before = _statuses(session)
            for name, kind in _CATALOG.items():
                connection.register(name, _arrow(session, kind))
        for name in ("samples", "failures", "influence", "source_influence"):
            connection.register(f"_{name}", db.vectors.table(name).to_lance())
        with db.session() as session:
            if _statuses(session) == before:
                return


def _statuses(session: Session) -> list[tuple[int, str]]:
    rows = session.execute(select(ScoreRun.id, ScoreRun.status).order_by(ScoreRun.id))
    return [(run, status) for run, status in rows]


def fetch(
    connection: duckdb.DuckDBPyConnection,
    query: str | duckdb.Statement,
    parameters: Parameters | None = None,
    *,
    max_rows: int | None = None,
    max_bytes: int | None = None,
) -> pl.DataFrame:
    """Run a query and return its rows, or the first `max_rows` of them; more than `max_bytes` are an error."""
    reader = connection.sql(query, params=parameters).to_arrow_reader(_ROWS_PER_BATCH)
    batches, rows, size = [], 0, 0
    for batch in reader:
        kept = batch if max_rows is None else batch.slice(0, max_rows - rows)
        batches.append(kept)
        rows, size = rows + len(kept), size + kept.nbytes
        if max_bytes is not None and size > max_bytes:
            raise too_large("the result needs more memory than it may have")
        if max_rows is not None and rows >= max_rows:
            break
    return _frame(pa.Table.from_batches(batches, reader.schema))


def _frame(table: pa.Table) -> pl.DataFrame:
    try:
        frame = pl.from_arrow(table.rename_columns(distinct(table.column_names)))
    except pl.exceptions.PolarsError as error:
        raise QueryError(
            f"the result has a column of a type that has no table form: {error}", "cast it, as in `x::VARCHAR`"
        ) from error
    assert isinstance(frame, pl.DataFrame)
    return frame.with_columns(_number(column) for column in frame if column.dtype.is_decimal())


def _number(column: pl.Series) -> pl.Series:
    """Turn DuckDB's wide numbers, such as sums of integers, into those that every tool takes."""
    if column.dtype == pl.Decimal(38, 0):
        whole = column.cast(pl.Int64, strict=False)
        if whole.null_count() == column.null_count():
            return whole
    return column.cast(pl.Float64)


def distinct(names: list[str]) -> list[str]:
    """Tell repeated names, as in a self-join, from each other by numbers.

    >>> distinct(["a", "a", "a_1"])
    ['a', 'a_2', 'a_1']
    """
    taken, out = set(names), []
    for i, name in enumerate(names):
        number, free = 1, name
        while name in names[:i] and free in taken:
            free, number = f"{name}_{number}", number + 1
        taken.add(free)
        out.append(free)
    return out


def run(
    db: Database,
    query: str,
    parameters: Parameters | None = None,
    *,
    timeout: float | None = None,
    memory: str = DEFAULT_MEMORY,
    max_rows: int | None = None,
) -> pl.DataFrame:
    """Run one SELECT; see `Store.sql`."""
    limit = _bytes(memory)
    stop = Stop(timeout, growth=2 * limit)
    opened: list[duckdb.DuckDBPyConnection] = []

    def work() -> pl.DataFrame:
        with checked(db, query, stop=stop, memory=limit) as (connection, statement):
            opened.append(connection)
            return fetch(connection, statement, parameters, max_rows=max_rows, max_bytes=limit)

    def interrupt() -> None:
        for connection in opened:
            with suppress(duckdb.Error):  # it is closed by now
                connection.interrupt()

    return stop.watch(work, interrupt)


@contextmanager
def checked(
    db: Database, query: str, *, stop: Stop | None = None, memory: int | None = None
) -> Iterator[tuple[duckdb.DuckDBPyConnection, duckdb.Statement]]:
    """Hand out a throw-away connection and the one SELECT that `query` is; DuckDB's errors become `QueryError`s."""
    connection: duckdb.DuckDBPyConnection | None = None
    try:
        connection = connect(db, stop=stop, memory=memory)
        yield connection, one_select(connection, query)
    except duckdb.Error as error:
        raise _refusal(error) from error
    finally:
        if connection is not None:
            connection.close()


def _bytes(size: str) -> int:
    """Read a size.

    >>> _bytes("2GB"), _bytes("1.5 MiB")
    (2000000000, 1572864)
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]i?)?B?", size.strip(), re.IGNORECASE)
    number = float(found[1]) * _UNITS[(found[2] or "").capitalize()] if found else 0
    if number < 1:
        raise InputError(f"`{size}` is no size of memory", "for example `4GB` or `512MiB`")
    return int(number)


def _refusal(error: duckdb.Error) -> LarkStoreError:
    """Return DuckDB's error as one of ours, with a hint where there is one."""
    if isinstance(error, duckdb.OutOfMemoryException):
        return too_large()
    return QueryError(str(error).strip(), _hint(error))


def _hint(error: Any) -> str | None:
    if isinstance(error, duckdb.CatalogException | duckdb.BinderException):
        names = ", ".join([*VIEWS, *(f"{name}()" for name in FUNCTIONS)])
        return f"the views are {names}; their columns: `lark-store sql --schema`"
    if isinstance(error, duckdb.PermissionException):
        return "SQL here reads the store's views and nothing else"
    return None
