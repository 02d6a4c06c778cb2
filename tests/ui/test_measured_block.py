"""A query's page shows the measured influence on it, where there is any."""

from __future__ import annotations

import pytest
from helpers.explorer import HOST, TOKEN, Page
from helpers.measured import add_eif
from helpers.stores import store_label
from starlette.testclient import TestClient

from lark_store.ui.app import application
from lark_store.ui.explorer import Explorer
from lark_store.ui.jobs import Jobs


@pytest.fixture
def page(scored_copy):
    jobs = Jobs(store_label(scored_copy.path), None)
    own = application(Explorer(scored_copy, jobs), hosts={HOST}, token=TOKEN, cookie="lark-store-8000")
    client = TestClient(own, base_url=f"http://{HOST}")
    client.cookies.set("lark-store-8000", TOKEN)

    def text(checkpoint):
        response = client.get(f"/query/q101?checkpoint={checkpoint}&sketcher=small")
        assert response.status_code == 200, response.text
        return Page(response.text).text

    yield text
    jobs.close()


@pytest.mark.folder
def test_the_query_page_shows_measured_influence(page, scored_copy):
    assert "Measured influence" not in page("base")
    add_eif(scored_copy, value=lambda sample, _: int(sample[1]) - 1.5)
    shown = page("base").split("Measured influence")[1]
    places = [shown.index(name) for name in ("q0", "q1", "q2")]  # by size: -1.5, -0.5, 0.5
    assert places == sorted(places)
    assert "sgd" in shown
    assert "Measured influence" not in page("epoch-1")
