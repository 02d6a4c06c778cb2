"""The pages: a module for each, with its routes in `ROUTES`."""

from __future__ import annotations

from lark_store.ui.pages import ask, compare, dominance, groups, plot, queries, query, sample, sql, store, tokens

ROUTES = [
    route
    for module in (store, queries, query, sample, groups, dominance, ask, tokens, compare, sql, plot)
    for route in module.ROUTES
]
