"""SQL over the store: DuckDB on the catalog and the vector tables, read-only and isolated."""

from __future__ import annotations

import re
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb

from lark_store.errors import InputError, LarkStoreError, QueryError
from lark_store.query.sql import connection as views
from lark_store.query.sql.connection import fetch
from lark_store.query.sql.functions import FUNCTIONS
from lark_store.query.sql.limits import Stop, too_large
from lark_store.query.sql.sandbox import one_select
from lark_store.query.sql.views import VIEWS
from lark_store.schema.faults import damage_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

    from lark_store.query.sql.connection import Parameters
    from lark_store.schema.database import Database

T = TypeVar("T")
DEFAULT_MEMORY = "4GB"
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {"Ki": 1024, "Mi": 1024**2, "Gi": 1024**3, "Ti": 1024**4}
_OF_INTERNALS = re.compile(r'\nDid you mean "(_|pg_|duckdb_|sqlite_)[^\n]*\n?')  # hides suggestions of internal names


def connect(
    db: Database, *, query: str | None = None, stop: Stop | None = None, memory: int | None = None
) -> duckdb.DuckDBPyConnection:
    """Open a temporary DuckDB with the store's views and table functions, or those of a query, isolated from here."""
    return views.connect(db, FUNCTIONS.values(), query=query, stop=stop, memory=memory)


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
    for name, value in {"max_rows": max_rows, "timeout": timeout}.items():
        if value is not None and not value >= 0:
            raise InputError(f"`{name}` must not be negative, not {value:g}", "leave it out for no limit")
    stop = Stop(timeout, growth=2 * limit)
    opened: list[duckdb.DuckDBPyConnection] = []

    def rows(connection: duckdb.DuckDBPyConnection, statement: duckdb.Statement) -> pl.DataFrame:
        opened.append(connection)
        return fetch(connection, statement, parameters, max_rows=max_rows, max_bytes=limit)

    def interrupt() -> None:
        for connection in opened:
            with suppress(duckdb.Error):  # already closed
                connection.interrupt()

    return stop.watch(lambda: answer(db, query, rows, stop=stop, memory=limit), interrupt)


def answer(
    db: Database,
    query: str,
    work: Callable[[duckdb.DuckDBPyConnection, duckdb.Statement], T],
    *,
    stop: Stop | None = None,
    memory: int | None = None,
) -> T:
    """Return `work` of a temporary connection and the query's only SELECT. DuckDB's errors become `QueryError`s."""

    def attempt(named_in: str | None) -> T:
        with closing(connect(db, query=named_in, stop=stop, memory=memory)) as connection:
            return work(connection, one_select(connection, query, stop))

    try:
        try:
            return attempt(query)
        except (duckdb.CatalogException, duckdb.BinderException):
            return attempt(None)  # a name is unknown or computed: DuckDB suggests names of all views and functions
    except duckdb.Error as error:
        raise damage_of(error) or _refusal(error) from error


def _bytes(size: str) -> int:
    """Parse a size in bytes.

    >>> _bytes("2GB"), _bytes("1.5 MiB")
    (2000000000, 1572864)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]i?)?B?", size.strip(), re.IGNORECASE)
    number = float(match[1]) * _UNITS[(match[2] or "").capitalize()] if match else 0
    if number < 1:
        raise InputError(f"`{size}` is not a memory size", "for example `4GB` or `512MiB`")
    return int(number)


def _refusal(error: duckdb.Error) -> LarkStoreError:
    """Return DuckDB's error as a lark-store error, with a hint if possible."""
    if isinstance(error, duckdb.OutOfMemoryException):
        return too_large()
    return QueryError(_OF_INTERNALS.sub("", str(error).strip()), _hint(error))


def _hint(error: Any) -> str | None:
    if isinstance(error, duckdb.CatalogException | duckdb.BinderException):
        names = ", ".join([*VIEWS, *(f"{name}()" for name in FUNCTIONS)])
        return f"the views are {names}; see their columns with `lark-store sql --schema`"
    if isinstance(error, duckdb.PermissionException):
        return "SQL can only read the store's views"
    return None
