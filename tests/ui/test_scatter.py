"""Points that are links, and what the page Queries says of significance."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest
from helpers.explorer import ODD_ID, Page

from lark_store import Store
from lark_store.ui.scatter import SIDE, Mark, scatter


def points_of(page):
    return [a for tag, a in page.elements if tag == "a" and "tabindex" in a]


@pytest.mark.parametrize("path", ["/queries", "/compare?k=10"])
def test_points_lead_where_the_table_leads_without_a_stop_of_the_keyboard(client, path):
    page = Page(client.get(path).text)
    points = points_of(page)
    assert len(points) > 3
    assert {point["tabindex"] for point in points} == {"-1"}
    addresses = {point["href"] for point in points}
    assert addresses <= set(page.rows)
    assert {client.get(address).status_code for address in addresses} == {200}
    (drawing,) = [a for tag, a in page.elements if tag == "svg"]
    assert drawing["aria-hidden"] == "true"


def test_point_has_the_place_of_its_figures(client, explored_path):
    page = Page(client.get("/queries").text)
    circles = [(float(a["cx"]), float(a["cy"])) for tag, a in page.elements if tag == "circle"]
    names = [urlsplit(point["href"]).path for point in points_of(page)]
    with Store.open(explored_path) as store:
        frame = store.ft_pt("epoch-1", queries="test", sketcher="small")
    figures = {row["query_id"]: (row["pt"], row["ft"]) for row in frame.iter_rows(named=True)}
    placed = {name.removeprefix("/query/"): place for name, place in zip(names, circles, strict=True)}
    for one, other in (("q100", "q102"), ("q103", "q104")):
        for axis, sign in ((0, 1), (1, -1)):  # y grows downwards
            shown = placed[one][axis] - placed[other][axis]
            assert shown * sign * (figures[one][axis] - figures[other][axis]) > 0


def test_points_and_ticks_have_places_within_the_square():
    made = scatter([Mark(-0.3, 0.1, "/a", "a"), Mark(0.2, 0.45, "/b", "b")], "x", "y")
    assert [tick.label for tick in made.ticks] == ["−0.2", "0.0", "0.2", "0.4"]
    assert all(0 <= value <= SIDE for mark in made.marks for value in (mark.x, mark.y))
    assert made.marks[1].x > made.marks[0].x
    assert made.marks[1].y < made.marks[0].y
    assert scatter([], "x", "y") is None
    assert scatter([Mark(0.0, 0.0, "/", "0")], "x", "y").marks[0].x == SIDE / 2
    named = scatter([Mark(1, 3, "/", "")], "x", "y", {1.0: "1", 2.0: "2", 3.0: "not"})
    assert [tick.label for tick in named.ticks] == ["1", "2", "not"]


def test_samples_of_one_ranking_are_beyond_the_other(client):
    page = Page(client.get("/compare?k=2&query_a=q100&query_b=q103").text)
    assert "not: not among the 2 best of that ranking" in page.text
    assert len(points_of(page)) == len([link for link in page.rows if link.startswith("/sample/")])


def test_lines_of_significance_test_every_query(client, explored_path):
    page = Page(client.get("/queries").text)
    assert "The store holds no p- and q-values" in page.text
    code = re.search(r"the most significant first:\s*(import lark_store.*?)\s*The same answer", page.text, re.DOTALL)[1]
    *setup, call = code.splitlines()
    names: dict[str, object] = {}
    exec("\n".join(setup), names)  # noqa: S102
    frame = eval(call, names)  # noqa: S307
    assert sorted(frame["query_id"]) == sorted(["q100", ODD_ID, "q102", "q103", "q104", "q105"])
    assert frame["q_value"].is_sorted()
    with Store.open(explored_path) as store:
        hit = store.top("q103", checkpoint="epoch-1", queries="test", sketcher="small", k=1)[0]
    assert frame.filter(query_id="q103")["q_value"].item() == hit.q_value
