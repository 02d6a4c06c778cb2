"""Nulls of the p-values. One module per null, and this registry of them; see `lark_store.stats.significance`.

To add one, write a subclass of `Null` in a module of its own and list it in `NULLS`. Help and messages are generated
from the registry. The name of a source is a null too: `sources` limited to its rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.core.text import coded, joined
from lark_store.errors import InputError
from lark_store.query.nulls.none import NoNull
from lark_store.query.nulls.signs import SignsNull
from lark_store.query.nulls.sources import SourcesNull

if TYPE_CHECKING:
    from collections.abc import Collection

    from lark_store.query.methods import Method
    from lark_store.query.nulls.base import Null

NULLS: dict[str, Null] = {null.name: null for null in (SourcesNull(), SignsNull(), NoNull())}
_A_SOURCE = "the name of a source"


def find_null(name: str, method: Method, sources: Collection[str]) -> Null:
    """Return a null by name, checked against the method; `sources` are the searched sources.

    Raises
    ------
    InputError
        It is neither a null nor a source, or can't test scores by the method.
    """
    if name not in NULLS and name not in sources:
        options = joined([*coded(NULLS), _A_SOURCE], "or")
        raise InputError(f"`{name}` is not a valid null", f"use {options}")
    null = NULLS.get(name, NULLS["sources"])
    null.check(method)
    return null


def null_help() -> str:
    """Return the help of `--null`: all names with their meanings."""
    explained = [f"`{null.name}` ({null.meaning})" for null in NULLS.values()]
    return f"Null of the p-values: {joined([*explained, _A_SOURCE], 'or')}."
