"""The list of queries: their influences, winners, losses and best drivers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl
from starlette.routing import Route

from lark_store.ui.equivalent import lines
from lark_store.ui.explorer import explorer_of, page
from lark_store.ui.parameters import Parameters
from lark_store.ui.scope import choose
from lark_store.ui.tables import table, with_text

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

    from lark_store.ui.explorer import Explorer
    from lark_store.ui.scope import Choices, Scope

_SHOWN = 100
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
    WHERE i.checkpoint = $checkpoint AND i.query_checkpoint = $checkpoint AND i.sketcher = $sketcher
      AND i.method = $method AND i.queries = $queries AND i.query_variant = $query_variant
      AND i.over_checkpoints IS NULL
    GROUP BY ALL),
best AS (
    SELECT query_id, max(phi) FILTER (stage = 'finetune') AS ft, max(phi) FILTER (stage = 'pretrain') AS pt,
           arg_max(driver, phi) AS best_driver
    FROM scored GROUP BY ALL),
losses AS (
    SELECT sample_id, max(loss) FILTER (checkpoint = $checkpoint) AS loss,
           max(loss) FILTER (checkpoint = $first) AS first_loss
    FROM (SELECT * REPLACE (CASE WHEN isnan(loss) THEN NULL ELSE loss END AS loss) FROM sketches)
    WHERE sketcher = $sketcher AND source = $queries AND variant = $query_variant
      AND checkpoint IN ($checkpoint, $first)
    GROUP BY ALL)
SELECT x.sample_id AS query_id, x.text, x.prompt, x.response, x.completion, x.messages, b.ft, b.pt, b.ft - b.pt AS gap,
       CASE WHEN b.ft > b.pt THEN 'finetune' WHEN b.ft < b.pt THEN 'pretrain' WHEN b.ft = b.pt THEN 'tie' END AS winner,
       l.loss, l.loss - l.first_loss AS loss_change, b.best_driver
FROM samples x LEFT JOIN best b ON b.query_id = x.sample_id LEFT JOIN losses l ON l.sample_id = x.sample_id
WHERE x.source = $queries AND ($search IS NULL OR contains(
    lower(concat_ws(' ', x.sample_id, x.prompt, x.response, x.completion, x.text, x.messages)), lower($search)))"""


def show(request: Request) -> HTMLResponse:
    """List the queries of a source."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    choices = choose(explorer.store, parameters)
    scope, search = choices.scope, parameters.text("search")
    sort = parameters.one_of("sort", _SORTS, "gap")
    start = parameters.whole("start", 0, 0, 999_999_999)
    key, is_descending = _SORTS[sort]
    rows = _rows(explorer, choices, search).sort(key, "query_id", descending=[is_descending, False], nulls_last=True)
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
        lines=lines(explorer, "ft_pt", **scope.search),
    )


def _rows(explorer: Explorer, choices: Choices, search: str | None) -> pl.DataFrame:
    """Return a row per query of the source."""
    return explorer.store.sql(_QUERIES, choices.scope.search | {"first": choices.checkpoints[0], "search": search})


def _steps(scope: Scope, start: int, n: int, kept: dict[str, Any]) -> dict[str, str]:
    """Return the addresses of the rows before and after those shown."""
    steps = {}
    if start:
        steps["Previous"] = scope.url("/queries", **kept, start=max(0, start - _SHOWN))
    if start + _SHOWN < n:
        steps["Next"] = scope.url("/queries", **kept, start=start + _SHOWN)
    return steps


ROUTES = [Route("/queries", show)]
