"""Frames that describe the views and table functions, for `sql --schema` and the shell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.errors import NameUnknownError
from lark_store.query.sql.functions import FUNCTIONS
from lark_store.query.sql.view_columns import View
from lark_store.query.sql.views import VIEWS

if TYPE_CHECKING:
    import polars as pl


def overview() -> pl.DataFrame:
    """Return the views and table functions with the meaning of their rows."""
    import polars as pl

    rows = [(name, view.meaning) for name, view in VIEWS.items()]
    rows += [(f"{name}()", function.meaning) for name, function in FUNCTIONS.items()]
    return pl.DataFrame(rows, ["name", "meaning"], orient="row")


def described(name: str) -> pl.DataFrame:
    """Return the columns of a view, or the arguments and columns of a table function, with types and meanings.

    Raises
    ------
    NameUnknownError
    """
    import polars as pl

    documented = VIEWS.get(name) or FUNCTIONS.get(name)
    if documented is None:
        raise NameUnknownError.of("view", name, [*VIEWS, *FUNCTIONS], "the views are always there")
    parameters = {} if isinstance(documented, View) else documented.parameters
    rows = [(f"{name} :=", kind, f"an argument, default {default}") for name, (kind, default) in parameters.items()]
    rows += [(column, facts.type, facts.meaning) for column, facts in documented.columns.items()]
    return pl.DataFrame(rows, ["column", "type", "meaning"], orient="row")


def schema() -> dict[str, pl.DataFrame]:
    """Return all views and table functions by name, the overview first."""
    return {"views": overview()} | {name: described(name) for name in [*VIEWS, *FUNCTIONS]}
