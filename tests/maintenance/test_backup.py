"""Backup and restore: a consistent copy of one moment, written atomically; a restored store is usable."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers.corruption import check_findings, lance_table
from helpers.forked import run_forked
from helpers.program import lark
from helpers.stores import attribute_all, count_rows, fill_store, read_answers, store_label, version_tags
from helpers.texts import text_rows, write_jsonl

from lark_store import Store
from lark_store.errors import InputError, NotAStoreError, StoreError, StoreExistsError
from lark_store.maintenance import backup as module
from lark_store.schema.locks import maintenance


def beside(path):
    return sorted(p.name for p in path.parent.iterdir())


@pytest.mark.folder
def test_backup_is_a_usable_store_with_equal_answers(scored_copy, tmp_path):
    before = read_answers(scored_copy)
    info = scored_copy.db_backup(tmp_path / "backup")
    scored_copy.source_remove("songs")
    scored_copy.close()
    shutil.rmtree(scored_copy.path)
    restored = Store.db_restore(tmp_path / "backup", to=tmp_path / "copy")
    assert (restored.store_uuid, restored.n_rows, restored.n_files) == (info.store_uuid, info.n_rows, info.n_files)
    with Store.open(tmp_path / "copy") as store:
        assert read_answers(store) == before
        assert check_findings(store, deep=6) == []
        assert len(store.top("q100", checkpoint="base", sketcher="small", k=5)) == 5
        store.source_add("more", write_jsonl(tmp_path / "more.jsonl", text_rows(3, "more")), stage="pretrain")
        assert store.ingest(["base"], ["more", "finetune"], ["chatml"], sketcher="small").units["n_sketched"].sum() == 3
        assert "scored" in set(attribute_all(store)["status"])
        store.sample_remove("songs", ["sea-1"])
        store.db_optimize(keep_versions_days=0)
        assert check_findings(store) == []
        store.db_backup(tmp_path / "second")
    with Store.open(tmp_path / "backup") as store:  # a backup can be looked into
        assert read_answers(store) == before


@pytest.mark.folder
def test_backup_holds_only_files_of_the_newest_version(scored_copy, tmp_path):
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


def test_snapshots_survive_backup_and_restore(scored_copy, tmp_path):
    before = read_answers(scored_copy)
    scored_copy.snapshot_create("paper")
    scored_copy.source_remove("songs")
    scored_copy.db_optimize(keep_versions_days=0)
    scored_copy.db_backup(tmp_path / "backup")
    Store.db_restore(tmp_path / "backup", to=tmp_path / "restored")
    with Store.open(tmp_path / "restored") as store:
        assert version_tags(store) == {"lark-snapshot-paper"}
        store.db_optimize(keep_versions_days=0)
        assert check_findings(store) == []
    with Store.open(tmp_path / "restored", snapshot="paper") as then:
        assert read_answers(then) == before


INGEST = """
import sys
from lark_store import Store
with Store.open(sys.argv[1]) as store:
    store.ingest(["base"], ["many"], ["raw", "chatml"], sketcher="small", batch_tokens=256)
    store.attribute(["base"], queries="test", sketcher="small")
"""


def test_backups_during_an_ingest_are_consistent(tmp_path, checkpoints, texts):
    path = tmp_path / "lark.store"
    with Store.create(path) as store:
        fill_store(store, checkpoints, texts)
        store.ingest(["base"], ["test"], ["chatml"], sketcher="small")
        store.source_add("many", write_jsonl(tmp_path / "many.jsonl", text_rows(250, "many")), stage="pretrain")
        with subprocess.Popen([sys.executable, "-c", INGEST, store_label(path)], stderr=subprocess.PIPE) as writer:
            result = backups_until_it_ends(store, writer, tmp_path)
            assert writer.returncode == 0, writer.stderr.read()
        assert check_findings(store) == []
        assert count_rows(store, "sketches") == 504
    assert any(4 < n < 504 for n in result.values())
    for path in result:
        Store.db_restore(path, to=path.with_name("restored"))
        with Store.open(path.with_name("restored")) as store:
            kinds = {(severity, kind) for severity, kind, _ in check_findings(store)}
            assert kinds <= {("note", "stale run"), ("warning", "index")}  # as a killed ingest leaves it
            assert store.db_repair().left.is_empty()
            last = result[path] in (min(result.values()), max(n for n in result.values() if n < 504))
            if last:
                store.ingest(["base"], ["many"], ["raw", "chatml"], sketcher="small")
                assert count_rows(store, "sketches") == 504
                assert check_findings(store) == []
        shutil.rmtree(path.with_name("restored"))


def backups_until_it_ends(store, writer, folder):
    """Back up again and again; returns how many sketches each backup has."""
    results = {}
    while writer.poll() is None:
        path = store.db_backup(folder / f"backup-{len(results)}").path
        table = json.loads((path / "backup.json").read_text())["tables"][store._db.vectors.sketch_tables()[0]]
        if table["rows"] in results.values():  # nothing new
            shutil.rmtree(path)
        results[path] = table["rows"]
        time.sleep(0.4)
    return {path: n for path, n in results.items() if path.exists()}


def test_rows_are_copied_as_of_the_catalogs_moment(scored_copy, tmp_path, monkeypatch):
    files = module._files
    before = read_answers(scored_copy)

    def remove_in_between(*arguments):
        with Store.open(scored_copy.path) as other:
            other._db.vectors.table("influence").delete("true")
            other._db.vectors.table("samples").delete("source = 'songs'")
        monkeypatch.setattr(module, "_files", files)
        return files(*arguments)

    monkeypatch.setattr(module, "_files", remove_in_between)
    scored_copy.db_backup(tmp_path / "backup")
    with Store.open(tmp_path / "backup") as store:
        assert read_answers(store) == before
        assert check_findings(store) == []


# --- whole or not at all -------------------------------------------------------------------------------------------


@pytest.mark.folder
def test_existing_data_is_never_overwritten(scored_copy, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(StoreExistsError, match="already exists"):
        scored_copy.db_backup(tmp_path / "there")
    scored_copy.db_backup(tmp_path / "backup")
    with pytest.raises(StoreExistsError, match="already exists"):
        scored_copy.db_backup(tmp_path / "backup")
    with pytest.raises(StoreExistsError, match="move it away"):
        Store.db_restore(tmp_path / "backup", to=scored_copy.path)
    with pytest.raises(StoreExistsError, match="move it away"):
        Store.db_restore(tmp_path / "backup", to=tmp_path / "there")
    with pytest.raises(InputError, match="inside the store"):
        scored_copy.db_backup(scored_copy.path / "backups" / "one")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("step", ["_fetch", "_tag_again", "count_rows", "flush"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"]
)
def test_interrupted_backup_leaves_nothing(scored_copy, tmp_path, monkeypatch, step, error):
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
    assert check_findings(scored_copy) == []


KILLED = """
import os, signal, sys
from lark_store import Store
from lark_store.maintenance import backup, copy_files
module, step = (backup, "_fetch") if sys.argv[3] == "backup" else (copy_files, "copy")
original, seen = getattr(module, step), []
def copy(*arguments):
    seen.append(1)
    if len(seen) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(module, step, copy)
if sys.argv[3] == "backup":
    Store.open(sys.argv[1]).db_backup(sys.argv[2])
else:
    Store.db_restore(sys.argv[1], to=sys.argv[2])
"""


@pytest.mark.parametrize("kind", ["backup", "restore"])
@pytest.mark.folder
def test_killed_backup_or_restore_leaves_no_result(scored_copy, tmp_path, kind):
    source = scored_copy.path
    if kind == "restore":
        source = scored_copy.db_backup(tmp_path / "backup").path
    assert run_forked(KILLED, source, tmp_path / "made", kind) == -signal.SIGKILL
    assert not (tmp_path / "made").exists()
    (draft,) = [p for p in tmp_path.iterdir() if p.name.startswith(".made.")]
    with pytest.raises(StoreError, match=r"there is no backup at .*: it has no `backup.json`"):
        Store.db_restore(draft, to=tmp_path / "other")
    if kind == "backup":
        scored_copy.db_backup(tmp_path / "made")
        assert check_findings(scored_copy) == []
    else:
        Store.db_restore(source, to=tmp_path / "made")
    with Store.open(tmp_path / "made") as store:
        assert check_findings(store) == []


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda b: damage(next((b / "vectors" / "samples.lance" / "data").iterdir())), "the backup is damaged"),
        (lambda b: damage(b / "catalog.sqlite"), "the backup is damaged"),
        (lambda b: next((b / "vectors").rglob("*.manifest")).unlink(), "the backup is damaged: .* is missing"),
        (lambda b: (b / "backup.json").unlink(), "there is no backup at"),
        (lambda b: (b / "backup.json").write_text("{"), "can't be read"),
        (lambda b: (b / "backup.json").write_text('{"files": {}}'), "is not a backup record"),
    ],
    ids=["a flipped bit", "the catalog", "a lost file", "no record", "half a record", "another record"],
)
def test_damaged_backup_is_refused_before_writing(scored_copy, tmp_path, harm, message):
    backup = scored_copy.db_backup(tmp_path / "backup").path
    harm(backup)
    names = beside(backup)
    with pytest.raises(StoreError, match=message):
        Store.db_restore(backup, to=tmp_path / "restored")
    assert beside(backup) == names


def test_record_with_outside_paths_is_refused(scored_copy, tmp_path):
    backup = scored_copy.db_backup(tmp_path / "backup").path
    record = json.loads((backup / "backup.json").read_text())
    for name in ("../outside", "/etc/passwd", "vectors/../../outside"):
        (backup / "backup.json").write_text(json.dumps(record | {"files": {name: [1, "0" * 64]}}))
        with pytest.raises(StoreError, match="is not a backup record"):
            Store.db_restore(backup, to=tmp_path / "restored")


def lose_files(store):
    for path in (store.path / "vectors" / "samples.lance" / "data").iterdir():
        path.unlink()


def lose_hits(store):
    lance_table(store, "influence").delete("rank = 2")


def empty_manifest(store):
    newest = min((store.path / "vectors" / "samples.lance" / "_versions").glob("*.manifest"))
    newest.write_bytes(b"")


HARMS = {
    "lost files": (lose_files, "missing file: samples"),
    "lost scores": (lose_hits, "scores: score run"),
    "a newest manifest that is empty": (empty_manifest, "unreadable: samples"),
}


def harms(in_folder=("lost files", "a newest manifest that is empty")):
    marks = {name: [pytest.mark.folder] for name in in_folder}
    return [pytest.param(*harm, id=name, marks=marks.get(name, [])) for name, harm in HARMS.items()]


@pytest.mark.parametrize(("harm", "message"), harms())
def test_a_damaged_store_is_backed_up_only_on_request_and_restored_only_on_request(
    scored_copy, tmp_path, harm, message
):
    harm(scored_copy)
    errors = scored_copy.db_check().filter(severity="error")
    with pytest.raises(StoreError, match=f"the store is damaged: {message}") as error:
        scored_copy.db_backup(tmp_path / "backup")
    assert "`damaged=True` copies the store as it is" in error.value.hint
    assert not (tmp_path / "backup").exists()
    info = scored_copy.db_backup(tmp_path / "backup", damaged=True)
    assert len(info.damaged) == len(errors) > 0
    assert info.damaged[0].startswith(message)
    with pytest.raises(StoreError, match=f"the original store is damaged: {message}"):
        Store.db_restore(tmp_path / "backup", to=tmp_path / "restored")
    assert Store.db_restore(tmp_path / "backup", to=tmp_path / "restored", damaged=True).damaged == info.damaged
    with Store.open(tmp_path / "restored") as store:  # it has the same faults
        assert set(store.db_check().filter(severity="error")["what"]) == set(errors["what"])


def test_sound_store_gives_equal_backups_with_and_without_the_option(scored_copy, tmp_path):
    plain, query = (scored_copy.db_backup(tmp_path / str(n), damaged=n == 1) for n in range(2))
    assert (plain.damaged, query.damaged, plain.n_rows) == ((), (), query.n_rows)
    Store.db_restore(tmp_path / "1", to=tmp_path / "restored")


def test_older_versions_backup_of_a_damaged_store_is_detected(scored_copy, tmp_path):
    lose_hits(scored_copy)
    scored_copy.db_backup(tmp_path / "backup", damaged=True)
    path = tmp_path / "backup" / "backup.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in record.items() if name not in {"damaged", "sha256"}}))
    names = beside(tmp_path / "backup")
    with pytest.raises(StoreError, match="the original store is damaged: scores: score run"):
        Store.db_restore(tmp_path / "backup", to=tmp_path / "restored")
    assert beside(tmp_path / "backup") == names


def test_damaged_backup_is_partly_restored_on_request(scored_copy, tmp_path):
    backup = scored_copy.db_backup(tmp_path / "backup").path
    (pages,) = {p.parent for p in (backup / "vectors" / "influence.lance" / "_indices").rglob("*.lance")}
    shutil.rmtree(pages)
    with pytest.raises(StoreError, match=r"the backup is damaged: .* is missing") as error:
        Store.db_restore(backup, to=tmp_path / "restored")
    assert "`damaged=True` restores it as it is" in error.value.hint
    Store.db_restore(backup, to=tmp_path / "restored", damaged=True)
    with Store.open(tmp_path / "restored") as store:
        assert store.db_repair().left.is_empty()
        assert read_answers(store) == read_answers(scored_copy)


def test_changed_record_is_detected(scored_copy, tmp_path):
    backup = scored_copy.db_backup(tmp_path / "backup").path
    record = json.loads((backup / "backup.json").read_text())
    (backup / "backup.json").write_text(json.dumps(record | {"created_at": "2001-01-01T00:00:00+00:00"}))
    with pytest.raises(StoreError, match=r"`.*backup.json` changed after it was written"):
        Store.db_restore(backup, to=tmp_path / "restored")


def test_no_cleanup_during_a_backup(scored_copy, tmp_path):
    with maintenance(scored_copy._db.location), pytest.raises(StoreError, match="another process is"):
        scored_copy.db_backup(tmp_path / "backup")


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.folder
def test_the_commands_back_up_and_restore(scored_copy, tmp_path):
    result = lark("db backup", tmp_path / "backup", store=scored_copy.path)
    assert (result.code, result.out) == (0, "")
    assert result.err.splitlines()[-1].startswith(f"backed up to `{tmp_path}/backup`: ")
    restored = lark("db restore", tmp_path / "backup", "--to", tmp_path / "restored")
    assert restored.err.splitlines()[-1].startswith(f"restored to `{tmp_path}/restored`: ")
    again = lark("db restore", tmp_path / "backup", store=tmp_path / "restored")
    assert (again.code, again.out) == (1, "")
    assert again.err.endswith("already exists\n\nhint: move it away, or choose another path\n")
    assert lark("db restore", tmp_path / "nowhere", store=tmp_path / "x").code == 1
    assert lark("db check -f json", store=tmp_path / "restored").rows == []
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o755
    with pytest.raises(NotAStoreError, match="there is no lark-store at"):
        Store.open(tmp_path / "x")
