"""The application: its routes, its errors, and the guard before them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from lark_store.errors import LarkStoreError, NameUnknownError, NothingToScoreError
from lark_store.ui.explorer import Explorer, page
from lark_store.ui.guard import Guard
from lark_store.ui.pages import ROUTES

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.requests import Request
    from starlette.responses import HTMLResponse

_STATIC = Path(__file__).parent / "static"
_LOG = logging.getLogger(__name__)


def application(explorer: Explorer, *, hosts: Collection[str], token: str, cookie: str) -> Guard:
    """Return the ASGI application of an explorer, for requests to these hosts with this token."""
    app = Starlette(
        routes=[*ROUTES, Mount("/static", StaticFiles(directory=_STATIC))],
        exception_handlers={LarkStoreError: _fault, HTTPException: _missing, Exception: _unexpected},
    )
    app.state.explorer = explorer
    return Guard(app, hosts=hosts, token=token, cookie=cookie)


def _fault(request: Request, error: Exception) -> HTMLResponse:
    """Show an expected error: its fact and its hint."""
    assert isinstance(error, LarkStoreError)
    status = 404 if isinstance(error, NameUnknownError | NothingToScoreError) else 400
    return _error(request, error.fact, error.hint, status)


def _missing(request: Request, error: Exception) -> HTMLResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _error(request, f"there is no page `{request.url.path}`", "choose one of the pages above", 404)
    return _error(request, error.detail, None, error.status_code)


def _unexpected(request: Request, error: Exception) -> HTMLResponse:
    _LOG.error("the page %s failed", request.url.path, exc_info=error)
    return _error(request, "this page failed because of a fault in lark-store", "the terminal shows the details", 500)


def _error(request: Request, fact: str, hint: str | None, status: int) -> HTMLResponse:
    return page(request, "error", "Error", fact=fact, hint=hint, status=status)
