"""A store and other processes: fork, spawn, forkserver, a DataLoader's workers, pickling, and use after close."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from lark_store import Store
from lark_store.errors import NotAStoreError, StoreError

pytestmark = pytest.mark.folder
LIMIT_S = 300  # a process that hangs is ended; one that works takes seconds
OPENED = "was opened before this process was forked"
LANCE = "Lance can't be used in a process forked after Lance was used"
SCRIPT = """
import multiprocessing, sys
from lark_store import Store
from lark_store.errors import LarkStoreError

PATH = sys.argv[1]
QUERY = "SELECT count(*) FROM samples WHERE text LIKE '%kidney number%'"

def shared(_):
    return STORE.sql(QUERY).item()

def shared_catalog(_):
    return STORE.default_sketcher

def fresh(_):
    with Store.open(PATH) as store:
        return store.sql(QUERY).item()

def given(store):
    return store.sql(QUERY).item()

class Rows:
    def __init__(self, store):
        self.store = store
    def __len__(self):
        return 2
    def __getitem__(self, i):
        return self.store.sql(QUERY).item()

def answer(work):
    try:
        print("answer:", work())
    except LarkStoreError as error:
        print("error:", error)

def pooled(method, function, items):
    with multiprocessing.get_context(method).Pool(2) as pool:
        return pool.map(function, items)

def loaded(method, store):
    from torch.utils.data import DataLoader
    loader = DataLoader(Rows(store), num_workers=2, batch_size=None, multiprocessing_context=method)
    return list(loader)
"""


def run(tmp_path: Path, store: Path, code: str) -> str:
    """Run code after `SCRIPT` in a process of its own; returns its output."""
    script = tmp_path / "script.py"
    main = "".join(f"    {line}\n" for line in code.strip().splitlines())
    script.write_text(f"{SCRIPT}\nif __name__ == '__main__':\n{main}", encoding="utf-8")
    command = [sys.executable, "-W", "ignore", str(script), str(store)]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


@pytest.mark.parametrize(
    ("code", "fact"),
    [
        # The parent used its store; the child uses the same object, for the tables or for the catalog alone.
        ("STORE = Store.open(PATH); STORE.sql(QUERY)\nanswer(lambda: pooled('fork', shared, [1]))", OPENED),
        ("STORE = Store.open(PATH); STORE.sql(QUERY)\nanswer(lambda: pooled('fork', shared_catalog, [1]))", OPENED),
        # It was opened, not used: the connections of SQLite must not cross a fork either.
        ("STORE = Store.open(PATH)\nanswer(lambda: pooled('fork', shared, [1]))", OPENED),
        # The child opens the store itself, but Lance's threads stayed behind.
        ("STORE = Store.open(PATH); STORE.sql(QUERY)\nanswer(lambda: pooled('fork', fresh, [1]))", LANCE),
        ("with Store.open(PATH) as store: store.sql(QUERY)\nanswer(lambda: pooled('fork', fresh, [1]))", LANCE),
        # A snapshot is a store too.
        (
            """
Store.open(PATH).snapshot_create('x')
STORE = Store.open(PATH, snapshot='x')
answer(lambda: pooled('fork', shared, [1]))""",
            OPENED,
        ),
        ("store = Store.open(PATH); store.sql(QUERY)\nanswer(lambda: loaded('fork', store))", OPENED),
    ],
)
def test_fork_is_refused_with_a_hint(tmp_path, scored_copy, code, fact):
    output = run(tmp_path, scored_copy.path, code)
    assert output.startswith("error: ")
    assert fact in output
    assert 'get_context("spawn")` or `"forkserver"`' in output
    assert 'multiprocessing_context="spawn"' in output


@pytest.mark.parametrize(
    "code",
    [
        # Nobody used Lance before the fork.
        "answer(lambda: pooled('fork', fresh, [1, 2]))",
        "import lance, lancedb\nanswer(lambda: pooled('fork', fresh, [1, 2]))",
        # The parent goes on after its children were refused.
        """
store = Store.open(PATH); store.sql(QUERY)
try: pooled('fork', fresh, [1])
except LarkStoreError: pass
answer(lambda: [given(store)] * 2)""",
        "store = Store.open(PATH); store.sql(QUERY)\nanswer(lambda: pooled('spawn', fresh, [1, 2]))",
        "store = Store.open(PATH); store.sql(QUERY)\nanswer(lambda: pooled('forkserver', fresh, [1, 2]))",
        # A store travels as its place.
        "store = Store.open(PATH); store.sql(QUERY)\nanswer(lambda: pooled('spawn', given, [store, store]))",
        "store = Store.open(PATH); store.sql(QUERY)\nanswer(lambda: loaded('spawn', store))",
        "store = Store.open(PATH); store.sql(QUERY)\nanswer(lambda: loaded('forkserver', store))",
    ],
)
def test_other_ways_to_start_processes_work(tmp_path, scored_path, code):
    assert run(tmp_path, scored_path, code) == "answer: [5, 5]"


def test_errors_keep_fact_and_hint_across_processes():
    error = pickle.loads(pickle.dumps(StoreError("a fact", "a hint")))  # noqa: S301  # made here
    assert (str(error), error.fact, error.hint) == ("a fact\n\nhint: a hint", "a fact", "a hint")


def test_pickled_store_reopens_at_its_path(scored_copy, monkeypatch, tmp_path):
    scored_copy.snapshot_create("before")
    scored_copy.sketcher_add("later", k=256)
    monkeypatch.chdir(scored_copy.path.parent)
    with Store.open(scored_copy.path.name) as relative, Store.open(scored_copy.path, snapshot="before") as snapshot:
        pickled = pickle.dumps(relative), pickle.dumps(snapshot)
    monkeypatch.chdir(tmp_path.parent)
    now, before = (pickle.loads(one) for one in pickled)  # noqa: S301  # made here
    with now, before, copy.copy(now) as copied:
        assert now.path == copied.path == scored_copy.path
        assert len(now.show().sketchers) == len(copied.show().sketchers) == len(before.show().sketchers) + 1
        with pytest.raises(StoreError, match=r"a snapshot is read-only: `before`"):
            before.sketcher_add("other")


def test_unpickling_a_missing_store_is_an_error_with_a_hint(scored_copy):
    pickled = pickle.dumps(scored_copy)
    scored_copy.path.rename(scored_copy.path.with_name("moved"))
    with pytest.raises(NotAStoreError, match=r"^there is no lark-store at `.*copy`\n\nhint: "):
        pickle.loads(pickled)  # noqa: S301  # made here


def test_a_url_with_a_password_is_not_pickled(scored_copy, monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(scored_copy._db, "location", replace(scored_copy._db.location, has_password=True))
    with pytest.raises(StoreError, match=r"can't be pickled: its URL holds a password\n\nhint: set PGPASSWORD"):
        pickle.dumps(scored_copy)


def test_closed_store_is_a_clear_error(scored_path):
    store = Store.open(scored_path)
    store.sql("SELECT 1")
    store.close()
    store.close()
    assert repr(store) == f"Store({str(scored_path)!r})"
    for use in (
        lambda: store.sql("SELECT 1"),
        store.show,
        lambda: store.default_sketcher,
        lambda: store.sketcher_add("later"),
        store.__enter__,
        lambda: pickle.dumps(store),
    ):
        with pytest.raises(StoreError, match=rf"^the store `{scored_path}` is closed\n\nhint: open it again with"):
            use()


@pytest.mark.filterwarnings("ignore:lance is not fork-safe")  # where another test of this process imported it
def test_closing_keeps_the_parents_connections(scored_path):
    store = Store.open(scored_path)
    assert store.default_sketcher == "lark"
    pid = os.fork()
    if pid == 0:
        store.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert store.default_sketcher == "lark"
    store.close()
