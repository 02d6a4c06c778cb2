"""The paper's tables: influence per source, fine-tuning against pretraining, and comparisons with q-values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.routing import Route

from lark_store.display.values import p_value
from lark_store.ui.equivalent import lines
from lark_store.ui.explorer import explorer_of, page
from lark_store.ui.parameters import Parameters
from lark_store.ui.scope import choose
from lark_store.ui.tables import csv_of, table

if TYPE_CHECKING:
    import polars as pl
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

    from lark_store.ui.explorer import Explorer
    from lark_store.ui.scope import Scope

_VIEWS = {
    "dominance": "Fine-tuning against pretraining (the paper's Table II)",
    "influence": "Influence per source (the paper's Table I)",
    "comparisons": "Differences of sources, and changes between checkpoints",
}
_FORMS = ("csv", "json")
_CONSTANT = ("queries", "query_checkpoint", "scored_by", "over_checkpoints")  # the same in all rows of a page


def show(request: Request) -> HTMLResponse:
    """Show the three tables of all checkpoints."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    choices = choose(explorer.store, parameters, "scored")
    scope = choices.scope
    tables = [
        (
            title,
            table(_measured(explorer, scope, view).drop(_CONSTANT, strict=False)),
            {form: scope.url(f"/dominance.{form}", view=view) for form in _FORMS},
        )
        for view, title in _VIEWS.items()
    ]
    options = _options(scope)
    return page(
        request,
        "dominance",
        "Dominance",
        choices=choices,
        tables=tables,
        verdicts=_verdicts(scope, _measured(explorer, scope, "dominance").filter(checkpoint=scope.at[-1])),
        chart=scope.url("/plot/dominance.svg"),
        lines=lines(explorer, "metrics", view="dominance", **options),
    )


def _asked(request: Request) -> pl.DataFrame:
    """Return the table that a URL names."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    scope = choose(explorer.store, parameters, "scored").scope
    return _measured(explorer, scope, parameters.one_of("view", _VIEWS, "dominance"))


def _verdicts(scope: Scope, dominance: pl.DataFrame) -> list[str]:
    """Return a sentence per pair of a fine-tuning and a pretraining group."""
    return [
        f"At {scope.place}, {row['source']} ({row['variant']}) has more influence than {row['against_source']} "
        f"({row['against_variant']}) on {row['ft_wins']:.0%} of {row['n_queries']} queries; the means are "
        f"{row['ft']:.3f} and {row['pt']:.3f} (p {p_value(row['p_value'])})."
        for row in dominance.iter_rows(named=True)
        if None not in (row["ft_wins"], row["ft"], row["pt"], row["p_value"])
    ]


def _options(scope: Scope) -> dict[str, Any]:
    """Return the keywords of `Store.metrics`: at all checkpoints, or for a sum."""
    options = scope.search
    del options["queries"]
    if not scope.over_checkpoints:
        del options["checkpoint"]
    return options


def _measured(explorer: Explorer, scope: Scope, view: str) -> pl.DataFrame:
    frame = explorer.store.metrics(view=view, **_options(scope))
    if "queries" in frame.columns:
        frame = frame.filter(queries=scope.queries)
    return frame


def csv(request: Request) -> Response:
    """Return a table as CSV, with all digits."""
    return Response(csv_of(_asked(request)), media_type="text/csv")


def json(request: Request) -> Response:
    """Return a table as JSON, a list of rows."""
    return Response(_asked(request).write_json(), media_type="application/json")


ROUTES = [Route("/dominance", show), Route("/dominance.csv", csv), Route("/dominance.json", json)]
