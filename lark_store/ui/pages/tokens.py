"""Which tokens of a sample carry its influence on a query."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote

from markupsafe import Markup
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from lark_store.ui.equivalent import lines
from lark_store.ui.explorer import explorer_of, page
from lark_store.ui.parameters import Parameters, form_of
from lark_store.ui.scope import choose, sample_path
from lark_store.ui.tables import table

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

_WITHOUT = {"method"}  # of a search: an explanation takes none
_MEANINGS = {
    "position": "what the gradient carries at each token's position",
    "target": "what the loss of predicting each token carries; only underlined tokens are predicted",
}


async def start(request: Request) -> RedirectResponse:
    """Begin an explanation, and go to its page."""
    parameters = await form_of(request)
    scope = choose(explorer_of(request).store, parameters, strict=True).scope
    options = {name: value for name, value in scope.search.items() if name not in _WITHOUT}
    names = {name: unquote(parameters.required(name)) for name in ("query", "sample", "variant")}
    job = explorer_of(request).jobs.start("explain", **names, **options)
    return RedirectResponse(f"/tokens/{job.number}", 303)


def answer(request: Request) -> HTMLResponse:
    """Show an explanation's progress, or the explanation."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    job = explorer.jobs.find(request.path_params["number"], "explain")
    if job.state != "done":
        return page(request, "job", "Tokens", job=job, again="/queries", what="The tokens' influence is computed.")
    by = parameters.one_of("by", _MEANINGS, "position")
    found, options = job.answer, dict(job.options)
    query, sample = options.pop("query"), options.pop("sample")
    source, sample_id = sample.split("/", 1)
    return page(
        request,
        "tokens",
        "Which tokens?",
        query=query,
        sample=sample,
        sample_href=sample_path(source, sample_id),
        by=by,
        meanings=_MEANINGS,
        sides=[(title, Markup(found.html(side, by))) for title, side in (("Query", "query"), ("Sample", "sample"))],  # noqa: S704  # it escapes its tokens
        strongest=table(found.table(by)),
        how=found.how.split("\n"),
        lines=lines(explorer, "explain", query, sample, **options),
    )


def css(_request: Request) -> Response:
    """Return the stylesheet of tokens."""
    from lark_store.display.tokens import TOKEN_CSS

    return Response(TOKEN_CSS, media_type="text/css")


ROUTES = [
    Route("/tokens", start, methods=["POST"]),
    Route("/tokens/{number:int}", answer),
    Route("/tokens.css", css),
]
