"""Two rankings side by side: of two queries, two checkpoints or two methods."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import polars as pl
from starlette.routing import Route

from lark_store.errors import NameUnknownError
from lark_store.query.methods import METHODS
from lark_store.ui.equivalent import both_lines, lines
from lark_store.ui.explorer import explorer_of, page
from lark_store.ui.parameters import Parameters
from lark_store.ui.scatter import Mark, scatter
from lark_store.ui.scope import across, choose
from lark_store.ui.tables import table

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

    from lark_store.ui.explorer import Explorer
    from lark_store.ui.scatter import Scatter
    from lark_store.ui.scope import Choices, Scope

_KEYS = ["source", "variant", "sample_id"]
_MOST = 1000
_FIRST = """
SELECT min(sample_id) FROM sketches
WHERE sketcher = $sketcher AND checkpoint = $checkpoint AND source = $queries AND variant = $query_variant"""


def show(request: Request) -> HTMLResponse:
    """Compare two rankings."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    choices = choose(explorer.store, parameters)
    k = parameters.whole("k", 20, 1, _MOST)
    sides = [_side(explorer, choices, parameters, name) for name in ("a", "b")]
    rankings = [explorer.store.top(query, k=k, **scope.search) for query, scope in sides]
    joined = _joined(*(hits.frame for hits in rankings))
    both = joined.filter(pl.col("rank a").is_not_null() & pl.col("rank b").is_not_null())
    links = {"sample_id": lambda row: sides[0][1].sample_url(row["source"], row["sample_id"])}
    return page(
        request,
        "compare",
        "Compare",
        choices=choices,
        methods=list(METHODS),
        sides=[(name, query, scope) for name, (query, scope) in zip("ab", sides, strict=True)],
        hows=[hits.how.split("\n")[0] for hits in rankings],
        k=k,
        n_both=len(both),
        n_all=len(joined),
        plot=_plot(joined, k, sides[0][1]),
        ranks=table(joined, links, most=2 * _MOST),
        lines=both_lines(*(lines(explorer, "top", query, k=k, **scope.search) for query, scope in sides)),
    )


def _plot(joined: pl.DataFrame, k: int, scope: Scope) -> Scatter | None:
    """Return the plot of rank against rank; samples of one ranking only are beyond the other's last."""
    beyond = k + max(1.0, k / 10)
    ranks = joined.select(pl.col("rank a", "rank b").cast(pl.Float64).fill_null(beyond), "source", "sample_id")
    marks = [Mark(a, b, scope.sample_url(*name), "/".join(name)) for a, b, *name in ranks.iter_rows()]
    return scatter(marks, "rank a", "rank b", {1.0: "1", **({float(k): f"{k}"} if k > 1 else {}), beyond: "not"})


def _side(explorer: Explorer, choices: Choices, parameters: Parameters, name: str) -> tuple[str, Scope]:
    """Return the query and the scope of a side; by default the first query at the first and the last checkpoint."""
    scope = choices.scope
    first = choices.checkpoints[0 if name == "a" else -1]
    scope = replace(
        scope,
        checkpoint=parameters.one_of(f"checkpoint_{name}", choices.checkpoints, first),
        method=parameters.one_of(f"method_{name}", list(METHODS), scope.method),
    )
    scope = across(scope, parameters, choices.query_checkpoints, choices.checkpoints, f"_{name}")
    query = parameters.text(f"query_{name}")
    if query is None:
        names = ("sketcher", "checkpoint", "queries", "query_variant")
        query = explorer.store.sql(_FIRST, {name: getattr(scope, name) for name in names}).item()
        if query is None:
            raise NameUnknownError(f"the source `{scope.queries}` has no queries", "choose another source of queries")
    return query, scope


def _joined(a: pl.DataFrame, b: pl.DataFrame) -> pl.DataFrame:
    """Return the samples of both rankings, with their rank and score in each."""

    def named(frame: pl.DataFrame, side: str) -> pl.DataFrame:
        figures: dict[str, Any] = {"rank": f"rank {side}", "score": f"score {side}"}
        return frame.select(*figures, *_KEYS).rename(figures)

    joined = named(a, "a").join(named(b, "b"), on=_KEYS, how="full", coalesce=True)
    order = pl.min_horizontal("rank a", "rank b")
    return joined.sort(order, "rank a", "rank b", nulls_last=True).select(
        "rank a", "rank b", "score a", "score b", *_KEYS
    )


ROUTES = [Route("/compare", show)]
