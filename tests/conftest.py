"""A tiny randomly initialised Llama with a real tokenizer, small sources, and a store around them."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads would only wait for each other
os.environ.pop("LARK_STORE", None)

import pytest
from helpers.checkpoints import save_checkpoint
from helpers.stores import copy_store, fill_store
from helpers.texts import qa_rows, text_rows, write_jsonl
from hypothesis import settings

from lark_store import Store

pytest_plugins = [
    "helpers.browser",
    "helpers.cluster",
    "helpers.explorer",
    "helpers.facts",
    "helpers.migrations",
    "helpers.statements",
    "helpers.users",
]
pytest.register_assert_rewrite("lark_store.testing")
settings.register_profile("untimed", deadline=None)  # how fast a test runs here says nothing
settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Leave all imported modules out of garbage collections: each `ingest` ends with a full one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two checkpoints of one model: `base` and `epoch-1`."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {name: save_checkpoint(root / name, seed=seed) for seed, name in enumerate(("base", "epoch-1"))}
    gc.freeze()  # transformers imports its model classes late
    return folders


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of four sources."""
    root = tmp_path_factory.mktemp("texts")
    return {
        "finetune": write_jsonl(root / "finetune.jsonl", qa_rows(6)),
        "test": write_jsonl(root / "test.jsonl", qa_rows(4, start=100)),
        "medical": write_jsonl(root / "medical.jsonl", text_rows(5, "kidney")),
        "songs": write_jsonl(root / "songs.jsonl", text_rows(5)),
    }


@pytest.fixture
def store(tmp_path: Path, checkpoints: dict[str, Path], texts: dict[str, Path]) -> Store:
    """A store with checkpoints and sources, not ingested."""
    with Store.create(tmp_path / "lark.store") as new_store:
        fill_store(new_store, checkpoints, texts)
        yield new_store


@pytest.fixture(scope="session")
def scored_path(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path], texts: dict[str, Path]) -> Path:
    """An ingested store (sketcher `small`), scored at both checkpoints; read-only."""
    path = tmp_path_factory.mktemp("scored") / "lark.store"
    with Store.create(path) as store:
        fill_store(store, checkpoints, texts)
        names = list(checkpoints)
        store.ingest(names, ["finetune", "test"], ["chatml"], sketcher="small")
        store.ingest(names, ["medical", "songs"], ["raw", "chatml"], sketcher="small")
        store.attribute(names, queries="test", sketcher="small")
    return path


@pytest.fixture
def scored(scored_path: Path) -> Store:
    """The scored store, open."""
    with Store.open(scored_path) as opened:
        yield opened


@pytest.fixture(scope="session")
def scored_backup(scored_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of the scored store."""
    path = tmp_path_factory.mktemp("scored-backup") / "backup"
    with Store.open(scored_path) as opened:
        opened.db_backup(path)
    return path


@pytest.fixture
def scored_copy(scored_path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    """A copy of the scored store, to change."""
    if request.config.getoption("place") == "cluster":
        Store.db_restore(request.getfixturevalue("scored_backup"), to=tmp_path / "copy")
    else:
        copy_store(scored_path, tmp_path / "copy")
    with Store.open(tmp_path / "copy") as opened:
        yield opened
