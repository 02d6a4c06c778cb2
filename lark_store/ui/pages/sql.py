"""The SQL console: one SELECT over the store's views, its result as a table, a chart or a file."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlencode

from starlette.responses import Response
from starlette.routing import Route

from lark_store.errors import LarkStoreError
from lark_store.query.sql.overview import schema
from lark_store.ui.equivalent import lines
from lark_store.ui.explorer import explorer_of, page
from lark_store.ui.parameters import Parameters
from lark_store.ui.tables import csv_of, table

if TYPE_CHECKING:
    import polars as pl
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

    from lark_store.ui.explorer import Explorer

SECONDS, MEMORY, ROWS = 10.0, "1GB", 10_000
_EXAMPLES = {
    "The highest influences": "SELECT query_id, source, sample_id, score FROM influence ORDER BY score DESC LIMIT 20",
    "The mean of each source's highest influence": (
        "SELECT checkpoint, source, variant, avg(max) AS mean_max_influence\n"
        "FROM source_influence GROUP BY ALL ORDER BY ALL"
    ),
    "Loss by checkpoint": (
        "SELECT c.epoch, s.source, avg(s.loss) AS loss\n"
        "FROM sketches s JOIN checkpoints c ON c.name = s.checkpoint GROUP BY ALL ORDER BY ALL"
    ),
    "Samples that drive many queries": (
        "SELECT source, sample_id, count(DISTINCT query_id) AS n\n"
        "FROM influence WHERE rank = 1 GROUP BY ALL ORDER BY n DESC LIMIT 20"
    ),
}


def show(request: Request) -> HTMLResponse:
    """Show the console, and the result of the query in the URL."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    query, error, frame = parameters.text("query"), None, None
    if query is not None:
        try:
            frame = _run(explorer, query)
        except LarkStoreError as caught:
            error = caught
    x, y = parameters.text("x"), parameters.text("y")
    chart = urlencode({"query": query, "x": x, "y": y}) if frame is not None and x and y else None
    return page(
        request,
        "sql",
        "SQL",
        status=200 if error is None else 400,
        query=query or "",
        error=error,
        result=None if frame is None else table(frame),
        n=0 if frame is None else len(frame),
        is_cut=frame is not None and len(frame) == ROWS,
        columns=[] if frame is None else frame.columns,
        numeric=[] if frame is None else [name for name in frame.columns if frame[name].dtype.is_numeric()],
        axes=(x, y),
        chart=chart,
        limits=(SECONDS, MEMORY, ROWS),
        examples=_EXAMPLES,
        views={name: table(described) for name, described in schema().items()},
        lines=None if query is None else lines(explorer, "sql", query),
    )


def csv(request: Request) -> Response:
    """Return a query's result as CSV."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    return Response(csv_of(_run(explorer, parameters.required("query"))), media_type="text/csv")


def chart(request: Request) -> Response:
    """Draw two columns of a query's result."""
    from lark_store.charts.columns import columns_chart
    from lark_store.charts.files import svg

    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    query, x, y = (parameters.required(name) for name in ("query", "x", "y"))
    drawn = svg(columns_chart(_run(explorer, query), x, y).to_dict(), "chart")
    return Response(drawn, media_type="image/svg+xml")


def _run(explorer: Explorer, query: str) -> pl.DataFrame:
    return explorer.store.sql(query, timeout=SECONDS, memory=MEMORY, max_rows=ROWS)


ROUTES = [Route("/sql", show), Route("/sql.csv", csv), Route("/sql.svg", chart)]
