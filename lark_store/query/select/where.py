"""`--where`: filter rows before ranking by any SQL condition on a sketch, its sample and the sample's metadata."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import duckdb
import polars as pl

from lark_store.errors import InputError, QueryError
from lark_store.query.sql.datasets import whole_rows
from lark_store.query.sql.limits import Stop
from lark_store.query.sql.sandbox import check_readable, one_select, sandbox
from lark_store.schema.chats import CONTENT
from lark_store.schema.faults import damage_of
from lark_store.schema.table_schemas import SAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.schema.database import Database

_OF_SKETCHES = ("source", "stage", "domain", "variant", "sample_id", "n_tokens", "n_loss_tokens", "loss", "grad_norm")
_OF_SAMPLES = (*CONTENT, "label", "meta")
_SECONDS, _MEMORY = 60.0, 4 << 30  # limits of a condition
COLUMNS = (*_OF_SKETCHES, *_OF_SAMPLES)
_UNKNOWN_COLUMN = re.compile(r"Referenced column|Referenced table")


def satisfying(db: Database, frame: pl.DataFrame, condition: str, check: Callable[[], None] | None = None) -> pl.Series:
    """Return, for a frame of sketches or of samples, whether each row satisfies a condition.

    The columns are `COLUMNS`, those of the sketch, its source and its sample, and the keys of `meta`. A frame of
    samples lacks those of the sketch.

    Raises
    ------
    QueryError
        The condition is invalid SQL, names an unknown column, is more than a condition, or runs over a minute.
    InputError
        It is empty.
    """
    if not condition.strip():
        raise InputError("the condition is empty", 'for example `--where "n_tokens < 300"`')
    connection = sandbox(_MEMORY)
    stop = Stop(_SECONDS, growth=2 * _MEMORY, check=check, is_fixed=True)

    def work() -> pl.Series:
        try:
            check_readable(connection, f"SELECT (\n{condition}\n)", stop, times=3)
            _check_is_expression(condition)
            columns = [name for name in _OF_SKETCHES if name in frame.columns]
            connection.register("_rows", frame.select(columns).with_row_index("_row").to_arrow())
            connection.register("_samples", whole_rows(db.vectors.table("samples").to_lance(), SAMPLES.names))
            return _rows(connection, condition)
        except duckdb.Error as error:
            raise damage_of(error) or _failure(condition, error, frame.columns) from error
        finally:
            connection.close()

    rows = stop.watch(work, lambda: _interrupt(connection))
    return pl.select(pl.int_range(len(frame), dtype=pl.UInt32).is_in(rows.implode())).to_series()


def _interrupt(connection: duckdb.DuckDBPyConnection) -> None:
    with suppress(duckdb.Error):  # already closed
        connection.interrupt()


def _check_is_expression(condition: str) -> None:
    """Refuse anything but one expression, for example `true) LIMIT (1`."""
    try:
        duckdb.SQLExpression(condition)
    except duckdb.ParserException as error:
        raise _failure(condition, error) from error
    except duckdb.Error as error:
        raise QueryError(
            f"`{condition}` is not a single condition", "for example `n_tokens < 300 and source = 'pubmed'`"
        ) from error


def _failure(condition: str, error: duckdb.Error, columns: Sequence[str] = COLUMNS) -> QueryError:
    names = [name for name in COLUMNS if name in (*columns, *_OF_SAMPLES)]
    hint = (
        f"the columns are {', '.join(names)} and the keys of `meta`; "
        "for keys that differ only in case write `meta->>'Year'`"
    )
    return QueryError(f"the condition `{condition}` failed: {str(error).strip()}", hint)


def _rows(connection: duckdb.DuckDBPyConnection, condition: str) -> pl.Series:
    """Return the numbers of the matching rows. Parses the metadata only if the condition names one of its keys."""
    _make_view(connection, "{}")
    try:
        return _matching(connection, condition)
    except duckdb.BinderException as error:
        keys = _keys(connection) if _UNKNOWN_COLUMN.search(str(error)) else "{}"
        if keys == "{}":
            raise
    _make_view(connection, keys)
    return _matching(connection, condition)


def _matching(connection: duckdb.DuckDBPyConnection, condition: str) -> pl.Series:
    statement = one_select(connection, f"SELECT _row FROM candidates WHERE (\n{condition}\n)")  # noqa: S608
    return pl.DataFrame(connection.sql(statement).to_arrow_table())["_row"]


def _keys(connection: duckdb.DuckDBPyConnection) -> str:
    """Return the keys of the samples' metadata with their types, in DuckDB's JSON form of a structure."""
    query = "SELECT json_group_structure(meta::JSON) FROM _samples WHERE source IN (SELECT DISTINCT source FROM _rows)"
    row = connection.execute(query).fetchone()
    structure = json.loads(row[0]) if row and row[0] else {}
    if not isinstance(structure, dict):
        return "{}"
    counts = Counter(key.lower() for key in structure)  # SQL names ignore case, so such keys would be ambiguous
    excluded = {"", "_row", *COLUMNS, *(name for name, count in counts.items() if count > 1)}
    columns = {key: _kind(kind) for key, kind in structure.items() if key.lower() not in excluded}
    return json.dumps(columns, ensure_ascii=False)


def _kind(kind: Any) -> Any:
    """Return the SQL type of a key. Mixed types, and structures unknown to DuckDB, become text.

    Whole numbers become wide signed ones; otherwise `year - 2030` would fail.
    """
    if isinstance(kind, list):
        return [_kind(inner) for inner in kind]
    if isinstance(kind, dict):
        names = {key.lower() for key in kind}
        fits = len(names) == len(kind) and "" not in names
        return {key: _kind(inner) for key, inner in kind.items()} if fits else "VARCHAR"
    return {"NULL": "VARCHAR", "JSON": "VARCHAR", "UBIGINT": "HUGEINT"}.get(kind, kind)


def _make_view(connection: duckdb.DuckDBPyConnection, keys: str) -> None:
    """Create the view read by a condition, with `keys` as additional columns."""
    samples = ", ".join(f"s.{name}" for name in _OF_SAMPLES)
    literal = "'" + keys.replace("'", "''") + "'"
    meta = "" if keys == "{}" else f", json_transform(s.meta, {literal}) AS _meta"
    star = "*" if keys == "{}" else "* EXCLUDE (_meta), _meta.*"
    connection.execute(
        f"CREATE OR REPLACE TEMP VIEW candidates AS SELECT {star} FROM (SELECT r.*, {samples}{meta} "  # noqa: S608
        "FROM _rows r LEFT JOIN _samples s ON s.source = r.source AND s.sample_id = r.sample_id)"
    )
