"""The guard before all pages: allowed hosts, the token, origins, and the headers of every response.

A loopback address is no boundary: any page in the same browser can send requests to it (DNS rebinding, cross-site
requests). So the `Host` must be one of ours, and each request needs the token of the printed address, once in the URL
and then in a cookie that other sites' requests don't carry.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN = "token"  # noqa: S105  # the parameter's name
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; frame-ancestors 'none'; "
        "base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # without a referrer, a form's Origin is `null`
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware that refuses foreign hosts, requests without the token, and posts from other sites."""

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], token: str, cookie: str) -> None:
        self._app, self._hosts, self._token, self._cookie = app, frozenset(hosts), token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on; add the headers to every response."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no web sockets
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        await (self._answer(Request(scope)) or self._app)(scope, receive, with_headers)

    def _answer(self, request: Request) -> PlainTextResponse | RedirectResponse | None:
        """Return the guard's own answer, or None to pass the request on."""
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return PlainTextResponse("This host is not allowed.\n\nOpen the printed address.\n", 421)
        given = request.query_params.get(TOKEN)
        if given is not None and self._is_token(given) and request.method in {"GET", "HEAD"}:
            return self._signed_in(request)
        if not self._is_token(request.cookies.get(self._cookie, "")):
            return PlainTextResponse("The token is missing or wrong.\n\nOpen the whole printed address.\n", 403)
        if request.method not in {"GET", "HEAD", "POST"}:
            return PlainTextResponse("This method is not allowed.\n", 405)
        if request.method == "POST" and not self._is_own(request):
            return PlainTextResponse("This form was sent from another site.\n", 403)
        return None

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())

    def _is_own(self, request: Request) -> bool:
        """Tell whether a post comes from one of our own pages."""
        site = request.headers.get("sec-fetch-site", "same-origin")
        return site == "same-origin" and request.headers.get("origin") == f"http://{request.headers['host']}"

    def _signed_in(self, request: Request) -> RedirectResponse:
        """Set the cookie and go to the same page without the token in its address."""
        rest = [(name, value) for name, value in parse_qsl(request.url.query, keep_blank_values=True) if name != TOKEN]
        path = "/" + request.url.path.lstrip("/")  # `//host` would lead elsewhere
        response = RedirectResponse(path + ("?" + urlencode(rest) if rest else ""), 303)
        response.set_cookie(self._cookie, self._token, httponly=True, samesite="strict", path="/")
        return response
