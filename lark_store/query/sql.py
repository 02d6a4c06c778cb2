"""SQL over the store: DuckDB on the catalog and the vector tables, read-only, with nothing else in reach."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import duckdb
import polars as pl
import pyarrow as pa
from sqlalchemy import inspect, select

from lark_store.errors import QueryError
from lark_store.schema.catalog import (
    Base,
    Checkpoint,
    CheckpointMetric,
    FormatVariant,
    IngestRun,
    Json,
    ScoreRun,
    Sketcher,
    Source,
    UtcTime,
)
from lark_store.schema.vectors import SKETCH_COLUMNS, sketch_schema, sketch_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import Session

    from lark_store.schema.database import Database

_SNAPSHOT_ATTEMPTS = 10
_CATALOG: dict[str, type[Base]] = {
    "_checkpoint": Checkpoint,
    "_metric": CheckpointMetric,
    "_source": Source,
    "_variant": FormatVariant,
    "_sketcher": Sketcher,
    "_ingest_run": IngestRun,
    "_score_run": ScoreRun,
}

# The views people see; everything is joined on names.
VIEWS = {
    "checkpoints": "SELECT * EXCLUDE (id) FROM _checkpoint",
    "checkpoint_metrics": (
        "SELECT c.name AS checkpoint, m.name, m.value FROM _metric m JOIN _checkpoint c ON c.id = m.checkpoint_id"
    ),
    "sources": "SELECT * EXCLUDE (id) FROM _source",
    "variants": "SELECT * EXCLUDE (id) FROM _variant",
    "sketchers": "SELECT * EXCLUDE (id) FROM _sketcher",
    "samples": "SELECT * FROM _samples",
    "ingest_runs": """
        SELECT r.id AS ingest_run, r.status, k.name AS sketcher, c.name AS checkpoint, s.name AS source,
               v.name AS variant, r.n_existing, r.n_sketched, r.n_failed, r.seconds, r.device, r.fingerprint,
               r.recipe, r.versions, r.lance_version, r.started_at, r.finished_at, r.error
        FROM _ingest_run r JOIN _sketcher k ON k.id = r.sketcher_id JOIN _checkpoint c ON c.id = r.checkpoint_id
        JOIN _source s ON s.id = r.source_id JOIN _variant v ON v.id = r.variant_id""",
    "score_runs": """
        SELECT r.id AS score_run, r.status, r.method, k.name AS sketcher, c.name AS checkpoint,
               qc.name AS query_checkpoint, q.name AS queries, qv.name AS query_variant, s.name AS source,
               v.name AS variant, r.n_queries, r.n_samples, r.device, r.fingerprint, r.recipe, r.versions,
               r.lance_version, r.started_at, r.finished_at, r.error
        FROM _score_run r JOIN _sketcher k ON k.id = r.sketcher_id JOIN _checkpoint c ON c.id = r.checkpoint_id
        JOIN _checkpoint qc ON qc.id = r.query_checkpoint_id JOIN _source q ON q.id = r.queries_id
        JOIN _variant qv ON qv.id = r.query_variant_id JOIN _source s ON s.id = r.source_id
        JOIN _variant v ON v.id = r.variant_id""",
    "sketches": """
        SELECT r.sketcher, x.* FROM _sketches x JOIN ingest_runs r USING (ingest_run) WHERE r.status = 'done'""",
    "failures": "SELECT * FROM _failures",
    "influence": """
        SELECT i.checkpoint, r.queries, i.query_id, i.source, i.variant, i.rank, i.score, i.sample_id,
               r.method, r.sketcher, r.query_checkpoint, r.query_variant, i.score_run
        FROM _influence i JOIN score_runs r USING (score_run) WHERE r.status = 'done'""",
    "source_influence": """
        SELECT i.checkpoint, r.queries, i.query_id, i.source, i.variant, i.max, i.argmax, i.mean, i.std, i.n,
               r.method, r.sketcher, r.query_checkpoint, r.query_variant, i.score_run
        FROM _source_influence i JOIN score_runs r USING (score_run) WHERE r.status = 'done'""",
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
    rows = []
    for row in session.scalars(select(kind)):
        values = {column.key: getattr(row, column.key) for column in columns}
        for column in columns:
            if isinstance(column.type, Json):
                values[column.key] = column.type.process_bind_param(values[column.key], None)  # type: ignore[arg-type]
        rows.append(values)
    return pa.Table.from_pylist(rows, schema=pa.schema(list(types.items())))


def connect(db: Database) -> duckdb.DuckDBPyConnection:
    """Open a throw-away DuckDB that sees the store's views and nothing else of this machine."""
    connection = duckdb.connect(
        config={
            "enable_external_access": False,
            "temp_directory": "",
            "python_enable_replacements": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
    )
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
        connection.execute(f"CREATE TEMP VIEW {name} AS {view}")
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET lock_configuration = true")
    return connection


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
    connection: duckdb.DuckDBPyConnection, query: str | duckdb.Statement, parameters: list[Any] | None = None
) -> pl.DataFrame:
    """Run a query and return its rows."""
    table = connection.sql(query, params=parameters).to_arrow_table()
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


def run(db: Database, query: str) -> pl.DataFrame:
    """Run one SELECT; see `Store.sql`."""
    with checked(db, query) as (connection, statement):
        return fetch(connection, statement)


@contextmanager
def checked(db: Database, query: str) -> Iterator[tuple[duckdb.DuckDBPyConnection, duckdb.Statement]]:
    """Hand out a throw-away connection and the one SELECT that `query` is; DuckDB's errors become `QueryError`s."""
    connection = connect(db)
    try:
        statements = connection.extract_statements(query)
        kinds = [_kind(statement) for statement in statements]
        if kinds not in (["SELECT"], ["EXPLAIN"]):
            raise QueryError(
                f"one SELECT is allowed, this is {', '.join(kinds) or 'nothing'}",
                "the store is changed by its commands, not by SQL",
            )
        yield connection, statements[0]
    except duckdb.Error as error:
        raise QueryError(str(error).strip(), _hint(error)) from error
    finally:
        connection.close()


def _kind(statement: duckdb.Statement) -> str:
    try:
        return statement.type.name
    except ValueError:  # a kind that DuckDB's Python side has no name for
        return "another statement"


def _hint(error: Any) -> str | None:
    if isinstance(error, duckdb.CatalogException | duckdb.BinderException):
        return f"the views are {', '.join(VIEWS)}"
    if isinstance(error, duckdb.PermissionException):
        return "SQL here reads the store's views and nothing else"
    return None
