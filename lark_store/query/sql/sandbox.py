"""A DuckDB without access to this machine, limited to one SELECT."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import duckdb

from lark_store.errors import QueryError

if TYPE_CHECKING:
    from lark_store.query.sql.limits import Stop

_SHORT = 500  # characters; DuckDB parses the worst of these in about 0.1 s
LONGEST = 1_000_000


def sandbox(memory: int | None = None) -> duckdb.DuckDBPyConnection:
    """Open a temporary in-memory DuckDB of at most `memory` bytes: no files, extensions or Python variables."""
    config: dict[str, Any] = {
        "enable_external_access": False,
        "temp_directory": "",  # else COPY into the spill folder passes the permission check
        "python_enable_replacements": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    if memory is not None:
        config["memory_limit"] = f"{memory}B"
    return duckdb.connect(config=config)


def check_readable(connection: duckdb.DuckDBPyConnection, query: str, stop: Stop | None, times: int = 1) -> None:
    """Check that a query can be parsed `times` times within its time limit.

    DuckDB holds the GIL while it parses a statement, so nothing can end the query meanwhile. A long list takes a
    minute; so do a few thousand open parentheses. A long statement is therefore first parsed by a DuckDB function that
    releases the GIL, to measure the time.

    Raises
    ------
    QueryError
        It is too long, or there is too little time.
    """
    if len(query) > LONGEST:
        raise QueryError(
            f"the SQL has {len(query):,} characters; the limit is {LONGEST:,}",
            "split the query, or pass a long list to `Store.sql` as a parameter: `unnest($ids)`",
        )
    if stop is None or len(query) <= _SHORT:
        return
    started = time.monotonic()
    connection.execute("SELECT length(json_serialize_sql($1))", [query]).fetchall()
    stop.check_time(times * (time.monotonic() - started))


def one_select(connection: duckdb.DuckDBPyConnection, query: str, stop: Stop | None = None) -> duckdb.Statement:
    """Return a query's only statement, a SELECT or an EXPLAIN; `stop` limits the parsing time.

    Raises
    ------
    QueryError
        It is another statement, there are several, or parsing takes too long.
    """
    check_readable(connection, query, stop)
    statements = connection.extract_statements(query)
    kinds = [_kind(statement) for statement in statements]
    if kinds == ["MULTI"]:
        raise QueryError("a PIVOT must list its values", "for example `PIVOT … ON stage IN ('finetune', 'query')`")
    if kinds not in (["SELECT"], ["EXPLAIN"]):
        raise QueryError(
            f"only one SELECT is allowed, not {', '.join(kinds) or 'an empty query'}",
            "change the store with its commands; SQL is read-only",
        )
    return statements[0]


def _kind(statement: duckdb.Statement) -> str:
    try:
        return statement.type.name
    except ValueError:  # a statement type without a name in DuckDB's Python API
        return "another statement"
