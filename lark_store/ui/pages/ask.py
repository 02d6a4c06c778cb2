"""A new question: its prompt and response are sketched by a checkpoint's model, and samples ranked for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import RedirectResponse
from starlette.routing import Route

from lark_store.ui.equivalent import lines
from lark_store.ui.explorer import explorer_of, page
from lark_store.ui.hits import rankings_of, summary
from lark_store.ui.parameters import Parameters, form_of
from lark_store.ui.scope import Scope, choose
from lark_store.ui.tables import parts_of, words_of

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

    from lark_store.ui.jobs import Job

_MOST = 50


def show(request: Request) -> HTMLResponse:
    """Show the form."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    choices = choose(explorer.store, parameters, "askable")
    return page(request, "ask", "Ask", choices=choices)


async def start(request: Request) -> RedirectResponse:
    """Begin a question, and go to its page."""
    parameters = await form_of(request)
    scope = choose(explorer_of(request).store, parameters, "askable", strict=True).scope
    search = scope.search
    del search["queries"]
    prompt = parameters.required("prompt").replace("\r\n", "\n")
    response = (parameters.text("response") or "").replace("\r\n", "\n") or None
    k = parameters.whole("k", 5, 1, _MOST)
    job = explorer_of(request).jobs.start("ask", prompt=prompt, response=response, k=k, **search)
    return RedirectResponse(f"/ask/{job.number}", 303)


def answer(request: Request) -> HTMLResponse:
    """Show a question's progress, or its answer."""
    explorer = explorer_of(request)
    job = explorer.jobs.find(request.path_params["number"], "ask")
    if job.state != "done":
        return page(request, "job", "Ask", job=job, again="/ask", what="The model is being asked.")
    return page(request, "answer", "Ask", **_answered(job), lines=lines(explorer, *_call(job)[0], **_call(job)[1]))


def _answered(job: Job) -> dict[str, Any]:
    """Return the values of the page of an answer."""
    found = job.answer
    parts = parts_of({"prompt": job.options["prompt"], "response": job.options["response"]})
    names = ("sketcher", "query_variant", "method", "checkpoint")
    at = job.options.get("query_checkpoint")
    scope = Scope(queries="", query_checkpoint=at, **{name: job.options[name] for name in names})
    return {
        "parts": parts,
        "said": found.said,
        "rankings": rankings_of(found.proponents, found.opponents, words_of(parts), scope),
        "summary": summary(found.proponents),
        "options": {name: value for name, value in job.options.items() if name not in ("prompt", "response")},
    }


def _call(job: Job) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the method and the arguments that give the same answer."""
    options = dict(job.options)
    prompt, response = options.pop("prompt"), options.pop("response")
    if response is None:
        return ("trace", prompt), options
    return ("top",), {"new": {"prompt": prompt, "response": response}} | options


def cancel(request: Request) -> RedirectResponse:
    """End a question."""
    explorer_of(request).jobs.cancel(request.path_params["number"])
    return RedirectResponse("/ask", 303)


ROUTES = [
    Route("/ask", show, methods=["GET"]),
    Route("/ask", start, methods=["POST"]),
    Route("/ask/{number:int}", answer),
    Route("/jobs/{number:int}/cancel", cancel, methods=["POST"]),
]
