"""The pages: what they show, hostile texts, links, errors, and that none changes a store."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from helpers.explorer import HOSTILE, ODD_ID, Page, client_of
from helpers.program import lark
from helpers.texts import qa_rows, write_jsonl

from lark_store import Store
from lark_store.ui.explorer import Explorer
from lark_store.ui.jobs import Jobs

ODD = quote(ODD_ID, safe="")
PATHS = [
    "/",
    "/queries",
    f"/queries?{urlencode({'search': HOSTILE})}",
    "/query/q100",
    f"/query/{ODD}",
    "/checkpoints/q100",
    f"/query/q100?{urlencode({'where': 'n_tokens > 3', 'k': 50})}",
    f"/sample/finetune/{ODD}",
    "/sample/finetune/q2",
    "/samples/finetune",
    "/map",
    "/map?by=topic",
    "/dominance",
    "/ask",
    "/compare",
    f"/compare?{urlencode({'query_a': ODD_ID, 'query_b': 'q100', 'k': 5})}",
    f"/sql?{urlencode({'query': 'SELECT * FROM samples'})}",
    f"/sql?{urlencode({'query': HOSTILE})}",
    f"/query/{quote(HOSTILE, safe='')}",
    f"/{quote(HOSTILE, safe='')}",
]


@pytest.mark.parametrize("path", PATHS)
def test_hostile_text_stays_text(client, path):
    page = Page(client.get(path).text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "i", "style", "base"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        if tag == "img":
            assert attributes["src"].startswith("/plot/")
        for name in ("href", "src", "action"):
            assert (attributes.get(name) or "/").startswith(("/", "#", "data:,", "?")), (tag, attributes)
    assert "\u202e" not in page.text
    assert "{{ 7*7 }}" in page.text or "7*7" not in page.text  # not 49: texts are no templates


def test_hostile_text_is_shown_as_it_is(client):
    shown = Page(client.get("/query/q100").text).text
    assert HOSTILE.replace("\u202e", "\ufffd") in shown


@pytest.mark.parametrize("path", PATHS[:12])
def test_pages_answer_and_say_how_to_get_the_same(client, path):
    response = client.get(path)
    page = Page(response.text)
    assert response.status_code == 200
    assert [tag for tag, _ in page.elements].count("h1") == 1
    if not path.startswith("/ask"):
        assert "lark-store " in page.text
        assert "lark_store.Store.open(" in page.text


def test_every_link_leads_to_a_page(client):
    seen, waiting = set(), ["/"]
    while waiting and len(seen) < 150:
        path = waiting.pop(0)
        response = client.get(path)
        assert response.status_code == 200, path
        seen.add(path)
        if "html" not in response.headers["content-type"]:
            continue
        page = Page(response.text)
        found = page.values("a", "href") + page.values("img", "src")
        for link in found:
            target = path.split("?")[0] + link if link.startswith("?") else link
            if target.startswith("/") and target not in seen and target not in waiting:
                waiting.append(target)
    assert {f"/sample/finetune/{ODD}"} <= {path.split("?")[0] for path in seen}


@pytest.mark.folder
def test_no_page_changes_the_store(client, explored_path):
    def contents():
        files = [p for p in explored_path.rglob("*") if p.is_file() and "locks" not in p.parts]
        return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if not p.name.endswith(("-shm", "-wal"))}

    before = contents()
    for path in PATHS:
        client.get(path)
    assert contents() == before


def commands(page):
    """Return the command and the Python of a page."""
    command, python = re.search(r"Command line\s*(.*?)\s*Python\s*(.*?)\s*$", page.text, re.DOTALL).groups()
    return command, python


@pytest.mark.parametrize("path", ["/query/q100", f"/query/{ODD}", "/checkpoints/q100?k=3", "/queries", "/dominance"])
def test_command_and_python_give_the_same_answer(client, path):
    command, python = commands(Page(client.get(path).text))
    ran = lark(f"{' '.join(map(shlex.quote, shlex.split(command)[1:]))} -f json")
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)
    *setup, call = python.strip().splitlines()
    names: dict[str, object] = {}
    exec("\n".join(setup), names)  # noqa: S102
    result = eval(call, names)  # noqa: S307
    frame = result if hasattr(result, "columns") else result.frame
    assert len(rows) == len(frame) > 0
    key = "score" if "score" in frame.columns else "ft" if "ft" in frame.columns else "n"
    if key in frame.columns:
        assert [row[key] for row in rows] == pytest.approx(frame[key].to_list())


def test_query_page_shows_the_highest_and_the_lowest_scores(client, explored_path):
    with Store.open(explored_path) as store:
        scores = store.scores(["q100"], checkpoint="epoch-1", queries="test", sketcher="small")
    order = np.argsort(-scores.matrix[0], kind="stable")
    names = [f"{row['source']}/{row['sample_id']}" for row in scores.samples.iter_rows(named=True)]
    links = Page(client.get("/query/q100?k=3").text)
    shown = re.findall(r"((?:finetune|songs)/\S+) · (?:finetune|pretrain) · ", links.text)
    assert shown[:3] == [names[i] for i in order[:3]]
    assert shown[3:6] == [names[i] for i in order[::-1][:3]]


def test_queries_are_sorted_and_searched(client, explored_path):
    with Store.open(explored_path) as store:
        frame = store.ft_pt("epoch-1", queries="test", sketcher="small")
    gaps = dict(zip(frame["query_id"], (frame["ft"] - frame["pt"]).abs(), strict=True))
    expected = sorted(gaps, key=lambda name: -gaps[name])
    page = Page(client.get("/queries?sort=gap").text)
    shown = [link for link in page.rows if link.startswith("/query/")]
    assert [link.split("?")[0] for link in shown] == [f"/query/{quote(name, safe='')}" for name in expected]
    found = Page(client.get("/queries?search=ORGAN+103").text)
    assert len([link for link in found.rows if link.startswith("/query/")]) == 1


def test_sample_page_shows_its_influence_on_every_query(client, explored_path):
    with Store.open(explored_path) as store:
        scores = store.scores(checkpoint="epoch-1", queries="test", sketcher="small")
    place = [row["sample_id"] for row in scores.samples.iter_rows(named=True)].index("q2")
    order = np.argsort(-scores.matrix[:, place], kind="stable")
    page = Page(client.get("/sample/finetune/q2").text)
    shown = [link for link in page.values("a", "href") if link.startswith("/query/")]
    assert [link.split("?")[0] for link in shown] == [f"/query/{quote(scores.query_ids[i], safe='')}" for i in order]


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/query/nobody", 404, "`test` has no sample `nobody`"),
        ("/query/q100?checkpoint=epoch-9", 404, "no checkpoint `epoch-9`"),
        ("/query/q100?k=0", 400, "`k` must be a number from 1 to 50, not `0`"),
        ("/query/q100?k=²", 400, "`k` must be a number"),
        ("/query/q100?where=nonsense", 400, "nonsense"),
        ("/query/q100?method=magic", 404, "no method `magic`"),
        ("/sample/finetune/nobody", 404, "`finetune` has no sample `nobody`"),
        ("/samples/nowhere", 404, "no source `nowhere`"),
        ("/sql?query=SELECT+nothing", 400, "nothing"),
        ("/sql?query=DROP+TABLE+samples", 400, "SELECT"),
        ("/sql?query=SELECT+*+FROM+read_csv('/etc/passwd')", 400, "SQL"),
        ("/ask/7", 404, "there is no question 7"),
        ("/tokens/7", 404, "there is no question 7"),
        ("/dominance.csv?view=none", 400, "`view` can't be `none`"),
        ("/nowhere", 404, "there is no page `/nowhere`"),
        ("/static/../guard.py", 404, ""),
    ],
)
def test_wrong_requests_are_clear(client, path, status, said):
    response = client.get(path)
    assert (response.status_code, said in Page(response.text).text) == (status, True)
    assert "Traceback" not in response.text


def test_sql_stops_at_its_limits(client, monkeypatch):
    monkeypatch.setattr("lark_store.ui.pages.sql.ROWS", 100)
    page = Page(client.get("/sql?query=SELECT+*+FROM+range(1000)").text)
    assert "100 rows; the result is cut off there" in page.text
    monkeypatch.setattr("lark_store.ui.pages.sql.SECONDS", 0.3)
    endless = "SELECT count(*) FROM range(1000000000) a, range(1000) b"
    response = client.get(f"/sql?{urlencode({'query': endless})}")
    assert (response.status_code, "0.3" in response.text) == (400, True)


def test_two_columns_are_drawn(client):
    for query, x, mark in (
        ("SELECT source, count(*) AS n FROM samples GROUP BY ALL", "source", "rect"),
        ("SELECT i AS source, i * i AS n FROM range(9) t(i)", "source", "symbol"),
    ):
        asked = urlencode({"query": query, "x": x, "y": "n"})
        (image,) = Page(client.get(f"/sql?{asked}").text).values("img", "src")
        drawn = client.get(image)
        assert (drawn.status_code, drawn.headers["content-type"]) == (200, "image/svg+xml")
        assert f"mark-{mark} role-mark" in drawn.text
    for x, y, said in (
        ("nothing", "n", "the result has no column `nothing`"),
        ("n", "source", "the column `source` has no numbers"),
    ):
        asked = urlencode({"query": "SELECT 'a' AS source, 1 AS n", "x": x, "y": y})
        response = client.get(f"/sql.svg?{asked}")
        assert (response.status_code, said in Page(response.text).text) == (400, True)
    many = urlencode({"query": "SELECT 't' || i AS t, i FROM range(100) r(i)", "x": "t", "y": "i"})
    assert "at most 60 texts" in Page(client.get(f"/sql.svg?{many}").text).text


def test_dominance_says_who_wins(client, explored_path):
    with Store.open(explored_path) as store:
        phi = store.sql(
            "SELECT source, query_id, max FROM source_influence WHERE checkpoint = 'epoch-1' AND sketcher = 'small'"
        )
    ft, pt = (dict(phi.filter(source=name).select("query_id", "max").iter_rows()) for name in ("finetune", "songs"))
    share = np.mean([ft[query] > pt[query] for query in ft])
    said = Page(client.get("/dominance").text).text
    assert f"finetune (chatml) has more influence than songs (raw) on {share:.0%} of 6 queries" in said
    assert f"the means are {np.mean(list(ft.values())):.3f} and {np.mean(list(pt.values())):.3f}" in said


def test_downloads_have_all_digits(client, explored_path):
    with Store.open(explored_path) as store:
        frame = store.metrics(view="influence", sketcher="small")
    rows = client.get("/dominance.json?view=influence").json()
    assert [row["mean_max_influence"] for row in rows] == frame["mean_max_influence"].to_list()
    assert client.get("/dominance.csv?view=influence").text.startswith(frame.columns[0])
    assert client.get("/sql.csv?query=SELECT+1+AS+a").text == "a\n1\n"


def test_empty_store_says_what_to_do(tmp_path):
    from starlette.testclient import TestClient

    from lark_store.ui.app import application

    with Store.create(tmp_path / "lark.store") as store:
        app = application(Explorer(store, Jobs(None, None)), hosts={"a:1"}, token="t" * 20, cookie="c")
        client = TestClient(app, base_url="http://a:1", cookies={"c": "t" * 20})
        assert "There are no checkpoints yet" in client.get("/").text
        for path in ("/queries", "/query/q", "/map", "/dominance", "/compare", "/ask", "/plot/histogram.svg?query=q"):
            response = client.get(path)
            assert (response.status_code, "hint: " in response.text) == (404, True), path
        assert client.get("/sql?query=SELECT+count(*)+FROM+samples").status_code == 200


@pytest.mark.folder
def test_snapshot_is_shown_as_it_was(explored_path, tmp_path):
    from starlette.testclient import TestClient

    from lark_store.ui.app import application

    shutil.copytree(explored_path, tmp_path / "lark.store")
    with Store.open(tmp_path / "lark.store") as store:
        store.snapshot_create("before")
        store.sample_remove("finetune", ["q1"])
    with Store.open(tmp_path / "lark.store", snapshot="before") as store:
        explorer = Explorer(store, Jobs(None, "before"), "before")
        app = application(explorer, hosts={"a:1"}, token="t" * 20, cookie="c")
        client = TestClient(app, base_url="http://a:1", cookies={"c": "t" * 20})
        for path in ("/", "/query/q100", "/sample/finetune/q1", "/map", "/dominance", "/queries"):
            response = client.get(path)
            assert (response.status_code, "--snapshot before" in response.text) == (200, True), path


def test_many_readers_at_once(client):
    from concurrent.futures import ThreadPoolExecutor

    alone = {path: client.get(path).text for path in ("/query/q100", f"/query/{ODD}", "/map", "/queries", "/")}
    with ThreadPoolExecutor(8) as pool:
        for path, text in pool.map(lambda path: (path, client.get(path).text), list(alone) * 6):
            assert text == alone[path], path


@pytest.mark.folder
def test_removal_names_the_store_and_quotes_the_sample(client, explored_path):
    page = Page(client.get(f"/sample/finetune/{ODD}").text)
    (command,) = re.findall(r"lark-store sample remove .*", page.text)
    words = shlex.split(command)
    assert words == ["lark-store", "sample", "remove", "finetune", ODD_ID, "--store", str(explored_path)]


@pytest.fixture
def odd_path(explored_path, tmp_path):
    """A store with odd groups, two sources of queries, and a checkpoint with queries alone."""
    root = tmp_path / "lark.store"
    shutil.copytree(explored_path, root)
    values = ["", None, "(none)", "x", 5, 5.0, ["a"], True]
    rows = [
        {"id": f"o{i}", "text": f"Odd text number {i}."} | ({} if value is None else {"odd": value, "n_tokens": i % 2})
        for i, value in enumerate(values)
    ]
    rows.append({"id": "..", "text": "Dots that a browser drops from an address."})
    with Store.open(root) as store:
        store.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", rows), stage="pretrain")
        store.source_add("later", write_jsonl(tmp_path / "later.jsonl", qa_rows(2, start=100)), stage="query")
        store.ingest(["base", "epoch-1"], ["odd"], ["raw"], sketcher="small")
        store.ingest(["epoch-1"], ["later"], ["chatml"], sketcher="small")
        checkpoint = store.sql("SELECT path FROM checkpoints WHERE name = 'base'").item()
        store.checkpoint_add("epoch-2", checkpoint, epoch=2)
        store.ingest(["epoch-2"], ["test"], ["chatml"], sketcher="small")
    return root


@pytest.mark.folder
def test_each_cell_of_the_map_leads_to_its_own_samples(odd_path):
    client, store = client_of(odd_path)
    for key in ("odd", "n_tokens", "source", "stage", "variant", "label"):
        html = client.get(f"/map?by={key}&queries=test").text
        rows = re.findall(r'<th scope="row">(.*?)</th><td class="number">([\d,]+)</td>(.*?)</tr>', html, re.DOTALL)
        assert len(rows) > 0
        for name, n, cells in rows:
            for link in re.findall(r'href="([^"]+)"', cells):
                shown = Page(client.get(link.replace("&amp;", "&")).text)
                assert f"{n} sketched samples" in shown.text, (key, name, link)
    store.close()


@pytest.mark.folder
def test_sample_of_dots_has_an_address(odd_path):
    client, store = client_of(odd_path)
    (link,) = [link for link in Page(client.get("/samples/odd").text).values("a", "href") if "~" in link]
    page = Page(client.get(link).text)
    assert (link, "Dots that a browser drops" in page.text) == ("/sample/odd/~..", True)
    assert "lark-store sample show odd/.." in page.text
    store.close()


@pytest.mark.folder
def test_checkpoint_with_queries_alone_is_left_out(odd_path):
    client, store = client_of(odd_path)
    for path in ("/map", "/compare", "/queries", "/query/q100", "/checkpoints/q100", "/plot/trajectory.svg?query=q100"):
        response = client.get(path + ("&" if "?" in path else "?") + "queries=test")
        at = r'<select name="query_checkpoint[^>]*>.*?</select>'  # where the queries may be
        offered, rest = re.findall(at, response.text, re.DOTALL), re.sub(at, "", response.text, flags=re.DOTALL)
        assert (response.status_code, "epoch-2" in rest) == (200, False), path
        assert all("epoch-2" in one for one in offered), path
    across = Page(client.get("/query/q100?queries=test&query_checkpoint=epoch-2").text)
    assert "query at `epoch-2`" in across.text
    store.close()


@pytest.mark.folder
def test_choice_that_does_not_go_with_the_others_is_replaced_with_a_note(odd_path):
    client, store = client_of(odd_path)
    response = client.get("/queries?queries=later&checkpoint=base")
    said = "The checkpoint base does not go with the other choices; this is epoch-1."
    assert (response.status_code, said in Page(response.text).text) == (200, True)
    unscored = Page(client.get("/queries?queries=later").text)
    assert "2 queries" in unscored.text
    assert "These queries are not scored at this checkpoint" in unscored.text
    store.sample_remove("later", ["q100", "q101"])
    assert client.get("/map").status_code == 200  # the other source's queries
    store.close()


def test_links_keep_the_scope(client):
    page = Page(client.get("/query/q100?checkpoint=base").text)
    links = [link for link in page.values("a", "href") if link.startswith("/sample/")]
    assert links
    assert all("checkpoint=base" in link for link in links)
    sample = Page(client.get(links[0]).text)
    assert all("checkpoint=base" in link for link in sample.values("a", "href") if link.startswith("/query/"))


def test_words_alone_have_no_opponents_and_no_tokens(client):
    page = Page(client.get("/query/q103?method=bm25").text)
    assert "Most similar texts" in page.text
    assert "Opponents" not in page.text
    assert "Which tokens?" not in page.text
    assert "Which tokens?" in Page(client.get("/query/q103").text).text


def test_each_side_says_whether_it_is_significant(client):
    page = Page(client.get("/query/q100").text)
    assert len(re.findall(r"(?:Nothing significant|tested hits are significant|No hit was tested)", page.text)) == 2


@pytest.mark.folder
def test_question_needs_no_stored_queries(explored_path, tmp_path):
    shutil.copytree(explored_path, tmp_path / "lark.store")
    client, store = client_of(tmp_path / "lark.store")
    store.source_remove("test")
    page = Page(client.get("/ask").text)
    assert "Prompt" in page.text
    assert client.get("/map").status_code == 404
    store.close()


def test_nested_values_become_json_in_csv(client):
    response = client.get("/sql.csv?query=SELECT+[1,2]+AS+x")
    assert (response.status_code, response.text) == (200, 'x\n"[1, 2]"\n')


def test_long_texts_are_bounded(client):
    response = client.get("/sql?query=SELECT+repeat('x',100000)+AS+t+FROM+range(100)")
    assert len(response.text) < 1_000_000
    assert "(95,000 more characters)" in response.text
