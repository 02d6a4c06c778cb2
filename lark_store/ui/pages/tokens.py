"""Which tokens of a sample carry its influence on a query."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from markupsafe import Markup
from starlette.responses import RedirectResponse
from starlette.routing import Route

from lark_store.ui.equivalent import lines
from lark_store.ui.explorer import explorer_of, page
from lark_store.ui.parameters import form_of
from lark_store.ui.scope import choose
from lark_store.ui.tables import table

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

_WITHOUT = {"queries", "method"}  # of a search: an explanation takes no method
_SHOWN = 10


async def start(request: Request) -> RedirectResponse:
    """Begin an explanation, and go to its page."""
    parameters = await form_of(request)
    scope = choose(explorer_of(request).store, parameters, scored=False).scope
    options = {name: value for name, value in scope.search.items() if name not in _WITHOUT}
    names = {
        "query": f"{scope.queries}/{parameters.required('query')}",
        "sample": parameters.required("sample"),
        "variant": parameters.required("variant"),
    }
    job = explorer_of(request).jobs.start("explain", **names, **options)
    return RedirectResponse(f"/tokens/{job.number}", 303)


def answer(request: Request) -> HTMLResponse:
    """Show an explanation's progress, or the explanation."""
    explorer = explorer_of(request)
    job = explorer.jobs.find(request.path_params["number"], "explain")
    if job.state != "done":
        return page(request, "job", "Tokens", job=job, again="/queries", what="The tokens' influence is computed.")
    found, options = job.answer, dict(job.options)
    query, sample = options.pop("query"), options.pop("sample")
    source, sample_id = sample.split("/", 1)
    sides = [("The query", "query"), ("The sample", "sample")]
    return page(
        request,
        "tokens",
        f"{sample} for {query}",
        query=query,
        sample=sample,
        sample_href=f"/sample/{quote(source)}/{quote(sample_id, safe='')}",
        sides=[(title, Markup(found.side_html(side))) for title, side in sides],  # noqa: S704  # it escapes its tokens
        strongest=table(found.strongest(_SHOWN)),
        totals=found.said.split("\n"),
        lines=lines(explorer, "explain", query, sample, **options),
    )


ROUTES = [Route("/tokens", start, methods=["POST"]), Route("/tokens/{number:int}", answer)]
