"""Table functions: Python that computes inside a query, for what no view can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import duckdb

    from lark_store.query.stop import Stop
    from lark_store.query.views import Column
    from lark_store.schema.database import Database


@dataclass(frozen=True)
class Function:
    """A table function: how it is called, what a row of it is, its columns, and how a connection gets it.

    `register` makes the function on a connection; what it computes calls `stop.check()` now and then.
    """

    signature: str
    meaning: str
    columns: dict[str, Column]
    register: Callable[[duckdb.DuckDBPyConnection, Database, Stop], None]


FUNCTIONS: dict[str, Function] = {}
