"""Backup and restore: the store at one moment, whole or not at all, and what is restored is used."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import fill, named, text_rows, write_jsonl
from test_check import found
from test_cli import lark
from test_snapshots import answers, tags
from test_upkeep import attribute, count

from lark_store import Store
from lark_store.errors import InputError, NotAStoreError, StoreError, StoreExistsError
from lark_store.schema.locks import maintenance
from lark_store.upkeep import backup as module


def beside(path):
    return sorted(p.name for p in path.parent.iterdir())


@pytest.mark.folder
def test_a_backup_is_a_store_that_answers_the_same_and_goes_on(scored_copy, tmp_path):
    before = answers(scored_copy)
    info = scored_copy.db_backup(tmp_path / "backup")
    scored_copy.source_remove("songs")
    scored_copy.close()
    shutil.rmtree(scored_copy.path)
    restored = Store.db_restore(tmp_path / "backup", to=tmp_path / "copy")
    assert (restored.store_uuid, restored.n_rows, restored.n_files) == (info.store_uuid, info.n_rows, info.n_files)
    with Store.open(tmp_path / "copy") as store:
        assert answers(store) == before
        assert found(store, deep=6) == []
        assert len(store.top("q100", checkpoint="base", sketcher="small", k=5)) == 5
        store.source_add("more", write_jsonl(tmp_path / "more.jsonl", text_rows(3, "more")), stage="pretrain")
        assert store.ingest(["base"], ["more", "finetune"], ["chatml"], sketcher="small").units["n_sketched"].sum() == 3
        assert "scored" in set(attribute(store)["status"])
        store.sample_remove("songs", ["sea-1"])
        store.db_optimize(keep_versions_days=0)
        assert found(store) == []
        store.db_backup(tmp_path / "second")
    with Store.open(tmp_path / "backup") as store:  # a backup can be looked into
        assert answers(store) == before


@pytest.mark.folder
def test_a_backup_has_what_the_newest_version_needs_and_no_more(scored_copy, tmp_path):
    scored_copy.source_remove("medical")
    info = scored_copy.db_backup(tmp_path / "backup")
    record = json.loads((tmp_path / "backup" / "backup.json").read_text())
    on_disk = {
        str(p.relative_to(info.path)): p for p in info.path.rglob("*") if p.is_file() and p.name != "backup.json"
    }
    assert set(record["files"]) == set(on_disk)
    assert all(record["files"][name][0] == path.stat().st_size for name, path in on_disk.items())
    with Store.open(info.path) as store:
        versions = {n: len(store._db.vectors.table(n).to_lance().versions()) for n in store._db.vectors.table_names()}
    assert set(versions.values()) == {1}
    assert info.n_bytes < sum(p.stat().st_size for p in scored_copy.path.rglob("*") if p.is_file())
    assert info.n_rows == sum(facts["rows"] for facts in record["tables"].values())
    assert record["schema"] == Store.db_status(scored_copy.path).schema


def test_snapshots_are_in_the_backup_and_are_kept_in_the_restored_store(scored_copy, tmp_path):
    before = answers(scored_copy)
    scored_copy.snapshot_create("paper")
    scored_copy.source_remove("songs")
    scored_copy.db_optimize(keep_versions_days=0)
    scored_copy.db_backup(tmp_path / "backup")
    Store.db_restore(tmp_path / "backup", to=tmp_path / "restored")
    with Store.open(tmp_path / "restored") as store:
        assert tags(store) == {"lark-snapshot-paper"}
        store.db_optimize(keep_versions_days=0)
        assert found(store) == []
    with Store.open(tmp_path / "restored", snapshot="paper") as then:
        assert answers(then) == before


INGEST = """
import sys
from lark_store import Store
with Store.open(sys.argv[1]) as store:
    store.ingest(["base"], ["many"], ["raw", "chatml"], sketcher="small", batch_tokens=256)
    store.attribute(["base"], queries="test", sketcher="small")
"""


def test_backups_taken_while_an_ingest_writes_are_whole(tmp_path, checkpoints, texts):
    path = tmp_path / "lark.store"
    with Store.create(path) as store:
        fill(store, checkpoints, texts)
        store.ingest(["base"], ["test"], ["chatml"], sketcher="small")
        store.source_add("many", write_jsonl(tmp_path / "many.jsonl", text_rows(600, "many")), stage="pretrain")
        with subprocess.Popen([sys.executable, "-c", INGEST, named(path)], stderr=subprocess.PIPE) as writer:
            made = backups_until_it_ends(store, writer, tmp_path)
            assert writer.returncode == 0, writer.stderr.read()
        assert found(store) == []
        assert count(store, "sketches") == 1204
    assert any(4 < n < 1204 for n in made.values())
    for path in made:
        Store.db_restore(path, to=path.with_name("restored"))
        with Store.open(path.with_name("restored")) as store:
            kinds = {(severity, what) for severity, what, _ in found(store)}
            assert kinds <= {("note", "stale run"), ("warning", "index")}  # as a killed ingest leaves it
            assert store.db_repair().left.is_empty()
            last = made[path] in (min(made.values()), max(n for n in made.values() if n < 1204))
            if last:
                store.ingest(["base"], ["many"], ["raw", "chatml"], sketcher="small")
                assert count(store, "sketches") == 1204
                assert found(store) == []
        shutil.rmtree(path.with_name("restored"))


def backups_until_it_ends(store, writer, folder):
    """Back up again and again; returns how many sketches each backup has."""
    made = {}
    while writer.poll() is None:
        path = store.db_backup(folder / f"backup-{len(made)}").path
        table = json.loads((path / "backup.json").read_text())["tables"][store._db.vectors.sketch_tables()[0]]
        if table["rows"] in made.values():  # nothing new
            shutil.rmtree(path)
        made[path] = table["rows"]
        time.sleep(0.2)
    return {path: n for path, n in made.items() if path.exists()}


def test_rows_are_copied_as_they_were_when_the_catalog_was(scored_copy, tmp_path, monkeypatch):
    files = module._files
    before = answers(scored_copy)

    def remove_in_between(*arguments):
        with Store.open(scored_copy.path) as other:
            other._db.vectors.table("influence").delete("true")
            other._db.vectors.table("samples").delete("source = 'songs'")
        monkeypatch.setattr(module, "_files", files)
        return files(*arguments)

    monkeypatch.setattr(module, "_files", remove_in_between)
    scored_copy.db_backup(tmp_path / "backup")
    with Store.open(tmp_path / "backup") as store:
        assert answers(store) == before
        assert found(store) == []


# --- whole or not at all -------------------------------------------------------------------------------------------


@pytest.mark.folder
def test_what_is_there_is_never_written_over(scored_copy, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(StoreExistsError, match="there is something at"):
        scored_copy.db_backup(tmp_path / "there")
    scored_copy.db_backup(tmp_path / "backup")
    with pytest.raises(StoreExistsError, match="there is something at"):
        scored_copy.db_backup(tmp_path / "backup")
    with pytest.raises(StoreExistsError, match="move it away"):
        Store.db_restore(tmp_path / "backup", to=scored_copy.path)
    with pytest.raises(StoreExistsError, match="move it away"):
        Store.db_restore(tmp_path / "backup", to=tmp_path / "there")
    with pytest.raises(InputError, match="inside of the store"):
        scored_copy.db_backup(scored_copy.path / "backups" / "one")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("step", ["_fetch", "_tag_again", "_counted", "_flush"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"]
)
def test_a_backup_that_is_cut_off_leaves_nothing(scored_copy, tmp_path, monkeypatch, step, error):
    names = beside(scored_copy.path)
    original = getattr(module, step)
    calls = []

    def cut(*arguments):
        calls.append(1)
        if step != "_fetch" or len(calls) == 5:
            raise error
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, step, cut)
        with pytest.raises(StoreError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            scored_copy.db_backup(tmp_path / "backup")
    if isinstance(error, OSError):
        assert "can't be written: No space left on device" in str(caught.value)
    assert beside(scored_copy.path) == names
    scored_copy.db_backup(tmp_path / "backup")
    assert found(scored_copy) == []


KILLED = """
import os, signal, sys
from lark_store import Store
from lark_store.upkeep import backup
step = "_fetch" if sys.argv[3] == "backup" else "_copy"
original, seen = getattr(backup, step), []
def copy(*arguments):
    seen.append(1)
    if len(seen) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(backup, step, copy)
if sys.argv[3] == "backup":
    Store.open(sys.argv[1]).db_backup(sys.argv[2])
else:
    Store.db_restore(sys.argv[1], to=sys.argv[2])
"""


@pytest.mark.parametrize("what", ["backup", "restore"])
@pytest.mark.folder
def test_a_killed_backup_or_restore_is_none(scored_copy, tmp_path, what):
    source = scored_copy.path
    if what == "restore":
        source = scored_copy.db_backup(tmp_path / "backup").path
    done = subprocess.run(
        [sys.executable, "-c", KILLED, source, tmp_path / "made", what], check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "made").exists()
    (draft,) = [p for p in tmp_path.iterdir() if p.name.startswith(".made.")]
    with pytest.raises(StoreError, match=r"there is no backup at .*: it has no `backup.json`"):
        Store.db_restore(draft, to=tmp_path / "other")
    if what == "backup":
        scored_copy.db_backup(tmp_path / "made")
        assert found(scored_copy) == []
    else:
        Store.db_restore(source, to=tmp_path / "made")
    with Store.open(tmp_path / "made") as store:
        assert found(store) == []


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda b: damage(next((b / "vectors" / "samples.lance" / "data").iterdir())), "the backup is damaged"),
        (lambda b: damage(b / "catalog.sqlite"), "the backup is damaged"),
        (lambda b: next((b / "vectors").rglob("*.manifest")).unlink(), "the backup is not whole"),
        (lambda b: (b / "backup.json").unlink(), "there is no backup at"),
        (lambda b: (b / "backup.json").write_text("{"), "can't be read"),
        (lambda b: (b / "backup.json").write_text('{"files": {}}'), "is no record of a backup"),
    ],
    ids=["a flipped bit", "the catalog", "a lost file", "no record", "half a record", "another record"],
)
def test_a_damaged_backup_is_refused_before_anything_is_written(scored_copy, tmp_path, harm, message):
    backup = scored_copy.db_backup(tmp_path / "backup").path
    harm(backup)
    names = beside(backup)
    with pytest.raises(StoreError, match=message):
        Store.db_restore(backup, to=tmp_path / "restored")
    assert beside(backup) == names


def test_a_record_that_names_files_elsewhere_is_refused(scored_copy, tmp_path):
    backup = scored_copy.db_backup(tmp_path / "backup").path
    record = json.loads((backup / "backup.json").read_text())
    for name in ("../outside", "/etc/passwd", "vectors/../../outside"):
        (backup / "backup.json").write_text(json.dumps(record | {"files": {name: [1, "0" * 64]}}))
        with pytest.raises(StoreError, match="is no record of a backup"):
            Store.db_restore(backup, to=tmp_path / "restored")


@pytest.mark.folder
def test_a_backup_of_a_store_with_lost_files_is_refused(scored_copy, tmp_path):
    for path in (scored_copy.path / "vectors" / "samples.lance" / "data").iterdir():
        path.unlink()
    with pytest.raises(StoreError):
        scored_copy.db_backup(tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


def test_nothing_is_cleaned_up_while_a_backup_is_made(scored_copy, tmp_path):
    with maintenance(scored_copy._db.location), pytest.raises(StoreError, match="another process is"):
        scored_copy.db_backup(tmp_path / "backup")


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.folder
def test_the_commands_back_up_and_restore(scored_copy, tmp_path):
    made = lark("db backup", tmp_path / "backup", store=scored_copy.path)
    assert (made.code, made.out) == (0, "")
    assert made.err.splitlines()[-1].startswith(f"backed up to `{tmp_path}/backup`: ")
    restored = lark("db restore", tmp_path / "backup", "--to", tmp_path / "restored")
    assert restored.err.splitlines()[-1].startswith(f"restored to `{tmp_path}/restored`: ")
    again = lark("db restore", tmp_path / "backup", store=tmp_path / "restored")
    assert (again.code, again.out) == (1, "")
    assert again.err.endswith("already\n\nhint: move it away, or name another path\n")
    assert lark("db restore", tmp_path / "nowhere", store=tmp_path / "x").code == 1
    assert lark("db check -f json", store=tmp_path / "restored").rows == []
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o755
    with pytest.raises(NotAStoreError):
        Store.open(tmp_path / "x")
