"""`report`: a self-contained page on any store, with the store's numbers, safe against hostile texts."""

from __future__ import annotations

import json
import re

import numpy as np
import polars as pl
import pytest
from helpers.browser import in_chromium, opened_page, requested_urls
from helpers.program import lark
from helpers.texts import text_rows, write_jsonl
from helpers.topics import topic_store

from lark_store import Store
from lark_store.errors import InputError, NameUnknownError, NothingToScoreError
from lark_store.report.queries import shortened

SMALL = {"sketcher": "small"}
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">\u2028&amp;{{ 7*7 }}\x07"
CHAT = [
    {"role": "user", "content": f"Is it the sea? {HOSTILE}"},
    {"role": "assistant", "content": "It is the sea."},
]


@pytest.fixture(scope="module")
def path(scored_path, tmp_path_factory):
    """A store with a chat and a hostile text among its samples and its queries."""
    root = tmp_path_factory.mktemp("report")
    path = topic_store(scored_path, root)
    with Store.open(path) as store:
        chats = [
            {"id": f"c{i}", "messages": [*CHAT, {"role": "user", "content": f"Number {i}?"}, CHAT[1]]} for i in range(3)
        ]
        store.source_add("chats", write_jsonl(root / "chats.jsonl", chats), stage="finetune")
        rows = [{"id": f"h{i}\x07", "text": f"{row['text']} {HOSTILE}"} for i, row in enumerate(text_rows(2))]
        store.source_add("hostile", write_jsonl(root / "hostile.jsonl", rows), stage="pretrain")
        asked = [{"id": "chat-1", "messages": CHAT}, {"id": "chat-2\x1b", "messages": CHAT}]
        store.source_add("asked", write_jsonl(root / "asked.jsonl", asked), stage="query")
        store.ingest(["base", "epoch-1"], ["chats", "hostile", "asked"], ["chatml"], **SMALL)
    return path


@pytest.fixture
def store(path):
    with Store.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(path, tmp_path_factory):
    """The reports of both sources of queries."""
    root = tmp_path_factory.mktemp("pages")
    with Store.open(path) as store:
        return {name: store.report(root / f"{name}.html", queries=name, **SMALL) for name in ("test", "asked")}


def data_of(page, name="study"):
    text = page.read_text(encoding="utf-8")
    return json.loads(
        re.search(rf'<script type="application/json" id="{name}-data">(.*?)</script>', text, re.DOTALL)[1]
    )


def words_of(page):
    """Return the page's visible words."""
    text = re.sub(r"<(script|style|svg).*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


def test_hits_of_each_query_are_those_of_top_with_their_q_values(store, pages):
    data = data_of(pages["test"])
    assert [query["id"] for query in data["queries"]] == ["q100", "q101", "q102", "q103"]
    for i, checkpoint in enumerate(("base", "epoch-1")):
        for query in data["queries"]:
            rows = [query["rows"][n] for n in query["top"][i]]
            hits = store.top(query["id"], checkpoint=checkpoint, queries="test", k=5, **SMALL)
            assert [data["samples"][row[0]][:2] for row in rows] == [[hit.source, hit.sample_id] for hit in hits]
            assert [row[2][i] for row in rows] == pytest.approx([hit.score for hit in hits], rel=1e-3)
            assert [row[3][i] for row in rows] == pytest.approx([hit.q_value for hit in hits], rel=1e-3)


def test_values_of_queries_are_the_highest_scores_and_losses(store, pages):
    data = data_of(pages["test"])
    for i, checkpoint in enumerate(data["checkpoints"]):
        scores = store.scores(checkpoint=checkpoint, queries="test", **SMALL)
        losses = store.sql(
            f"select sample_id, loss from sketches where checkpoint = '{checkpoint}' and source = 'test'"
        )
        losses = dict(losses.iter_rows())
        for query, row in zip(data["queries"], scores.matrix, strict=True):
            best = {}
            for source, value in zip(data["series"], query["phi"], strict=True):
                best[source] = row[(scores.samples["source"] == source).to_numpy()].max()
                assert value[i] == pytest.approx(best[source], rel=1e-3)
            assert query["winner"][i] == max(best, key=best.get)
            assert query["loss"][i] == pytest.approx(losses[query["id"]], rel=1e-3)


def test_tables_have_the_metrics_of_the_store(store, pages):
    words = words_of(pages["test"])
    store.attribute(["base", "epoch-1"], queries="test", **SMALL)
    table = store.metrics(view="influence", checkpoint="epoch-1", **SMALL).filter(queries="test")
    for row in table.iter_rows(named=True):
        value = f"{row['mean_max_influence']:.3f}".replace("-", "−")
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]".replace("-", "−")
        assert re.search(rf"{row['source']} {row['variant']} \d+ {value} {re.escape(interval)}", words)
    for row in (
        store.metrics(view="dominance", checkpoint="epoch-1", **SMALL).filter(queries="test").iter_rows(named=True)
    ):
        pair = f"{row['source']} {row['variant']} {row['against_source']} {row['against_variant']}"
        assert pair in words


def test_drivers_count_the_queries_with_a_sample_among_their_first_hits(store, pages):
    tops = store.top([f"q{i}" for i in range(100, 104)], checkpoint="epoch-1", queries="test", k=5, **SMALL)
    counts = tops.frame.group_by("source", "variant", "sample_id").agg(n=pl.len(), mean=pl.col("score").mean())
    first = counts.sort("n", "mean", descending=True).row(0, named=True)
    mean = f"{first['mean']:.3f}"
    assert re.search(
        rf"{first['sample_id']} {first['source']} {first['variant']} {first['n']} \d+ {mean}", words_of(pages["test"])
    )


def test_picker_is_bounded_and_says_so(store, tmp_path):
    page = store.report(tmp_path / "few.html", queries="test", limit=3, k=2, **SMALL)
    data = data_of(page)
    assert [query["id"] for query in data["queries"]] == ["q100", "q101", "q102"]
    assert {len(top) for query in data["queries"] for top in query["top"]} == {2}
    assert "The picker holds 3 of 4 queries" in words_of(page)
    assert "the mean over 4 queries" in words_of(page)
    one = store.report(tmp_path / "one.html", query=["q102"], queries="test", checkpoints=["base"], **SMALL)
    assert [query["id"] for query in data_of(one)["queries"]] == ["q102"]
    assert data_of(one)["checkpoints"] == ["base"]


def test_without_a_test_nothing_is_called_significant(store, tmp_path):
    page = store.report(tmp_path / "bm25.html", queries="test", sources=["songs"], method="bm25", **SMALL)
    assert {q for query in data_of(page)["queries"] for row in query["rows"] for q in row[3]} == {None}
    assert "hits are not tested: no q-value was computed" in words_of(page)
    tested = store.report(tmp_path / "cosine.html", queries="test", sources=["songs"], **SMALL)
    assert "against shuffled signs of the sketch" in words_of(tested)


def test_chats_are_lists_of_messages(pages):
    data = data_of(pages["asked"])
    assert data["queries"][0]["text"] == [["user", CHAT[0]["content"]], ["assistant", CHAT[1]["content"]]]
    chats = [text for source, _, text, _ in data["samples"] if source == "chats"]
    assert chats
    assert all([role for role, _ in text] == ["user", "assistant", "user", "assistant"] for text in chats)


def test_long_texts_and_chats_are_shortened():
    chat = [["user", f"{i} " + "long " * 100] for i in range(30)]
    short = shortened(chat, 2_000)
    assert [said.split()[0] for _, said in short] == [*"0123", "[…", *map(str, range(22, 30))]
    assert short[4] == ["", "[… 18 messages …]"]
    assert sum(len(said) for _, said in short) < 2_500
    assert shortened(chat[:2], 10_000) == chat[:2]
    assert shortened("a" * 900 + "b" * 600 + "?", 9) == "aaaaaa […] bb?"


def test_page_is_self_contained_and_texts_stay_texts(pages):
    for page in pages.values():
        text = page.read_text(encoding="utf-8")
        assert "default-src 'none'" in text.replace("&#39;", "'")
        own = re.sub(r"<script[^>]*>.*?</script>", "", text, flags=re.DOTALL)
        assert not re.search(r"<(img|link|iframe)\b|\bsrc=|@import", own)
        assert "<img" not in own
        json_parts = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
        assert not re.search("[<>\u2028]", "".join(json_parts))
    texts = [text for _, _, text, _ in data_of(pages["asked"])["samples"]]
    assert any(HOSTILE in said for text in texts if isinstance(text, list) for _, said in text)


FAULTS = [
    ({"queries": None}, InputError, "there are queries in `test` and `asked`"),
    ({"query": ["q999"]}, NameUnknownError, "no query `q999`"),
    ({"limit": 0}, InputError, "`limit` must be at least 1"),
    ({"k": 0}, InputError, "`k` must be between 1 and 100"),
    ({"method": "tracin"}, InputError, "each checkpoint alone"),
    ({"checkpoints": ["nowhere"]}, NameUnknownError, "nowhere"),
    ({"sketcher": "lark"}, NothingToScoreError, "no `lark` sketches"),
    ({"where": "n_tokens < 0"}, NothingToScoreError, "no sketch satisfies"),
]


@pytest.mark.parametrize(("options", "error", "message"), FAULTS)
def test_faults(store, options, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        store.report(tmp_path / "x.html", **{"queries": "test", **SMALL, **options})
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_command(path, tmp_path):
    target = tmp_path / "r.html"
    done = lark(f"report --queries test --limit 2 --sketcher small -o {target} --store {path}")
    assert (done.code, done.out) == (0, "")
    assert f"wrote `{target}`" in done.err
    assert len(data_of(target)["queries"]) == 2
    (tmp_path / "taken.html").mkdir()
    wrong = lark(f"report --queries test --sketcher small -o {tmp_path / 'taken.html'} --store {path}")
    assert (wrong.code, "Traceback" in wrong.err, "can't be written" in wrong.err) == (1, False, True)
    assert np.isfinite(target.stat().st_size)
    for name in ("r.txt", "r"):
        other = lark(f"report --queries test --sketcher small -o {tmp_path / name} --store {path}")
        assert (other.code, other.err) == (
            1,
            f"error: `{tmp_path / name}` is no .html file\n\nhint: end its name with `.html`\n",
        )
        assert not (tmp_path / name).exists()


@in_chromium
def test_page_works_in_a_browser_without_requests(browser, pages):
    from selenium.webdriver.common.by import By

    opened_page(browser, pages["asked"])
    assert [entry for entry in browser.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}] == []
    roles = [element.text for element in browser.find_elements(By.CSS_SELECTOR, "#query-text .role")]
    assert roles == ["user", "assistant"]
    assert "<img src=x" in browser.find_element(By.ID, "query-text").text
    browser.find_element(By.ID, "query-next").click()
    assert browser.find_element(By.ID, "query-count").text == "2 of 2"
    assert browser.title == "Influence on the queries of asked"
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert " · q = " in browser.find_element(By.ID, "top").text
    assert [url for url in requested_urls(browser) if not url.startswith(("file:", "data:", "blob:"))] == []
