"""The study's report: a self-contained page, safe against hostile texts."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import re
import tomllib
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import polars as pl
import pytest
from helpers.browser import complaints, in_chromium, opened_page, requested_urls
from helpers.study import example_results, stripped
from helpers.texts import qa_rows, text_rows, write_jsonl

from lark_store import Store
from lark_store.errors import InputError
from lark_store.report.page import marked
from lark_store.study import charts, explorer, presentation
from lark_store.study import page as pages
from lark_store.study.recipe import Recipe
from lark_store.study.results import Results

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">'\"<!--<script>\u2028\u2029&amp;{{ 7*7 }}"
RARE = "marigold"  # a word of one query only
EPOCHS = 1


@dataclass(frozen=True)
class Finding:
    question: str
    text: str
    holds: bool | None


FINDINGS = [
    Finding("Does the domain matter?", "medical over songs: +68.1% [53.2, 82.7], 12 queries.", True),
    Finding("Does dominance rise?", f"It can't be told {HOSTILE}", None),
    Finding("Is it better than BM25?", "There is no difference.", False),
]


@pytest.fixture(scope="module")
def study_store(tmp_path_factory, checkpoints):
    """A scored store with the sketcher `study`; a query's and a sample's text are hostile."""
    root = tmp_path_factory.mktemp("study")
    queries = qa_rows(12, start=100)
    queries[0]["question"] = HOSTILE
    queries[7]["question"] = f"Is the {RARE} affected?"
    tuning = qa_rows(6)
    tuning[2]["context"] = HOSTILE
    songs = [*text_rows(5), {"id": "long", "text": "la " * 600 + HOSTILE}]
    with Store.create(root / "lark.store") as store:
        for epoch, (name, path) in enumerate(checkpoints.items()):
            store.checkpoint_add(name, path, epoch=epoch, learning_rate=2e-4)
        store.source_add("finetune", write_jsonl(root / "finetune.jsonl", tuning), stage="finetune")
        store.source_add("medical", write_jsonl(root / "medical.jsonl", text_rows(5, "kidney")), stage="pretrain")
        store.source_add("songs", write_jsonl(root / "songs.jsonl", songs), stage="pretrain")
        store.source_add("test", write_jsonl(root / "test.jsonl", queries), stage="query")
        store.sketcher_add("study", k=1024)
        names = list(checkpoints)
        store.ingest(names, ["finetune", "test"], ["chatml"], sketcher="study")
        store.ingest(names, ["medical", "songs"], ["raw", "chatml"], sketcher="study")
        store.attribute(names, queries="test", sketcher="study")
        yield store


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """Numbers for the queries of the store, base and five epochs; the store has base and the first."""
    study_results = example_results(tmp_path_factory.mktemp("folder") / "study", [f"q{i}" for i in range(100, 112)])
    prediction = pl.when(pl.col("query_id") == "q101").then(pl.lit(HOSTILE)).otherwise("prediction")
    return dataclasses.replace(
        study_results,
        queries=study_results.queries.with_columns(prediction=prediction),
        notes=[*study_results.notes, HOSTILE],
    )


@pytest.fixture(scope="module")
def page(results, study_store, tmp_path_factory) -> Path:
    return pages.write(results, FINDINGS, study_store, tmp_path_factory.mktemp("page") / "new" / "report.html")


class Reader(HTMLParser):
    """Collects a page's elements, the text of its scripts and styles, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.words = ""
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in self.raw else None
        if self._inside:
            self.raw[tag].append("")

    def handle_endtag(self, _tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside:
            self.raw[self._inside][-1] += data
        else:
            self.words += data


def test_study_without_results_has_a_report(results, study_store, tmp_path):
    names = [
        field.name for field in dataclasses.fields(Results) if isinstance(getattr(results, field.name), pl.DataFrame)
    ]
    bare = dataclasses.replace(stripped(results, *names), notes=[], environment={}, hashes={})
    assert not charts.figures(bare)
    assert not presentation.sheets(bare)
    words = Reader(pages.write(bare, [], study_store, tmp_path / "report.html").read_text()).words
    assert "the tables have too few rows" in words
    assert pages.save_tables(bare, tmp_path / "tables") == []


def test_tables_are_saved_completely(results, tmp_path):
    paths = pages.save_tables(results, tmp_path / "tables")
    assert {path.stem for path in paths} == set(results.tables())
    for path in paths:
        frame = pl.read_csv(path, infer_schema_length=None)
        assert frame.columns == results.tables()[path.stem].columns
        assert len(frame) == len(results.tables()[path.stem])


def test_recipe_round_trips(results):
    recipe = results.recipe
    text = pages.recipe_toml(recipe)
    read = tomllib.loads(text)
    assert Recipe.model_validate(read) == recipe


def brute_force_top(store: Store, checkpoint: str, query_id: str) -> list[tuple[str, str, str, float]]:
    rows = store.sql(
        f"SELECT source, variant, sample_id, score FROM influence WHERE checkpoint = '{checkpoint}' AND "
        f"query_id = '{query_id}'"
    ).rows()
    return sorted(rows, key=lambda row: (-row[3], *row[:3]))[:5]


def test_top_samples_equal_the_stores(results, study_store):
    data = explorer.explorer(results, study_store)
    scores = {
        key: score
        for *key_parts, score in study_store.sql(
            "SELECT checkpoint, query_id, source, variant, sample_id, score FROM influence"
        ).iter_rows()
        for key in [tuple(key_parts)]
    }
    assert [query["id"] for query in data["queries"]] == [f"q{i}" for i in range(100, 112)]
    for query in data["queries"]:
        for i, name in enumerate(data["checkpoints"]):
            rows = [query["rows"][n] for n in query["top"][i]]
            actual = [(data["samples"][s][0], data["groups"][g][1], data["samples"][s][1]) for s, g, _ in rows]
            expected = brute_force_top(study_store, name, query["id"])
            assert actual == [row[:3] for row in expected]
            assert len(actual) == (5 if i <= EPOCHS else 0)  # the store has no later checkpoint
        for s, g, along in query["rows"]:
            source, sample_id = data["samples"][s][:2]
            for name, score in zip(data["checkpoints"], along, strict=True):
                expected = scores.get((name, query["id"], source, data["groups"][g][1], sample_id))
                assert score == (None if expected is None else pytest.approx(expected, rel=1e-3))


def test_texts_are_unique_and_shortened(results, study_store):
    samples = explorer.explorer(results, study_store)["samples"]
    assert len({tuple(sample[:2]) for sample in samples}) == len(samples)
    assert all(len(text) <= explorer.LONGEST + 5 for _, _, text, _ in samples)
    assert explorer.cut("a" * 900 + "b" * 600 + "?", 9) == "aaaaaa […] bb?"
    assert explorer.cut("a" * 1_500, 1_500) == "a" * 1_500
    assert explorer.cut(None, 9) is None


def test_page_has_no_external_references(page):
    read = Reader(page.read_text(encoding="utf-8"))
    for tag, attributes in read.elements:
        for name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert "url(" not in (attributes.get("style") or ""), (tag, attributes)
    assert not re.search(r"@import|url\(|https?:", "".join(read.raw["style"]))
    assert [urlsplit(url).netloc for url in set(re.findall(r'https?://[^\s"\'<]+', read.words))] == []


def test_hostile_text_stays_text(page):
    read = Reader(page.read_text(encoding="utf-8"))
    assert "img" not in {tag for tag, _ in read.elements}
    assert marked("a `b<i>` c & `d`") == "a <code>b&lt;i&gt;</code> c &amp; <code>d</code>"
    assert [tag for tag, _ in read.elements].count("script") == 4
    assert HOSTILE in read.words  # a finding and a note, as they are
    data = json.loads(read.raw["script"][1])
    assert any(HOSTILE in query["text"] for query in data["queries"])
    assert any(HOSTILE in (text or "") for _, _, text, _ in data["samples"])
    assert not re.search("[<>\u2028\u2029]", read.raw["script"][0] + read.raw["script"][1])


def test_content_policy_allows_only_own_scripts(page):
    read = Reader(page.read_text(encoding="utf-8"))
    policy = next(a["content"] for tag, a in read.elements if tag == "meta" and a.get("http-equiv"))
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in read.raw["script"][2:]}
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy


def test_ids_and_headings_are_in_order(page):
    read = Reader(page.read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in read.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    known = set(ids)
    for _, attributes in read.elements:
        for word in re.findall(r"url\(#([^)]+)\)", " ".join(value or "" for value in attributes.values())):
            assert word in known
        assert set((attributes.get("aria-labelledby") or "").split()) <= known
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(attributes.get("scope") in {"col", "row"} for tag, attributes in read.elements if tag == "th")


def test_unwritable_path_is_a_clear_error(results, study_store, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="can't be written"):
        pages.write(results, FINDINGS, study_store, tmp_path / "taken")


@in_chromium
def test_page_renders_without_requests(browser, page):
    from selenium.webdriver.common.by import By

    opened_page(browser, page)
    assert complaints(browser) == []
    for name in presentation.FIGURES:
        drawing = browser.find_element(By.CSS_SELECTOR, f"#figure-{name} .vega-embed svg.marks")
        assert drawing.size["width"] > 500, name
        still = browser.find_element(By.CSS_SELECTOR, f"#figure-{name} .still")
        assert not still.is_displayed(), name
    urls = requested_urls(browser)
    assert page.as_uri() in urls
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []


@in_chromium
def test_hostile_text_does_nothing_in_a_browser(browser, page, results):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    opened_page(browser, page)
    assert HOSTILE.splitlines()[0] in browser.find_element(By.ID, "query-text").text
    line = browser.find_element(By.CSS_SELECTOR, "#figure-trajectories svg.marks")
    ActionChains(browser).move_to_element(line).perform()
    for _ in range(5):
        browser.find_element(By.ID, "query-next").click()
    assert browser.title == results.recipe.title
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert complaints(browser) == []


@in_chromium
def test_query_and_checkpoint_controls_update_the_page(browser, page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    opened_page(browser, page)

    def text(name: str) -> str:
        return browser.find_element(By.ID, name).text

    before = text("query-text"), text("query-name")
    browser.find_element(By.ID, "query-next").send_keys(Keys.ENTER)
    assert text("query-name") == "Query q101"
    assert text("query-text") != before[0]
    browser.find_element(By.ID, "query-previous").send_keys(Keys.ENTER)
    assert (text("query-text"), text("query-name")) == before

    find = browser.find_element(By.ID, "query-find")
    find.send_keys(RARE.upper())
    assert text("query-count") == "1 of 1"
    assert RARE in text("query-text")
    find.send_keys(" nowhere")
    assert text("query-count") == "no match"
    find.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
    assert text("query-count") == "8 of 12"  # the query that was shown is kept
    Select(browser.find_element(By.ID, "query-select")).select_by_index(3)
    assert (text("query-count"), text("query-name")) == ("4 of 12", "Query q103")

    chosen = Select(browser.find_element(By.ID, "checkpoint-select"))
    assert text("top-title") == "No influence is stored at epoch-5"
    chosen.select_by_visible_text("epoch-1")
    top = browser.find_elements(By.CSS_SELECTOR, "#top > li")
    assert len(top) == 5
    top[0].find_element(By.TAG_NAME, "summary").click()
    assert top[0].find_element(By.CLASS_NAME, "text").is_displayed()
    assert complaints(browser) == []


@in_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_content_fits_the_page_width(browser, page, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 800},
    )
    opened_page(browser, page)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@in_chromium
def test_print_shows_static_figures_without_controls(browser, page):
    from selenium.webdriver.common.by import By

    opened_page(browser, page)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    for name in presentation.FIGURES:
        assert browser.find_element(By.CSS_SELECTOR, f"#figure-{name} .still").is_displayed()
        assert not browser.find_element(By.CSS_SELECTOR, f"#figure-{name} .drawn").is_displayed()
    assert not browser.find_element(By.ID, "query-controls").is_displayed()
    assert browser.find_element(By.ID, "query-text").is_displayed()
    assert len(base64.b64decode(browser.print_page())) > 50_000
