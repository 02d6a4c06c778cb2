"""Removal and replacement: complete in every table, without effect on other rows, safe against kills."""

from __future__ import annotations

import signal

import numpy as np
import polars as pl
import pytest
from helpers.forked import run_forked
from helpers.program import lark
from helpers.stores import (
    CHECKPOINTS,
    attribute_all,
    copy_store,
    count_rows,
    read_sketches,
    store_contents,
    store_label,
)
from helpers.texts import text_rows, write_jsonl
from sqlalchemy import event

from lark_store import Store
from lark_store.errors import InputError, NameUnknownError, NothingToScoreError, StoreBusyError
from lark_store.schema.locks import maintenance, removing, working
from lark_store.schema.vectors import where


def raw(store, table, condition=None):
    """Rows of a table itself, including hidden ones."""
    return store._db.vectors.table(table).count_rows(condition)


def files(store):
    return {path: path.stat().st_mtime_ns for path in (store.path / "vectors").rglob("*") if path.is_file()}


def as_counts(report):
    return {(kind, table.split("_")[0] if kind == "sketch" else table): n for kind, table, n in report.rows()}


def test_removed_sample_is_gone_and_its_groups_are_rescored(scored_copy):
    store = scored_copy
    report = as_counts(store.sample_remove("songs", ["sea-1", "sea-3", "sea-1"]))
    assert report[("sample", "samples")] == 2
    assert report[("sketch", "sketches")] == 2 * 2 * 2  # checkpoints × variants × samples
    assert report[("score run, superseded", "score_run")] == 4
    assert report[("influence", "influence")] == 4 * 4 * 5  # runs × queries × samples
    assert report[("source influence", "source_influence")] == 4 * 4
    gone = "sample_id in ('sea-1', 'sea-3')"
    assert [count_rows(store, view, gone) for view in ("samples", "sketches", "failures", "influence")] == [0] * 4
    assert count_rows(store, "source_influence", "source = 'songs'") == 0
    assert dict(store.sql("select source, sum(n_sketched)::int from ingest_runs group by all").rows()) == {
        "finetune": 12,
        "test": 8,
        "medical": 20,
        "songs": 12,
    }
    again = attribute_all(store)
    assert set(again.filter(source="songs")["status"]) == {"scored"}
    assert set(again.filter(pl.col("source") != "songs")["status"]) == {"current"}
    assert set(store.sql("select distinct n from source_influence where source = 'songs'")["n"]) == {3}
    assert "sea-1" not in store.top("q100", checkpoint="base", sketcher="small", k=50).frame["sample_id"]


def test_store_after_removal_equals_one_without_the_sample(scored_copy, tmp_path, checkpoints, texts):
    scored_copy.sample_remove("songs", ["sea-1"])
    attribute_all(scored_copy)
    with Store.create(tmp_path / "other") as other:
        for epoch, (name, path) in enumerate(checkpoints.items()):
            other.checkpoint_add(name, path, epoch=epoch)
        fewer = [row for row in text_rows(5) if row["id"] != "sea-1"]
        other.source_add("songs", write_jsonl(tmp_path / "fewer.jsonl", fewer), stage="pretrain")
        for name, stage in (("finetune", "finetune"), ("medical", "pretrain"), ("test", "query")):
            other.source_add(name, texts[name], stage=stage)
        other.sketcher_add("small", k=1024)
        other.ingest(CHECKPOINTS, ["finetune", "test"], ["chatml"], sketcher="small")
        other.ingest(CHECKPOINTS, ["medical", "songs"], ["raw", "chatml"], sketcher="small")
        attribute_all(other)
        query = "select checkpoint, query_id, source, variant, argmax, n, max, mean from source_influence order by all"
        here, there = scored_copy.sql(query), other.sql(query)
    assert here.drop("max", "mean").equals(there.drop("max", "mean"))
    for column in ("max", "mean"):
        np.testing.assert_allclose(here[column], there[column], atol=1e-3)


def test_removed_query_keeps_other_answers_after_rescoring(scored_copy):
    before = scored_copy.sql("select * exclude (score_run) from source_influence where query_id != 'q101' order by all")
    assert as_counts(scored_copy.sample_remove("test", ["q101"]))[("score run, superseded", "score_run")] == 10
    assert count_rows(scored_copy, "source_influence") == 0
    assert set(attribute_all(scored_copy)["n_queries"]) == {3}
    after = scored_copy.sql("select * exclude (score_run) from source_influence order by all")
    assert after.drop("max", "mean", "std").equals(before.drop("max", "mean", "std"))


def test_removed_sample_can_be_added_again(scored_copy, texts):
    scored_copy.sample_remove("songs", ["sea-0"])
    assert scored_copy.source_add("songs", texts["songs"], stage="pretrain").n_added == 1
    units = scored_copy.ingest(CHECKPOINTS, ["songs"], ["raw", "chatml"], sketcher="small").units
    assert units["n_sketched"].to_list() == [1] * 4
    attribute_all(scored_copy)
    assert set(scored_copy.sql("select n from source_influence where source = 'songs'")["n"]) == {5}


def test_failures_of_a_removed_sample_are_removed(store, tmp_path):
    odd = [{"id": "long", "prompt": "why?", "response": "because " * 200}, {"id": "ok", "prompt": "a", "response": "b"}]
    store.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", odd), stage="finetune")
    store.variant_add("short", template="chatml", max_length=64)
    store.ingest(["base"], ["odd"], ["short"], sketcher="small")
    assert as_counts(store.sample_remove("odd", ["long"])) == {("failure", "failures"): 1, ("sample", "samples"): 1}
    assert store.sql("select n_sketched, n_failed from ingest_runs").row(0) == (1, 0)


def test_removed_source_is_gone_and_its_name_free(scored_copy, tmp_path):
    store = scored_copy
    report = as_counts(store.source_remove("songs"))
    assert report == {
        ("sketch", "sketches"): 20,
        ("influence", "influence"): 80,
        ("source influence", "source_influence"): 16,
        ("sample", "samples"): 5,
        ("score run", "score_run"): 4,
        ("ingest run", "ingest_run"): 4,
        ("source", "source"): 1,
    }
    for view in ("samples", "sketches", "ingest_runs", "score_runs", "influence", "source_influence"):
        assert count_rows(store, view, "source = 'songs'") == 0
    assert count_rows(store, "sources", "name = 'songs'") == 0
    assert set(attribute_all(store)["status"]) == {"current"}
    store.source_add("songs", write_jsonl(tmp_path / "new.jsonl", text_rows(2)), stage="finetune")
    assert store.ingest(["base"], ["songs"], ["raw"], sketcher="small").units["n_sketched"].item() == 2
    assert count_rows(store, "sketches", "source = 'songs'") == 2


def test_removed_query_source_removes_its_scores(scored_copy):
    assert as_counts(scored_copy.source_remove("test"))[("score run", "score_run")] == 10
    assert (
        raw(scored_copy, "influence")
        == raw(scored_copy, "source_influence")
        == count_rows(scored_copy, "score_runs")
        == 0
    )
    with pytest.raises(NothingToScoreError):
        scored_copy.metrics(sketcher="small")
    assert count_rows(scored_copy, "sketches") == 52


def test_removed_checkpoint_is_gone_and_its_name_free(scored_copy, checkpoints):
    store = scored_copy
    store.attribute(["base"], queries="test", query_checkpoint="epoch-1", sketcher="small")
    before = store.top("q100", checkpoint="base", sketcher="small").frame
    report = as_counts(store.checkpoint_remove("epoch-1"))
    assert report[("sketch", "sketches")] == 30
    assert report[("score run", "score_run")] == 10  # with those whose queries were at this checkpoint
    assert report[("metric", "checkpoint_metric")] == report[("checkpoint", "checkpoint")] == 1
    for view in ("sketches", "ingest_runs", "score_runs", "influence", "source_influence", "checkpoint_metrics"):
        assert count_rows(store, view, "checkpoint = 'epoch-1'") == 0
    assert store.top("q100", checkpoint="base", sketcher="small").frame.equals(before)
    assert raw(store, "source_influence") == 20
    store.checkpoint_add("epoch-1", checkpoints["base"])
    assert store.ingest(["epoch-1"], ["songs"], ["raw"], sketcher="small").units["n_sketched"].item() == 5


def test_sum_is_removed_only_with_its_checkpoints(scored_copy, checkpoints):
    """In SQL's LIKE, `_` stands for any character: `epoch_1` would match a sum over `epoch-1`."""
    scored_copy.checkpoint_add("epoch_1", checkpoints["epoch-1"], epoch=2)
    scored_copy.attribute(["base", "epoch-1"], queries="test", sketcher="small", over_checkpoints="sum")
    sums = "method = 'cosine-sum' AND status = 'done'"
    before = scored_copy.metrics(sketcher="small", over_checkpoints="sum")
    assert count_rows(scored_copy, "score_runs", sums) == 5
    assert as_counts(scored_copy.checkpoint_remove("epoch_1")) == {("checkpoint", "checkpoint"): 1}
    assert count_rows(scored_copy, "score_runs", sums) == 5
    assert scored_copy.metrics(sketcher="small", over_checkpoints="sum").equals(before)
    assert scored_copy.db_check().is_empty()
    scored_copy.checkpoint_remove("base")  # a sum goes with the first of its checkpoints too
    assert count_rows(scored_copy, "score_runs", sums) == 0


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("sample_remove", ("songs", ["sea-2"])), ("source_remove", ("songs",)), ("checkpoint_remove", ("base",))],
)
def test_dry_run_reports_removals_and_changes_nothing(scored_copy, method, arguments):
    before, on_disk = store_contents(scored_copy), files(scored_copy)
    planned = getattr(scored_copy, method)(*arguments, dry_run=True)
    assert (store_contents(scored_copy), files(scored_copy)) == (before, on_disk)
    assert planned.equals(getattr(scored_copy, method)(*arguments))
    assert not planned.is_empty()
    assert store_contents(scored_copy) != before


@pytest.mark.parametrize(
    ("method", "arguments", "fact", "hint"),
    [
        ("sample_remove", ("songs", ["sea-1", "sea-9"]), "no sample `sea-9` in source `songs`", "did you mean `sea-"),
        ("sample_remove", ("song", ["sea-1"]), "no source `song`", "did you mean `songs`?"),
        ("source_remove", ("song",), "no source `song`", "did you mean `songs`?"),
        ("checkpoint_remove", ("epoch1",), "no checkpoint `epoch1`", "did you mean `epoch-1`?"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_missing_name_is_an_error_and_nothing_is_removed(scored, method, arguments, fact, hint, dry_run):
    before = files(scored)
    with pytest.raises(NameUnknownError) as caught:
        getattr(scored, method)(*arguments, dry_run=dry_run)
    assert caught.value.fact.startswith(fact)
    assert caught.value.hint.startswith(hint)
    assert files(scored) == before


def test_removal_without_samples_is_an_error(scored):
    with pytest.raises(InputError, match="no sample ids were given"):
        scored.sample_remove("songs", [])


# --- cut off anywhere ----------------------------------------------------------------------------------------------


class CutError(Exception):
    """The process ends here."""


def cut_at(store, monkeypatch, step):
    """Let the removal end before its `step`-th change of a table or of the catalog; the others are done."""
    n_done = iter(range(1000))

    def change(*_):
        if next(n_done) == step:
            raise CutError

    vectors = store._db.vectors
    table_of = vectors.table

    def table(name):
        opened = table_of(name)
        delete = opened.delete
        opened.delete = lambda condition: (change(), delete(condition))
        return opened

    monkeypatch.setattr(vectors, "table", table)
    event.listen(store._db.engine, "commit", change)
    return lambda: event.remove(store._db.engine, "commit", change)


REMOVALS = [
    ("sample_remove", ("songs", ["sea-1", "sea-3"])),
    ("sample_remove", ("test", ["q100"])),
    ("source_remove", ("songs",)),
    ("source_remove", ("test",)),
    ("checkpoint_remove", ("base",)),
]


def check_whole(store):
    """No reader sees scores of an incomplete run, or sketches of removed samples."""
    orphans = "select count(*) from sketches k anti join samples s on s.source = k.source and s.sample_id = k.sample_id"
    assert store.sql(orphans).item() == 0
    scored = store.sql("select score_run, n_queries, n_samples from score_runs where status = 'done'")
    seen = store.sql("select score_run, count(*), min(n) from source_influence group by all")
    assert sorted(scored.rows()) == sorted(seen.rows())
    lists = store.sql("select score_run, count(*) from influence group by all")
    assert dict(lists.rows()) == {run: queries * samples for run, queries, samples in scored.rows()}
    store.show()


@pytest.mark.parametrize(("method", "arguments"), REMOVALS, ids=str)
def test_interrupted_removal_is_invisible_and_finished_by_the_same_call(
    scored_path, tmp_path, monkeypatch, method, arguments
):
    def fresh(name):
        return Store.open(copy_store(scored_path, tmp_path / name))

    with fresh("whole") as whole:
        getattr(whole, method)(*arguments)
        expected = store_contents(whole)
    for step in range(1000):
        with fresh(f"cut-{step}") as store:
            with monkeypatch.context() as patch:
                undo = cut_at(store, patch, step)
                try:
                    getattr(store, method)(*arguments)
                    finished = True
                except CutError:
                    finished = False
                undo()
            if finished:
                break
            check_whole(store)
            getattr(store, method)(*arguments)
            assert store_contents(store) == expected
    assert step > 5


def test_ingest_and_attribute_complete_an_abandoned_removal(scored_copy, monkeypatch):
    before = scored_copy.sql("select * exclude (score_run) from source_influence order by all")
    with monkeypatch.context() as patch:
        undo = cut_at(scored_copy, patch, 4)
        with pytest.raises(CutError):
            scored_copy.source_remove("songs")
        undo()
    assert count_rows(scored_copy, "source_influence", "source = 'songs'") == 0
    scored_copy.ingest(CHECKPOINTS, ["songs"], ["raw", "chatml"], sketcher="small")
    attribute_all(scored_copy)
    after = scored_copy.sql("select * exclude (score_run) from source_influence order by all")
    assert after.drop("max", "mean", "std").equals(before.drop("max", "mean", "std"))
    assert dict(scored_copy.sql("select source, count(*) from sketches group by all").rows())["songs"] == 20


KILLED = """
import os, signal, sys
from lark_store import Store
from lark_store.maintenance.remove import _Sweep
with Store.open(sys.argv[1]) as store:
    delete, left = _Sweep.delete, iter(range(int(sys.argv[2])))
    def watched(*arguments):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        delete(*arguments)
    _Sweep.delete = watched
    store.source_remove("songs")
"""


@pytest.mark.parametrize("steps", [0, 2])
def test_command_finishes_a_killed_removal(scored_copy, steps):
    assert run_forked(KILLED, store_label(scored_copy.path), steps) == -signal.SIGKILL
    check_whole(scored_copy)
    assert count_rows(scored_copy, "sketches", "source = 'songs'") == 0
    assert lark("source remove songs", store=scored_copy.path).code == 0
    assert count_rows(scored_copy, "sources") == 3
    assert raw(scored_copy, "samples", where(source="songs")) == 0


# --- concurrent work -----------------------------------------------------------------------------------------------


def test_running_ingest_blocks_removal_of_its_inputs(scored_copy):
    touches = {"source": ["songs"], "checkpoint": ["base"], "variant": ["raw"]}
    before = store_contents(scored_copy)
    with working(scored_copy._db.location, "ingest-x", "ingesting base · songs · raw", touches):
        for method, arguments in (
            ("sample_remove", ("songs", ["sea-1"])),
            ("source_remove", ("songs",)),
            ("checkpoint_remove", ("base",)),
        ):
            with pytest.raises(StoreBusyError, match="another process is ingesting base · songs · raw"):
                getattr(scored_copy, method)(*arguments)
        assert store_contents(scored_copy) == before
        scored_copy.source_remove("medical")
        scored_copy.checkpoint_remove("epoch-1")
    scored_copy.source_remove("songs")


def test_running_scoring_blocks_removal(scored_copy):
    seen = []

    def try_to_remove(_):
        with Store.open(scored_copy.path) as other, pytest.raises(StoreBusyError, match="another process is scoring"):
            other.sample_remove("songs", ["sea-1"])
        seen.append(1)

    scored_copy.attribute(["base"], queries="test", sketcher="small", hits=7, on_progress=try_to_remove)
    assert seen
    scored_copy.sample_remove("songs", ["sea-1"])
    assert scored_copy._db.location.locks.notes() == []


def test_removal_sees_a_running_ingest(store):
    tried = []

    def try_to_remove(progress):
        if progress.total and not tried:
            with Store.open(store.path) as other, pytest.raises(StoreBusyError, match="ingesting base · songs · raw"):
                other.source_remove("songs")
            tried.append(progress)

    store.ingest(["base"], ["songs"], ["raw"], sketcher="small", on_progress=try_to_remove)
    assert tried
    store.source_remove("songs")


def test_note_of_a_killed_ingest_does_not_block_removal(scored_copy):
    locks = scored_copy._db.location.locks
    locks.lock("ingest-dead")
    locks.write("ingest-dead", {"doing": "ingesting", "touches": None})
    scored_copy.source_remove("songs")
    assert locks.notes() == []


def test_no_work_begins_during_a_removal_of_its_inputs(scored_copy, monkeypatch, texts):
    monkeypatch.setattr("lark_store.schema.locks._GATE_TIMEOUT_S", 0.1)
    with removing(scored_copy._db.location, "source", "songs"):
        for work in (
            lambda: scored_copy.attribute(["base"], queries="test", sketcher="small"),
            lambda: scored_copy.ingest(["base"], ["finetune"], ["raw"], sketcher="small"),
            lambda: scored_copy.source_add("songs", texts["songs"], stage="pretrain"),
        ):
            with pytest.raises(StoreBusyError, match="another process is removing data from this store"):
                work()


def test_maintenance_jobs_are_exclusive(scored_copy):
    with maintenance(scored_copy._db.location):
        for job in (
            scored_copy.db_optimize,
            lambda: scored_copy.source_remove("songs"),
            lambda: scored_copy.snapshot_create("a"),
            lambda: scored_copy.snapshot_remove("a"),
        ):
            with pytest.raises(StoreBusyError, match="optimizing or making a snapshot"):
                job()


def test_source_replaced_during_an_ingest_is_detected(store, texts, monkeypatch):
    from lark_store.ingest import worker

    fill = worker.fill

    def remove_in_between(*arguments):
        fill(*arguments)
        with Store.open(store.path) as other:
            other.source_remove("songs")
            other.source_add("songs", texts["songs"], stage="pretrain")

    monkeypatch.setattr(worker, "fill", remove_in_between)
    with pytest.raises(NameUnknownError, match="source `songs` was removed and added again"):
        store.ingest(["base"], ["songs"], ["raw"], sketcher="small")
    assert count_rows(store, "ingest_runs") == 0


# --- replace -------------------------------------------------------------------------------------------------------


def changed_songs(tmp_path, *ids, text="Quite another text about the harbour."):
    changed = [row | {"text": f"{text} {row['id']}"} if row["id"] in ids else row for row in text_rows(6)]
    return write_jsonl(tmp_path / "changed.jsonl", changed)


def test_replaced_samples_are_sketched_again(scored_copy, tmp_path):
    before = read_sketches(scored_copy)
    path = changed_songs(tmp_path, "sea-1", "sea-4")
    report = scored_copy.source_add("songs", path, stage="pretrain", replace=True)
    counts = (report.n_read, report.n_added, report.n_existing, report.n_replaced, report.n_changed)
    assert counts == (6, 1, 3, 2, 0)
    texts = dict(scored_copy.sql("select sample_id, text from samples where source = 'songs'").rows())
    assert texts["sea-1"] == "Quite another text about the harbour. sea-1"
    assert texts["sea-0"] == text_rows(1)[0]["text"]
    assert len(texts) == count_rows(scored_copy, "samples", "source = 'songs'") == 6
    assert count_rows(scored_copy, "sketches", "sample_id in ('sea-1', 'sea-4')") == 0
    assert count_rows(scored_copy, "source_influence", "source = 'songs'") == 0
    units = scored_copy.ingest(CHECKPOINTS, ["songs"], ["raw", "chatml"], sketcher="small").units
    assert units["n_sketched"].to_list() == [3] * 4
    after = read_sketches(scored_copy)
    new = {row["row_key"]: row["loss"] for row in after.iter_rows(named=True)}
    old = {row["row_key"]: row["loss"] for row in before.iter_rows(named=True)}
    assert {key.split("/")[-1] for key in old if old[key] != new[key]} == {"sea-1", "sea-4"}
    assert scored_copy.verify(sketches=100, sketcher="small")["ok"].all()
    assert set(attribute_all(scored_copy).filter(source="songs")["status"]) == {"scored"}
    again = scored_copy.source_add("songs", path, stage="pretrain", replace=True)
    assert (again.n_existing, again.n_replaced, again.n_added) == (6, 0, 0)


def test_first_row_of_an_id_counts(store, tmp_path):
    twice = [{"id": "sea-0", "text": "first"}, {"id": "sea-0", "text": "second"}]
    for replaced, existing in ((1, 0), (0, 1)):
        path = write_jsonl(tmp_path / "twice.jsonl", twice)
        report = store.source_add("songs", path, stage="pretrain", replace=True)
        assert (report.n_replaced, report.n_existing, report.n_changed) == (replaced, existing, 1)
        assert store.sql("select text from samples where sample_id = 'sea-0'").item() == "first"


def test_a_replacement_with_a_bad_row_changes_nothing(scored_copy, tmp_path):
    before = store_contents(scored_copy)
    path = write_jsonl(tmp_path / "bad.jsonl", [{"id": "sea-1", "text": "new"}, {"id": "x", "nothing": 1}])
    with pytest.raises(InputError, match="row 2"):
        scored_copy.source_add("songs", path, stage="pretrain", replace=True)
    assert store_contents(scored_copy) == before


def test_interrupted_replacement_never_mixes_old_sketch_and_new_text(scored_copy, tmp_path, monkeypatch):
    path = changed_songs(tmp_path, "sea-1")
    old = text_rows(2)[1]["text"]

    def cut(*_):
        raise CutError

    with monkeypatch.context() as patch:
        patch.setattr(scored_copy._db.vectors, "put", cut)
        with pytest.raises(CutError):
            scored_copy.source_add("songs", path, stage="pretrain", replace=True)
    assert scored_copy.sql("select text from samples where sample_id = 'sea-1'").item() == old
    assert count_rows(scored_copy, "sketches", "sample_id = 'sea-1'") == 0
    check_whole(scored_copy)
    assert scored_copy.source_add("songs", path, stage="pretrain", replace=True).n_replaced == 1


def test_replace_on_the_command_line(scored_copy, tmp_path):
    path = changed_songs(tmp_path, "sea-1")
    line = f"source add songs {path} --stage pretrain"
    refused = lark(line, store=scored_copy.path)
    assert refused.code == 1
    assert "\n\nhint: replace the stored samples with `--replace`" in refused.err
    result = lark(f"{line} --replace", store=scored_copy.path)
    assert (result.code, result.err) == (
        0,
        "source `songs`: 0 samples added, 5 already stored, 1 replaced\n  read 6 texts\n",
    )


# --- the command line ----------------------------------------------------------------------------------------------


def test_commands_print_reports_and_messages(scored_copy):
    store = scored_copy.path
    dry = lark("source remove songs --dry-run -f json", store=store)
    assert (dry.code, dry.err) == (0, "dry run: nothing was removed\n")
    result = lark("source remove songs -f json", store=store)
    assert (result.code, result.out) == (0, dry.out)
    assert result.err.startswith("removed; `lark-store db optimize` frees the disk space")
    assert ("sample", "samples", 5) in result.columns("kind", "table", "rows")
    samples = lark("sample remove medical kidney-1 kidney-2 -f json", store=store)
    assert ("sample", "samples", 2) in samples.columns("kind", "table", "rows")
    checkpoint = lark("checkpoint remove epoch-1 -f json", store=store)
    assert ("checkpoint", "checkpoint", 1) in checkpoint.columns("kind", "table", "rows")
    optimized = lark("db optimize --keep-versions-days 0 -f json", store=store)
    assert [row["files_after"] <= 1 for row in optimized.rows] == [True] * len(optimized.rows)
    status = lark("db status -f json", store=store)
    assert status.columns("table")[-2:] == [("catalog",), ("snapshots",)]
    assert "samples" in lark("db status", store=store).out


@pytest.mark.parametrize(
    ("line", "fact", "hint"),
    [
        ("sample remove songs sea9", "no sample `sea9` in source `songs`; nothing was removed", "did you mean `sea-"),
        ("source remove song", "no source `song`", "did you mean `songs`?"),
        ("checkpoint remove bas --dry-run", "no checkpoint `bas`", "did you mean `base`?"),
        ("db optimize --keep-versions-days -1", "`--keep-versions-days` must be at least 0", "the default is 7"),
    ],
)
def test_errors_have_fact_and_hint(scored_path, line, fact, hint):
    result = lark(line, store=scored_path)
    assert (result.code, result.out) == (1, "")
    actual_fact, found_hint = result.err.removesuffix("\n").split("\n\nhint: ")
    assert actual_fact.startswith(f"error: {fact}")
    assert found_hint.startswith(hint)


def test_filter_of_many_ids_works(store, tmp_path):
    ids = [f"n{i}" for i in range(4096)]
    path = write_jsonl(tmp_path / "many.jsonl", [{"id": i, "text": f"text {i}"} for i in ids])
    store.source_add("many", path, stage="pretrain")
    path = write_jsonl(tmp_path / "many.jsonl", [{"id": i, "text": f"another {i}"} for i in ids])
    assert store.source_add("many", path, stage="pretrain", replace=True).n_replaced == 4096
    assert as_counts(store.sample_remove("many", ids)) == {("sample", "samples"): 4096}
