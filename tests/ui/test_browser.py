"""The explorer in a real browser: journeys, keyboard, accessibility, narrow screens, no outside request."""

from __future__ import annotations

import importlib.util
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from helpers.browser import complaints, in_chromium, requested_urls
from helpers.explorer import ODD_ID, TOKEN

pytestmark = in_chromium
PAGES = [
    "/",
    "/queries",
    "/query/q100",
    "/checkpoints/q100",
    "/sample/finetune/q2",
    "/samples/songs",
    "/map",
    "/map?by=topic",
    "/dominance",
    "/ask",
    "/compare",
    "/sql?query=SELECT+1+AS+a",
    "/nowhere",
]


@pytest.fixture(scope="module")
def address(explorer):
    """The address of a running server, without its token."""
    import uvicorn

    from lark_store.ui.app import application

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    app = application(explorer, hosts={f"127.0.0.1:{port}"}, token=TOKEN, cookie=f"lark-store-{port}")
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def at(browser, address):
    """Open a page of the explorer, signed in."""

    def opened(path="/"):
        browser.get(f"{address}{path}{'&' if '?' in path else '?'}token={TOKEN}")
        return browser

    return opened


def find(browser, selector, text=None):
    """Return the first element of a selector, with a text in it, once there is one."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By

    end = time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(StaleElementReferenceException):  # the page has changed meanwhile
            for element in browser.find_elements(By.CSS_SELECTOR, selector):
                if text is None or text in element.text:
                    return element
        time.sleep(0.05)
    raise AssertionError(f"no {selector} with {text!r} in {browser.find_element(By.TAG_NAME, 'main').text}")


def wait_for(browser, check):
    end = time.monotonic() + 120
    while not check():
        assert time.monotonic() < end, browser.page_source
        time.sleep(0.2)


def test_address_signs_in_and_hides_its_token(at, address):
    browser = at("/")
    assert browser.current_url == f"{address}/"
    browser.get(f"{address}/queries")
    find(browser, "h1", "Queries")
    browser.delete_all_cookies()
    browser.get(f"{address}/queries")
    assert "token is missing" in browser.page_source


def test_from_the_list_to_a_query_to_its_best_sample(at):
    browser = at("/queries")
    find(browser, "td a", "q103").click()
    find(browser, "h1", "q103")
    find(browser, "main", "Proponents")
    find(browser, ".hits .from a").click()
    find(browser, "h1", "finetune/")
    find(browser, "td a", "q103").click()
    find(browser, "h1", "q103")


def test_odd_ids_are_reached_by_clicks(at):
    browser = at(f"/queries?search={quote(ODD_ID[:5])}")
    find(browser, "td a", ODD_ID[:8]).click()
    find(browser, "h1", ODD_ID)


def test_list_is_searched_and_sorted(at):
    browser = at("/queries")
    find(browser, "input[type=search]").send_keys("organ 104")
    find(browser, "form.scope button").click()
    find(browser, "main", "1 queries")
    browser = at("/queries")
    find(browser, "th a", "loss").click()
    wait_for(browser, lambda: "sort=loss" in browser.current_url)


def test_query_changes_checkpoint_and_condition(at):
    from selenium.webdriver.support.select import Select

    browser = at("/query/q100")
    find(browser, ".finding", "at `epoch-1`")
    Select(find(browser, "select[name=checkpoint]")).select_by_visible_text("base")
    find(browser, "input[name=where]").send_keys("source = 'songs'")
    find(browser, "form.scope button").click()
    find(browser, ".finding", "at `base` where source = 'songs'")
    find(browser, ".hits", "songs/")
    find(browser, "a", "at all checkpoints").click()
    find(browser, "h1", "q100 at all checkpoints")


def test_map_leads_to_samples(at):
    browser = at("/map?by=topic")
    find(browser, "td.heat a").click()
    find(browser, "h1", "topic")
    find(browser, "td:last-child a").click()
    find(browser, "h1", "/")


def test_question_is_asked_and_answered(at):
    browser = at("/ask")
    find(browser, "textarea[name=prompt]").send_keys("Is organ 3 affected?")
    find(browser, "textarea[name=response]").send_keys("yes")
    find(browser, "form.ask button").click()
    wait_for(browser, lambda: "This question is not stored" in browser.page_source)
    find(browser, "main", "Opponents")


def test_tokens_of_a_hit_are_explained(at):
    browser = at("/query/q100")
    find(browser, "button.small").click()
    wait_for(browser, lambda: "The strongest tokens" in browser.page_source)
    tinted = find(browser, ".lark-tokens [class*=t-p]")
    assert tinted.value_of_css_property("background-color") not in {"rgba(0, 0, 0, 0)", "transparent"}
    find(browser, "a", "By target").click()
    find(browser, "main", "by target")


def test_sql_is_typed_run_and_refused(at):
    browser = at("/sql")
    find(browser, "textarea").send_keys("SELECT count(*) AS samples FROM samples")
    find(browser, "form.ask button").click()
    find(browser, "td", "17")
    field = find(browser, "textarea")
    field.clear()
    field.send_keys("DROP TABLE samples")
    find(browser, "form.ask button").click()
    find(browser, ".warnings", "SELECT")


def test_two_rankings_are_compared(at):
    from selenium.webdriver.support.select import Select

    browser = at("/compare")
    Select(find(browser, "select[name=method_b]")).select_by_visible_text("bm25")
    find(browser, "main form button").click()
    find(browser, "main", "of both")


def test_dominance_is_read_and_downloaded(at):
    browser = at("/dominance")
    find(browser, "main", "Table II")
    assert find(browser, "a[download]").get_attribute("href").startswith("http://127.0.0.1")
    image = find(browser, "img.chart")
    wait_for(browser, lambda: browser.execute_script("return arguments[0].complete", image))
    assert browser.execute_script("return arguments[0].naturalWidth", image) > 100


def test_keyboard_alone_reaches_and_uses_everything(at):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser = at("/")

    def press(*keys):
        ActionChains(browser).send_keys(*keys).perform()

    def focused():
        return browser.switch_to.active_element

    press(Keys.TAB)
    assert focused().text == "Skip to the content"
    for _ in range(3):
        press(Keys.TAB)
        if focused().text == "Queries":
            break
    press(Keys.ENTER)
    find(browser, "h1", "Queries")
    for _ in range(60):
        press(Keys.TAB)
        if "/query/" in (focused().get_attribute("href") or ""):
            break
    assert focused().value_of_css_property("outline-style") == "solid"
    press(Keys.ENTER)
    find(browser, "main", "Proponents")


def test_no_page_asks_for_anything_outside(at, address):
    for path in PAGES:
        browser = at(path)
    urls = requested_urls(browser)
    assert len(urls) > len(PAGES)
    assert [url for url in urls if not url.startswith((address, "data:"))] == []
    assert [entry for entry in complaints(browser) if "404" not in str(entry["message"])] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible_and_fit_a_phone(at, scheme):
    axe = Path(importlib.util.find_spec("axe_playwright_python").origin).with_name("axe.min.js").read_text("utf-8")
    browser = at("/")
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    metrics = {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for path in PAGES:
        at(path)
        width = browser.execute_script("return document.documentElement.scrollWidth")
        assert width <= 375, path
        browser.execute_script(axe)
        found = browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
        serious = [v for v in found["violations"] if v["impact"] in {"serious", "critical"}]
        assert serious == [], (path, [(v["id"], v["nodes"][0]["html"]) for v in serious])
