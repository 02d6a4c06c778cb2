"""Sums over checkpoints and another checkpoint of the queries: on pages, in links, and in the lines outside."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from html import unescape
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from helpers.explorer import Page, client_of
from helpers.program import lark
from starlette.datastructures import QueryParams

from lark_store import Store
from lark_store.errors import InputError
from lark_store.ui.parameters import Parameters
from lark_store.ui.scope import Scope, across

SUM = {"over_checkpoints": "sum"}
ACROSS = {"checkpoint": "epoch-1", "query_checkpoint": "base"}
OPTIONS = {"queries": "test", "sketcher": "small", "method": "cosine"}
BOTH = ["base", "epoch-1"]


def lines_of(page):
    return re.search(r"Command line\s*(.*?)\s*Python\s*(.*?)\s*$", page.text, re.DOTALL).groups()


def hits_of(page):
    return re.findall(r"((?:finetune|songs)/\S+) · (?:finetune|pretrain) · ", page.text)


@pytest.mark.parametrize("choice", [SUM, ACROSS, {"over_checkpoints": "lr-weighted"}], ids=str)
def test_query_page_ranks_as_top_does(client, explored_path, choice):
    page = Page(client.get(f"/query/q100?{urlencode(choice)}").text)
    place = choice if "checkpoint" in choice else choice | {"checkpoint": BOTH}
    with Store.open(explored_path) as store:
        expected = [store.top("q100", k=5, opponents=side, **place, **OPTIONS) for side in (False, True)]
    assert hits_of(page)[:3] == [f"{hit.source}/{hit.sample_id}" for hit in expected[0]][:3]
    assert expected[0].score in page.text
    assert "Which tokens?" not in page.text  # those are of one score
    for link in page.values("a", "href") + page.values("img", "src"):
        if link.startswith(("/sample/", "/plot/", "/checkpoints/")):
            given = parse_qs(urlsplit(link).query)
            assert {name: given[name] for name in choice} == {name: [value] for name, value in choice.items()}
    (image,) = page.values("img", "src")
    assert client.get(image).status_code == 200


@pytest.fixture(scope="module")
def scored_across(explored_path, tmp_path_factory):
    """A client of a copy of the store, scored for sums and across checkpoints too."""
    root = tmp_path_factory.mktemp("across") / "lark.store"
    shutil.copytree(explored_path, root)
    with Store.open(root) as store:
        for more in ({"over_checkpoints": "sum"}, {"method": "dot", "over_checkpoints": "sum"}):
            store.attribute(BOTH, queries="test", sketcher="small", **more)
        store.attribute(["epoch-1"], queries="test", sketcher="small", method="cosine", query_checkpoint="base")
    client, store = client_of(root)
    yield client
    store.close()


@pytest.mark.folder
@pytest.mark.parametrize(
    "path", ["/query/q100", "/map", "/dominance", "/compare", "/queries", "/sample/finetune/q2", "/map/samples"]
)
@pytest.mark.parametrize("choice", [SUM, ACROSS], ids=["sum", "across"])
def test_lines_outside_name_the_choice(scored_across, path, choice):
    sides = {f"{name}_{side}": value for side in "ab" for name, value in choice.items()} if path == "/compare" else {}
    given = choice | sides | ({"group": "songs"} if path == "/map/samples" else {})
    response = scored_across.get(f"{path}?{urlencode(given)}")
    assert response.status_code == 200, Page(response.text).text
    if path.startswith("/sample/"):  # its lines show the sample
        return
    command, python = lines_of(Page(response.text))
    words = shlex.split(command)
    for name, value in choice.items():
        if name == "checkpoint" and path in ("/map", "/dominance"):  # all of them
            continue
        assert words[words.index(f"--{name.replace('_', '-')}") + 1] == value
        assert f"{name}={value!r}" in python
    if choice is SUM:
        assert words.count("--checkpoint") == 2 * (1 + (path == "/compare"))
    ran = lark(f"{' '.join(map(shlex.quote, shlex.split(command.splitlines()[0])[1:]))} -f json")
    assert ran.code == 0, ran.err
    assert len(json.loads(ran.out)) > 0


def test_map_has_one_column_of_a_sum(client, explored_path):
    html = client.get(f"/map?{urlencode(SUM)}").text
    heads = re.findall(r"<th scope=\"col\"[^>]*>(.*?)</th>", html)
    assert heads[2:] == ["base + epoch-1"]
    with Store.open(explored_path) as store:
        groups = store.groups(checkpoint=BOTH, over_checkpoints="sum", **OPTIONS)
    rows = dict(re.findall(r'<th scope="row">(.*?)</th>.*?<a href="[^"]*">(.*?)</a>', html, re.DOTALL))
    for name, value in groups.select("group_name", "value").iter_rows():
        assert float(rows[name].replace("−", "-")) == pytest.approx(value, rel=0.05)
    (link, *_) = re.findall(r'<td class="heat[^"]*"><a href="([^"]+)"', html)
    shown = Page(client.get(unescape(link)).text).text
    assert "at base + epoch-1" in shown


def test_chosen_checkpoints_are_summed_alone(client):
    page = Page(client.get(f"/query/q100?{urlencode(SUM | {'summed': 'base'})}").text)
    assert "--over-checkpoints sum" in page.text
    assert shlex.split(lines_of(page)[0]).count("--checkpoint") == 1
    ticked = [a["value"] for tag, a in page.elements if tag == "input" and "checked" in a]
    assert ticked == ["base"]


def test_dominance_of_scores_that_are_not_stored_says_how_to_get_them(client):
    response = client.get(f"/dominance?{urlencode({'over_checkpoints': 'lr-weighted', 'method': 'cosine'})}")
    text = Page(response.text).text
    assert (response.status_code, "hint: " in text, "attribute(" in text) == (404, True, True)


def test_sums_of_words_alone_are_refused_clearly(client):
    response = client.get(f"/query/q100?{urlencode(SUM | {'method': 'bm25'})}")
    assert (response.status_code, "`bm25` uses no checkpoint" in Page(response.text).text) == (400, True)


def test_choices_in_an_address_are_checked():
    scope = Scope("s", "q", "raw", "cosine", "b")
    for given in ("query_checkpoint=z", "over_checkpoints=mean", "over_checkpoints=sum&summed=a&summed=z"):
        with pytest.raises(InputError, match="can't be"):
            across(scope, Parameters(QueryParams(given)), ["a", "b"], ["a", "b"])
    with pytest.raises(InputError, match="can't be"):
        across(scope, Parameters(QueryParams("over_checkpoints=sum")), ["a"], [])
    chosen = across(scope, Parameters(QueryParams("over_checkpoints=sum&summed=b&summed=a")), ["a"], ["a", "b", "c"])
    assert (chosen.at, chosen.place) == (["a", "b"], "a + b")
    assert chosen.at_each("c") == Scope("s", "q", "raw", "cosine", "c")
    again = across(scope, Parameters(QueryParams(urlsplit(chosen.url("/x")).query)), ["a"], ["a", "b", "c"])
    assert again == chosen


@pytest.mark.folder
def test_scores_of_a_sum_alone_are_shown_at_once(scored_across):
    page = Page(scored_across.get("/dominance?method=dot").text)
    assert "At base + epoch-1, finetune" in page.text
    assert "--over-checkpoints sum" in page.text
