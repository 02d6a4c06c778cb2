"""Which relations a query needs: a connection creates only these."""

from __future__ import annotations

import re

from lark_store.query.sql.views import VIEWS

_WORD = re.compile(r"\w+")
_LISTING = re.compile(r"duckdb_|pg_|sqlite_|information_schema|show|describe|pragma")


def relations(query: str) -> frozenset[str] | None:
    """Return all words of a query and of the views that it names, among them its relations and functions.

    None stands for every relation: the query may list them. A name that a query computes is not found.

    >>> {"variants", "_variant"} <= relations("SELECT name FROM variants")
    True
    """
    lowered = query.lower()
    if _LISTING.search(lowered):
        return None
    words = set(_WORD.findall(lowered))
    for name in reversed(VIEWS):  # a view reads from earlier ones
        if name in words:
            words.update(_WORD.findall(VIEWS[name].sql.lower()))
    return frozenset(words)
