"""The explorer for tests: a scored store with hostile texts, and a client that is signed in."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from helpers.stores import store_label
from helpers.texts import qa_rows, text_rows, write_jsonl
from lark_store import Store

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = "a-token-of-many-characters"  # noqa: S105
HOST = "127.0.0.1:8000"
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">'\"<!--<script>\u2028\u202e&amp;{{ 7*7 }}{% x %}"
ODD_ID = "a/b?c=1&d#e <i>5%</i> 'q' \"r\" é"


@pytest.fixture(scope="session")
def explored_path(tmp_path_factory, checkpoints) -> Path:
    """A scored store whose texts, ids and metadata are hostile. Read-only."""
    root = tmp_path_factory.mktemp("explored")
    queries = [row | {"topic": "organs"} for row in qa_rows(6, start=100)]
    queries[0]["question"] = HOSTILE
    queries[1]["id"] = ODD_ID
    tuning = [row | {"topic": "organs" if i % 2 else HOSTILE} for i, row in enumerate(qa_rows(6))]
    tuning[2]["context"] = HOSTILE
    tuning[3]["id"] = ODD_ID
    with Store.create(root / "lark.store") as store:
        for epoch, (name, path) in enumerate(checkpoints.items()):
            store.checkpoint_add(name, path, epoch=epoch, learning_rate=2e-4)
        store.source_add("finetune", write_jsonl(root / "finetune.jsonl", tuning), stage="finetune")
        songs = [row | {"topic": "songs", "year": 1990 + i} for i, row in enumerate(text_rows(5))]
        store.source_add("songs", write_jsonl(root / "songs.jsonl", songs), stage="pretrain")
        store.source_add("test", write_jsonl(root / "test.jsonl", queries), stage="query")
        store.sketcher_add("small", k=1024)
        names = list(checkpoints)
        store.ingest(names, ["finetune", "test"], ["chatml"], sketcher="small")
        store.ingest(names, ["songs"], ["raw"], sketcher="small")
        store.attribute(names, queries="test", sketcher="small")
    return root / "lark.store"


@pytest.fixture(scope="session")
def explorer(explored_path):
    """The explorer of that store."""
    from lark_store.ui.explorer import Explorer
    from lark_store.ui.jobs import Jobs

    jobs = Jobs(store_label(explored_path), None)
    with Store.open(explored_path) as store:
        yield Explorer(store, jobs)
    jobs.close()


@pytest.fixture(scope="session")
def application(explorer):
    """The application, with its guard."""
    from lark_store.ui.app import application

    return application(explorer, hosts={HOST}, token=TOKEN, cookie="lark-store-8000")


@pytest.fixture
def stranger(application):
    """A client without the token."""
    from starlette.testclient import TestClient

    return TestClient(application, base_url=f"http://{HOST}", follow_redirects=False)


@pytest.fixture
def client(stranger):
    """A client with the token's cookie, which sends forms as a browser does."""
    stranger.cookies.set("lark-store-8000", TOKEN)
    stranger.headers |= {"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"}
    return stranger


def client_of(path):
    """Return a client of a store's explorer, and the store."""
    from starlette.testclient import TestClient

    from lark_store.ui.app import application
    from lark_store.ui.explorer import Explorer
    from lark_store.ui.jobs import Jobs

    store = Store.open(path)
    app = application(Explorer(store, Jobs(str(path), None)), hosts={"a:1"}, token="t" * 20, cookie="c")
    return TestClient(app, base_url="http://a:1", cookies={"c": "t" * 20}), store


class Page(HTMLParser):
    """A page's elements, its links, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    @property
    def rows(self) -> list[str]:
        """The addresses of links that the keyboard reaches: those of tables, not of points."""
        links = [attributes for tag, attributes in self.elements if tag == "a" and "tabindex" not in attributes]
        return [link["href"] for link in links if link.get("href")]

    def values(self, tag: str, name: str) -> list[str]:
        return [attributes[name] for found, attributes in self.elements if found == tag and attributes.get(name)]
