"""A DuckDB that reaches nothing of this machine, and the rule that it runs one SELECT."""

from __future__ import annotations

from typing import Any

import duckdb

from lark_store.errors import QueryError


def sandbox(memory: int | None = None) -> duckdb.DuckDBPyConnection:
    """Open a throw-away DuckDB in memory, of at most `memory` bytes: no files, no extensions, no Python variables."""
    config: dict[str, Any] = {
        "enable_external_access": False,
        "temp_directory": "",  # else COPY into the spill folder passes the check of permissions
        "python_enable_replacements": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    if memory is not None:
        config["memory_limit"] = f"{memory}B"
    return duckdb.connect(config=config)


def one_select(connection: duckdb.DuckDBPyConnection, query: str) -> duckdb.Statement:
    """Return a query's one statement, a SELECT or an EXPLAIN.

    Raises
    ------
    QueryError
        It is something else, or there are several.
    """
    statements = connection.extract_statements(query)
    kinds = [_kind(statement) for statement in statements]
    if kinds == ["MULTI"]:
        raise QueryError("a PIVOT has to name its values", "for example `PIVOT … ON stage IN ('finetune', 'query')`")
    if kinds not in (["SELECT"], ["EXPLAIN"]):
        raise QueryError(
            f"one SELECT is allowed, this is {', '.join(kinds) or 'nothing'}",
            "the store is changed by its commands, not by SQL",
        )
    return statements[0]


def _kind(statement: duckdb.Statement) -> str:
    try:
        return statement.type.name
    except ValueError:  # a kind that DuckDB's Python side has no name for
        return "another statement"
