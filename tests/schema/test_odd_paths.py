"""Unusual store paths: special characters, no files beside the store, clear errors."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from helpers.program import PROGRAM

from lark_store import Store
from lark_store.errors import NotAStoreError, StoreError, StoreExistsError

pytestmark = pytest.mark.folder
ODD = ["é", "日本 store", "a#b", "a%41b", "a%20b", "~", "a:b", 'q"[x]{y}|<z>*', "back\\slash", "\N{GRINNING FACE}"]
ROOT = Path(__file__).parents[2]


def names_in(folder):
    return [path.name for path in Path(folder).iterdir()]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("is_parent", [False, True])
def test_no_files_are_left_beside_a_store(tmp_path, texts, name, is_parent):
    home = tmp_path / name if is_parent else tmp_path
    home.mkdir(exist_ok=True)
    path = home / ("lark.store" if is_parent else name)
    with Store.create(path) as store:
        store.source_add("songs", texts["songs"], stage="pretrain")
        store.source_add("medical", texts["medical"], stage="pretrain")
        store.snapshot_create("before")
        store.source_remove("medical")
        store.db_optimize(keep_versions_days=0)
        store.db_backup(home / f"{name}-backup")
        assert store.db_check().rows() == []
        assert store.sql("SELECT count(*) FROM samples").item() == 5
    with Store.open(path, snapshot="before") as snapshot:
        assert snapshot.sql("SELECT count(*) FROM samples").item() == 10
    Store.db_restore(home / f"{name}-backup", to=home / f"{name}-again")
    with Store.open(home / f"{name}-again", snapshot="before") as again:
        assert again.sql("SELECT count(*) FROM samples").item() == 10
    with Store.open(path) as store:
        store.snapshot_remove("before")
    assert sorted(names_in(home)) == sorted([path.name, f"{name}-again", f"{name}-backup"])
    assert names_in(tmp_path) == ([name] if is_parent else names_in(home))


def test_gradients_scores_and_factors_leave_no_files_beside_a_store(scored_path, tmp_path):
    path = tmp_path / "é#%41~ b"
    shutil.copytree(scored_path, path, ignore=shutil.ignore_patterns("locks"))
    with Store.open(path) as store:
        store.sketcher_add("adam-small", k=512, correction="adam")
        store.correction_fit("base", sources="finetune", samples=3)
        store.ingest("base", ["finetune", "test", "songs"], "chatml", sketcher="adam-small")
        store.attribute("base", queries="test", sketcher="adam-small")
        store.index_build("small")
        store.sample_remove("songs", "sea-1")
        assert store.db_check(deep=2).filter(severity="error").rows() == []
        assert store.db_repair().left.filter(severity="error").rows() == []
    assert names_in(tmp_path) == [path.name]


def test_separate_vectors_leave_no_files_beside_them(tmp_path, texts):
    vectors = tmp_path / "vectors"
    vectors.mkdir()
    with Store.create(tmp_path / "lark.store", vectors=str(vectors / "é#%")) as store:
        store.source_add("songs", texts["songs"], stage="pretrain")
        store.snapshot_create("before")
        store.db_backup(tmp_path / "backup")
    Store.db_restore(tmp_path / "backup", to=tmp_path / "again", vectors=str(vectors / "ü~"))
    assert sorted(names_in(vectors)) == ["é#%", "ü~"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a\nb", "contains a control character, such as a newline"),
        ("a\tb", "contains a control character"),
        ("a\0b", "contains a control character"),
        ("a\x7fb", "contains a control character"),
        ("a?b", "LanceDB treats `?` as part of a URL"),
        ("x" * 256, "a name in the path is longer than 255 bytes"),
        ("é" * 128, "a name in the path is longer than 255 bytes"),
        ("/".join(["d" * 100] * 6), "bytes; SQLite allows at most 489"),
    ],
)
def test_unsupported_path_is_an_error_with_its_reason(tmp_path, scored_path, name, why):
    path = f"{tmp_path}/{name}"
    for what, use in {
        "a store": lambda: Store.create(path),
        "a store ": lambda: Store.open(path),
        "a store  ": lambda: Store.db_restore(tmp_path, to=path),
        "vectors": lambda: Store.create(tmp_path / "v", vectors=path),
        "a backup": lambda: Store.open(scored_path).db_backup(path),
    }.items():
        with pytest.raises(StoreError) as caught:
            use()
        assert caught.value.fact.startswith(f"{what.strip()} can't be at ")
        assert why in caught.value.fact
        assert "permission" not in str(caught.value)
    assert names_in(tmp_path) == []


def test_too_long_snapshot_path_is_a_clear_error(tmp_path):
    path = tmp_path
    while len(str(path)) < 440:
        path /= "d" * min(100, 440 - len(str(path)))
    with Store.create(path) as store, pytest.raises(StoreError, match="SQLite allows at most 504") as caught:
        store.snapshot_create("s" * 100)
    assert "permission" not in str(caught.value)


def test_dangling_link_counts_as_existing(tmp_path, scored_backup):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for use in (
        lambda: Store.create(link),
        lambda: Store.db_restore(scored_backup, to=link),
        lambda: Store.open(scored_backup).db_backup(link),
    ):
        with pytest.raises(StoreExistsError, match=r"`.*link` already"):
            use()
    with pytest.raises(NotAStoreError, match=r"^there is no lark-store at `.*link`"):
        Store.open(link)
    assert names_in(tmp_path) == ["link"]


def test_link_to_a_store_opens_it(scored_copy, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(scored_copy.path)
    with Store.open(link) as store:
        store.snapshot_create("by-link")
        assert store.db_check().filter(severity="error").rows() == []
        assert store.sql("SELECT count(*) FROM samples").item() == 20
    assert scored_copy.snapshot_list()["name"].to_list() == ["by-link"]


def test_moved_store_is_noted_and_opens(scored_copy, tmp_path):
    scored_copy.show()
    scored_copy.path.rename(tmp_path / "moved")
    for use in (
        scored_copy.show,
        scored_copy.snapshot_list,
        scored_copy.db_check,
        lambda: scored_copy.sql("FROM samples"),
        lambda: scored_copy.sketcher_add("other"),
        lambda: scored_copy.snapshot_create("x"),
    ):
        with pytest.raises(StoreError, match=r"^the open store `.*copy` was moved or removed\n\nhint: open"):
            use()
    with Store.open(tmp_path / "moved") as store:
        assert store.sql("SELECT count(*) FROM samples").item() == 20
        assert store.db_check().filter(severity="error").rows() == []


def test_relative_store_path_survives_chdir(tmp_path, texts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store.create("lark.store") as store:
        (tmp_path / "below").mkdir()
        monkeypatch.chdir(tmp_path / "below")
        store.source_add("songs", texts["songs"], stage="pretrain")
        store.snapshot_create("x")
        assert store.db_check().rows() == []
        assert store.place == "lark.store"
    assert names_in(tmp_path / "below") == []


def test_command_reports_a_wrong_path(tmp_path):
    completed = subprocess.run(
        [PROGRAM, "show", "--store", f"{tmp_path}/a\nb"], capture_output=True, text=True, timeout=120, check=False
    )
    assert completed.returncode == 1
    assert "can't be at" in completed.stderr
    assert "Traceback" not in completed.stderr


def test_lance_is_capped_below_the_next_format():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"lancedb>=0.40,<0.41", "pylance>=14,<15"} <= set(project["dependencies"])
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {"lancedb==0.40.0", "pylance==14.0.2"} <= set(pinned)
    assert "## A newer Lance" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
