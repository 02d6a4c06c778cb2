"""`--where`: any condition of SQL on a sketch, its sample and the sample's metadata, before anything is ranked."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import duckdb
import polars as pl

from lark_store.errors import InputError, QueryError
from lark_store.query.sql.sandbox import one_select, sandbox
from lark_store.query.sql.stop import Stop

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.schema.database import Database

_OF_SKETCHES = ("source", "stage", "domain", "variant", "sample_id", "n_tokens", "n_loss_tokens", "loss", "grad_norm")
_OF_SAMPLES = ("prompt", "response", "text", "label", "meta")
_SECONDS, _MEMORY = 60.0, 4 << 30  # what a condition may take
COLUMNS = (*_OF_SKETCHES, *_OF_SAMPLES)
_UNKNOWN_COLUMN = re.compile(r"Referenced column|Referenced table")


def satisfying(db: Database, frame: pl.DataFrame, condition: str, check: Callable[[], None] | None = None) -> pl.Series:
    """Return which rows of a frame of sketches satisfy a condition, as booleans.

    The columns are `COLUMNS`, those of the sketch, of its source and of its sample, and the keys of `meta`.

    Raises
    ------
    QueryError
        The condition is no SQL, names an unknown column, is more than a condition, or takes over a minute.
    InputError
        It is empty.
    """
    if not condition.strip():
        raise InputError("the condition is empty", 'for example `--where "n_tokens < 300"`')
    _check_is_one(condition)
    connection = sandbox(_MEMORY)

    def work() -> pl.Series:
        try:
            connection.register("_rows", frame.select(*_OF_SKETCHES).with_row_index("_row").to_arrow())
            connection.register("_samples", db.vectors.table("samples").to_lance())
            return _rows(connection, condition)
        except duckdb.Error as error:
            raise _failure(condition, error) from error
        finally:
            connection.close()

    rows = Stop(_SECONDS, growth=2 * _MEMORY, check=check).watch(work, lambda: _interrupt(connection))
    return pl.select(pl.int_range(len(frame), dtype=pl.UInt32).is_in(rows.implode())).to_series()


def _interrupt(connection: duckdb.DuckDBPyConnection) -> None:
    with suppress(duckdb.Error):  # it is closed by now
        connection.interrupt()


def _check_is_one(condition: str) -> None:
    """Refuse what is no expression, or more than one, such as `true) LIMIT (1`."""
    try:
        duckdb.SQLExpression(condition)
    except duckdb.ParserException as error:
        raise _failure(condition, error) from error
    except duckdb.Error as error:
        raise QueryError(
            f"`{condition}` is more than a condition", "for example `n_tokens < 300 and source = 'pubmed'`"
        ) from error


def _failure(condition: str, error: duckdb.Error) -> QueryError:
    hint = f"the columns are {', '.join(COLUMNS)} and the keys of `meta`"
    return QueryError(f"the condition `{condition}` fails: {str(error).strip()}", hint)


def _rows(connection: duckdb.DuckDBPyConnection, condition: str) -> pl.Series:
    """Return the numbers of the rows; the metadata is taken apart only where the condition names a key of it."""
    _make_view(connection, "{}")
    try:
        return _chosen(connection, condition)
    except duckdb.BinderException as error:
        keys = _keys(connection) if _UNKNOWN_COLUMN.search(str(error)) else "{}"
        if keys == "{}":
            raise
    _make_view(connection, keys)
    return _chosen(connection, condition)


def _chosen(connection: duckdb.DuckDBPyConnection, condition: str) -> pl.Series:
    statement = one_select(connection, f"SELECT _row FROM candidates WHERE (\n{condition}\n)")  # noqa: S608
    return pl.DataFrame(connection.sql(statement).to_arrow_table())["_row"]


def _keys(connection: duckdb.DuckDBPyConnection) -> str:
    """Return the keys of the samples' metadata with their types, as DuckDB writes a structure in JSON."""
    query = "SELECT json_group_structure(meta::JSON) FROM _samples WHERE source IN (SELECT DISTINCT source FROM _rows)"
    found = connection.execute(query).fetchone()
    structure = json.loads(found[0]) if found and found[0] else {}
    if not isinstance(structure, dict):
        return "{}"
    taken = {"", "_row", *COLUMNS}
    chosen = {}
    for key, kind in structure.items():
        if key.lower() not in taken:
            chosen[key] = _kind(kind)
            taken.add(key.lower())
    return json.dumps(chosen, ensure_ascii=False)


def _kind(kind: Any) -> Any:
    """Return the type that a key gets: values of several types, and what DuckDB has no structure for, become text.

    Whole numbers are signed and wide, else `year - 2030` would be an error.
    """
    if isinstance(kind, list):
        return [_kind(inner) for inner in kind]
    if isinstance(kind, dict):
        names = {key.lower() for key in kind}
        fits = len(names) == len(kind) and "" not in names
        return {key: _kind(inner) for key, inner in kind.items()} if fits else "VARCHAR"
    return {"NULL": "VARCHAR", "JSON": "VARCHAR", "UBIGINT": "HUGEINT"}.get(kind, kind)


def _make_view(connection: duckdb.DuckDBPyConnection, keys: str) -> None:
    """Make the view that a condition reads; `keys` become columns beside the others."""
    samples = ", ".join(f"s.{name}" for name in _OF_SAMPLES)
    literal = "'" + keys.replace("'", "''") + "'"
    meta = "" if keys == "{}" else f", json_transform(s.meta, {literal}) AS _meta"
    star = "*" if keys == "{}" else "* EXCLUDE (_meta), _meta.*"
    connection.execute(
        f"CREATE OR REPLACE TEMP VIEW candidates AS SELECT {star} FROM (SELECT r.*, {samples}{meta} "  # noqa: S608
        "FROM _rows r LEFT JOIN _samples s ON s.source = r.source AND s.sample_id = r.sample_id)"
    )
