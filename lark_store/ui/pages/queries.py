"""The list of queries: their influences, winners, losses and best drivers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import polars as pl
from starlette.routing import Route

from lark_store.core.names import SUM_SEPARATOR
from lark_store.ui.equivalent import lines
from lark_store.ui.explorer import explorer_of, page
from lark_store.ui.parameters import Parameters
from lark_store.ui.scatter import Mark, Scatter, scatter
from lark_store.ui.scope import choose
from lark_store.ui.tables import containing, table, with_text

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

    from lark_store.ui.explorer import Explorer
    from lark_store.ui.scope import Choices, Scope

_SHOWN = 100
_POINTS = 1000
_SORTS: dict[str, tuple[pl.Expr, bool]] = {  # what to sort by, and whether the largest comes first
    "query_id": (pl.col("query_id"), False),
    "gap": (pl.col("gap").abs(), True),
    "ft": (pl.col("ft"), True),
    "pt": (pl.col("pt"), True),
    "loss": (pl.col("loss"), True),
    "loss_change": (pl.col("loss_change"), False),
}
_QUERIES = """
WITH scored AS (
    SELECT i.query_id, s.stage, max(i.max) AS phi, arg_max(i.source || '/' || i.argmax, i.max) AS driver
    FROM source_influence i JOIN sources s ON s.name = i.source
    WHERE i.checkpoint = $checkpoint AND i.query_checkpoint = $at AND i.sketcher = $sketcher
      AND i.method = $method AND i.queries = $queries AND i.query_variant = $query_variant
      AND i.over_checkpoints IS NOT DISTINCT FROM $summed
    GROUP BY ALL),
best AS (
    SELECT query_id, max(phi) FILTER (stage = 'finetune') AS ft, max(phi) FILTER (stage = 'pretrain') AS pt,
           arg_max(driver, phi) AS best_driver
    FROM scored GROUP BY ALL),
losses AS (
    SELECT sample_id, max(loss) FILTER (checkpoint = $at) AS loss,
           max(loss) FILTER (checkpoint = $first) AS first_loss
    FROM (SELECT * REPLACE (CASE WHEN isnan(loss) THEN NULL ELSE loss END AS loss) FROM sketches)
    WHERE sketcher = $sketcher AND source = $queries AND variant = $query_variant
      AND checkpoint IN ($at, $first)
    GROUP BY ALL)
SELECT x.sample_id AS query_id, x.text, x.prompt, x.response, x.completion, x.messages, b.ft, b.pt, b.ft - b.pt AS gap,
       CASE WHEN b.ft > b.pt THEN 'finetune' WHEN b.ft < b.pt THEN 'pretrain' WHEN b.ft = b.pt THEN 'tie' END AS winner,
       l.loss, l.loss - l.first_loss AS loss_change, b.best_driver
FROM samples x LEFT JOIN best b ON b.query_id = x.sample_id LEFT JOIN losses l ON l.sample_id = x.sample_id
WHERE x.source = $queries"""


def show(request: Request) -> HTMLResponse:
    """List the queries of a source."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    choices = choose(explorer.store, parameters)
    scope, search = choices.scope, parameters.text("search")
    sort = parameters.one_of("sort", _SORTS, "gap")
    start = parameters.whole("start", 0, 0, 999_999_999)
    key, is_descending = _SORTS[sort]
    found = _rows(explorer, choices)
    rows = (containing(found, search) if search else found).sort(
        key, "query_id", descending=[is_descending, False], nulls_last=True
    )
    links = {
        "query_id": lambda row: scope.query_url(row["query_id"]),
        "best_driver": lambda row: (
            None if row["best_driver"] is None else scope.sample_url(*row["best_driver"].split("/", 1))
        ),
    }
    sorts = {name: scope.url("/queries", search=search, sort=name) for name in _SORTS}
    return page(
        request,
        "queries",
        "Queries",
        choices=choices,
        search=search or "",
        sort=sort,
        queries=table(with_text(rows.slice(start, _SHOWN)), links, sorts=sorts),
        n=len(rows),
        start=start,
        is_scored=rows["ft"].count() + rows["pt"].count() > 0,
        steps=_steps(scope, start, len(rows), {"search": search, "sort": sort}),
        plot=_plot(rows, scope),
        attribute=lines(replace(explorer, snapshot=None), "attribute", **scope.search).command,
        significance=_significance(explorer, scope),
        lines=lines(explorer, "ft_pt", **scope.search),
    )


def _plot(rows: pl.DataFrame, scope: Scope) -> Scatter | None:
    """Return the plot of fine-tuning against pretraining of the first queries with both."""
    both = rows.select("query_id", "ft", "pt").drop_nulls().head(_POINTS)
    marks = [Mark(pt, ft, scope.query_url(query), query) for query, ft, pt in both.iter_rows()]
    return scatter(marks, "pt", "ft")


def _significance(explorer: Explorer, scope: Scope) -> str:
    """Return the lines of Python that test the best sample of every query."""
    query = (  # of our own names, which need no quotes
        f"SELECT sample_id FROM sketches WHERE sketcher = '{scope.sketcher}' AND source = '{scope.queries}' "  # noqa: S608
        f"AND variant = '{scope.query_variant}' AND checkpoint = '{scope.query_checkpoint or scope.at[-1]}'"
    )
    opened = lines(explorer, "sql", query).python.rsplit("\n", 1)
    best = lines(explorer, "top", k=1, **scope.search).python.rsplit("\n", 1)[1]
    call = best.replace("top(", "top(ids, ", 1)
    return f'{opened[0]}\nids = {opened[1]}["sample_id"].to_list()\n{call}.frame.sort("q_value", nulls_last=True)'


def _rows(explorer: Explorer, choices: Choices) -> pl.DataFrame:
    """Return a row per query of the source."""
    scope = choices.scope
    keys = {name: getattr(scope, name) for name in ("sketcher", "queries", "query_variant")}
    places = {"checkpoint": scope.at[-1], "at": scope.query_checkpoint or scope.at[-1], "first": choices.checkpoints[0]}
    summed = SUM_SEPARATOR.join(scope.at) if scope.over_checkpoints else None
    method = {"method": scope.stored_method, "summed": summed}
    return explorer.store.sql(_QUERIES, keys | places | method)


def _steps(scope: Scope, start: int, n: int, kept: dict[str, Any]) -> dict[str, str]:
    """Return the addresses of the rows before and after those shown."""
    steps = {}
    if start:
        steps["Previous"] = scope.url("/queries", **kept, start=max(0, start - _SHOWN))
    if start + _SHOWN < n:
        steps["Next"] = scope.url("/queries", **kept, start=start + _SHOWN)
    return steps


ROUTES = [Route("/queries", show)]
