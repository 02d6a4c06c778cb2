"""The guard: hosts, the token, origins, headers."""

from __future__ import annotations

import pytest
from helpers.explorer import HOST, TOKEN

PATHS = ["/", "/queries", "/sql?query=SELECT+1", "/dominance.csv", "/static/explorer.css", "/nowhere", "/ask/1"]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1", "127.0.0.1:9000", "localhost:8000.evil", "[::1]:8000", ""],
)
def test_foreign_host_is_refused(client, host):
    response = client.get("/", headers={"host": host})
    assert (response.status_code, "lark.store" in response.text) == (421, False)


def test_second_host_is_refused(client):
    assert client.get("/", headers=[("host", HOST), ("host", "evil.example")]).status_code == 421


@pytest.mark.parametrize("path", PATHS)
def test_nothing_without_the_token(stranger, path):
    for cookies in (
        {},
        {"lark-store-8000": "wrong"},
        {"lark-store-8000": TOKEN[:-1]},
        {"lark-store-8000": TOKEN + "é"},
    ):
        stranger.cookies.clear()
        headers = {"cookie": "; ".join(f"{k}={v}" for k, v in cookies.items()).encode()} if cookies else {}
        response = stranger.get(path, headers=headers)
        assert response.status_code == 403
        assert response.text == "The token is missing or wrong.\n\nOpen the whole printed address.\n"


def test_wrong_token_in_the_address_is_refused(stranger):
    assert stranger.get("/?token=wrong").status_code == 403


def test_token_becomes_a_cookie(stranger):
    response = stranger.get(f"/query/q1?a=1&token={TOKEN}&b=x%26y")
    assert (response.status_code, response.headers["location"]) == (303, "/query/q1?a=1&b=x%26y")
    name, *attributes = response.headers["set-cookie"].split("; ")
    assert name == f"lark-store-8000={TOKEN}"
    assert {a.lower() for a in attributes} == {"httponly", "samesite=strict", "path=/"}


def test_token_does_not_lead_elsewhere(stranger):
    assert stranger.get(f"http://{HOST}//evil.example/x?token={TOKEN}").headers["location"].startswith("/evil.example")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://127.0.0.1:9000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
    ],
)
@pytest.mark.parametrize("path", ["/ask", "/tokens", "/jobs/1/cancel"])
def test_post_from_elsewhere_is_refused(client, path, headers):
    response = client.post(path, data={"prompt": "a"}, headers=headers)
    assert (response.status_code, response.text) == (403, "This form was sent from another site.\n")


def test_post_without_an_origin_is_refused(client):
    del client.headers["origin"]
    assert client.post("/ask", data={"prompt": "a"}).status_code == 403


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(client, method):
    assert client.request(method, "/").status_code == 405


@pytest.mark.parametrize("path", PATHS)
def test_every_response_has_the_headers(client, path):
    for host in (HOST, "evil.example"):
        headers = client.get(path, headers={"host": host}).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "script-src" not in policy  # so no script runs at all
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["cross-origin-resource-policy"] == "same-origin"
