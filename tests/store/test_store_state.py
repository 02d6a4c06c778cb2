"""Unit tests with a store: unfinished runs, factors, cached BM25 indices, the minimum of hits."""

from __future__ import annotations

import datetime as dt
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.texts import text_rows, write_jsonl
from sqlalchemy import select

from lark_store import Store
from lark_store.core.hashing import file_hash
from lark_store.errors import InputError, NothingToScoreError, StoreError
from lark_store.gradients.corrections import SECOND_MOMENTS
from lark_store.ingest import correction_store, ingest_runs
from lark_store.query.answers import score_runs
from lark_store.query.scoring import bm25
from lark_store.schema.catalog import Checkpoint, Correction, IngestRun, ScoreRun
from lark_store.schema.database import add_named, check_unchanged, find, find_same
from lark_store.schema.factor_files import factor_files, file_name

ENDED = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
UNIT = ("fingerprint", "sketcher_id", "checkpoint_id", "source_id", "variant_id")
HOW = ("recipe", "versions", "device")


# --- unfinished runs -----------------------------------------------------------------------------------------------


def first_run(store, **changed):
    """Change the store's first ingest run; returns it, its unit and its configuration."""
    with store._db.session() as session:
        run = session.scalars(select(IngestRun).order_by(IngestRun.id)).first()
        for name, value in changed.items():
            setattr(run, name, value)
    return run, {c: getattr(run, c) for c in UNIT}, {c: getattr(run, c) for c in HOW}


def run_of(store, number):
    with store._db.session() as session:
        return session.get_one(IngestRun, number)


@pytest.mark.parametrize(("status", "ended"), [("interrupted", ENDED), ("failed", ENDED), ("running", None)])
def test_ended_run_is_committed_with_its_rows(scored_copy, status, ended):
    run, unit, _ = first_run(scored_copy, status=status, finished_at=ended, n_sketched=1, n_failed=7, error="killed")
    rows = scored_copy.sql(f"select count(*) from sketches where ingest_run = {run.id}").item()
    assert rows == 0  # nobody reads them
    assert ingest_runs.has_unfinished(scored_copy._db, unit)
    assert not ingest_runs.has_unfinished(scored_copy._db, unit | {"variant_id": 99})
    ingest_runs.settle(scored_copy._db, unit)
    assert not ingest_runs.has_unfinished(scored_copy._db, unit)
    result = run_of(scored_copy, run.id)
    assert (result.status, result.error, result.n_sketched, result.n_failed) == (
        "done",
        f"{status}; its rows are kept",
        6,
        0,
    )
    if ended:
        assert result.finished_at.replace(tzinfo=dt.UTC) == ended
    else:
        assert result.finished_at is not None
    assert scored_copy.sql(f"select count(*) from sketches where ingest_run = {run.id}").item() == 6


def test_run_resumes_only_with_an_equal_configuration(scored_copy):
    run, unit, configuration = first_run(scored_copy, status="failed", finished_at=ENDED, error="disk full")
    again = ingest_runs.begin(scored_copy._db, unit, configuration, 3)
    assert (again.id, again.status, again.error, again.finished_at) == (run.id, "running", None, None)
    other = ingest_runs.begin(scored_copy._db, unit, configuration | {"device": "another"}, 6)
    assert other.id != run.id
    assert (other.status, other.device, other.n_existing, other.n_sketched) == ("running", "another", 6, 0)
    old = run_of(scored_copy, run.id)
    assert (old.status, old.error, old.n_sketched) == ("done", "running; its rows are kept", 6)
    assert run_of(scored_copy, other.id).status == "running"


# --- the catalog ---------------------------------------------------------------------------------------------------


def test_removed_and_added_row_is_a_new_one(scored_copy):
    db = scored_copy._db
    with db.session() as session:
        row, other = find(session, Checkpoint, "base"), find(session, Checkpoint, "epoch-1")
    check_unchanged(db, row, other)
    with db.session() as session:
        session.get_one(Checkpoint, row.id).created_at = ENDED
    with pytest.raises(LookupError, match="checkpoint `base` was removed and added again"):
        check_unchanged(db, other, row)
    row.created_at, row.id = ENDED, row.id + 100
    with pytest.raises(LookupError, match="checkpoint `base` was removed and added again"):
        check_unchanged(db, row)


def test_name_keeps_its_definition(scored_copy):
    with scored_copy._db.session() as session:
        base = find(session, Checkpoint, "base")
        assert find_same(session, Checkpoint(name="base", epoch=base.epoch), ("epoch",)) is base
        assert find_same(session, Checkpoint(name="new"), ("epoch",)) is None
        assert add_named(session, Checkpoint(name="base", epoch=7.0), ()) is base
        with pytest.raises(ValueError, match=r"checkpoint `base` already exists with epoch `0\.0`, not `7\.0`"):
            add_named(session, Checkpoint(name="base", epoch=7.0), ("epoch",))
        with pytest.raises(ValueError, match=r"checkpoint `base` already exists with epoch `0\.0`, not `-7\.0`"):
            find_same(session, Checkpoint(name="base", epoch=-7.0), ("epoch",))


def test_open_store_caches_one_state_per_key(scored):
    results = []

    def make():
        results.append(len(results))
        return results[-1]

    db = scored._db
    assert [db.remember("x", state, make) for state in (1, 1, 2, 2, 1)] == [0, 0, 1, 1, 2]
    assert db.remember("y", 1, make) == 3
    assert not db.is_snapshot
    assert db.default_sketcher == scored.sql("select name from sketchers where is_default").item()


# --- factors -------------------------------------------------------------------------------------------------------


def keep(db, value):
    with db.session() as session:
        checkpoint = find(session, Checkpoint, "base")
    correction = Correction(kind=SECOND_MOMENTS, origin="gradients", recipe={"weights_sha256": "x"})
    return correction_store.save(db, {"w/rows": torch.full((3,), value)}, correction, checkpoint), checkpoint


def test_replaced_factors_leave_no_file(store):
    db, hashes = store._db, []
    for value in (1.0, 2.0, 1.0, 3.0, 4.0, 3.0):
        kept, checkpoint = keep(db, value)
        hashes.append(kept.sha256)
        assert factor_files(db.vectors) == [file_name(kept.sha256)]
        assert correction_store.stored(db, checkpoint, SECOND_MOMENTS).id == kept.id
        assert correction_store.is_whole(db, kept)
        assert correction_store.read(db, kept)["w/rows"].tolist() == [value] * 3
        correction_store.check_same(db, checkpoint, kept.sha256)
    assert (hashes[1] < hashes[0]) + (hashes[2] < hashes[1]) == 1  # in both orders
    assert keep(db, 3.0)[0].id == kept.id  # the same again changes nothing
    correction_store.check_same(db, checkpoint, None)
    with pytest.raises(StoreError, match="another process replaced the factors of checkpoint `base`"):
        correction_store.check_same(db, checkpoint, hashes[0])
    with pytest.raises(StoreError, match="are not finite"):
        keep(db, float("nan"))


@pytest.mark.folder
def test_a_changed_file_of_factors_is_never_read(store):
    kept, _ = keep(store._db, 1.0)
    path = store.path / "vectors" / file_name(kept.sha256)
    content, orders = path.read_bytes(), set()
    for position in range(len(content) - 1, len(content) - 9, -1):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        orders.add(file_hash(path) > kept.sha256)
        assert not correction_store.is_whole(store._db, kept)
        with pytest.raises(
            StoreError, match=r"factors `corrections/\w{16}\.safetensors` are damaged: their checksum differs"
        ):
            correction_store.read(store._db, kept)
    assert orders == {False, True}
    path.unlink()
    assert not correction_store.is_whole(store._db, kept)
    with pytest.raises(StoreError, match="can't be read"):
        correction_store.read(store._db, kept)


@pytest.mark.parametrize(("status", "refused"), [("done", True), ("running", True), ("superseded", False)])
def test_factors_used_by_sketches_stay(scored_copy, status, refused):
    kept, checkpoint = keep(scored_copy._db, 1.0)
    first_run(
        scored_copy, status=status, recipe={correction_store.RECIPE_KEY: kept.sha256}, checkpoint_id=checkpoint.id
    )
    if refused:
        with pytest.raises(InputError, match=r"sketches at checkpoint `base` use its current factors \(ingest run 1\)"):
            keep(scored_copy._db, 2.0)
        with pytest.raises(InputError, match=r"\(ingest run 1\)"):
            correction_store.check_unused(scored_copy._db, checkpoint, kept)
        assert keep(scored_copy._db, 1.0)[0].id == kept.id
    else:
        correction_store.check_unused(scored_copy._db, checkpoint, kept)
        assert keep(scored_copy._db, 2.0)[0].sha256 != kept.sha256


# --- words ---------------------------------------------------------------------------------------------------------


SCORED = (
    *("method", "fingerprint", "sketcher_id", "checkpoint_id", "query_checkpoint_id"),
    *("queries_id", "query_variant_id", "source_id", "variant_id"),
)


@pytest.mark.parametrize("own", [0, 1])
def test_committed_score_run_supersedes_runs_begun_before_and_after_it(scored_copy, own):
    with scored_copy._db.session() as session:
        first = session.get(ScoreRun, 1)
        ids = {name: getattr(first, name) for name in SCORED}
        second = ScoreRun(**ids, **{name: getattr(first, name) for name in HOW}, status="done")
        session.add(second)
        session.flush()
        runs = [first, second]
        runs[own].status = "running"
        other = runs[1 - own]
        assert score_runs._replace(session, SimpleNamespace(run=runs[own], ids=ids), []) == [other.id]
        assert (runs[own].status, other.status) == ("done", "superseded")


def kept_indices(store):
    return sorted((store._db.location.cache / "lexical").glob("*"))


@pytest.mark.folder
def test_a_large_index_of_words_is_kept_until_samples_are_added(scored_copy, tmp_path, monkeypatch, capsys):
    queries = ["the night train and the kidney", "yes", "of the"]
    plain = bm25.open_lexical(scored_copy._db, "bm25").scores(queries)
    assert kept_indices(scored_copy) == []  # made faster than read
    assert plain[:2].any(axis=1).all()
    assert not plain[2].any()  # stop words alone
    monkeypatch.setattr(bm25, "_KEPT_FROM", 16)
    with Store.open(scored_copy.path) as first:
        result = bm25.open_lexical(first._db, "bm25")
        assert len(result.documents) == 16
        for engine in ("bm25plus", "bm25-okapi"):
            other = bm25.open_lexical(first._db, engine)
            assert not np.allclose(other.scores(queries), plain)
    (place,) = kept_indices(scored_copy)
    with monkeypatch.context() as patch, Store.open(scored_copy.path) as again:
        patch.setattr(bm25, "_corpus", lambda *_: pytest.fail("it was kept"))
        kept = bm25.open_lexical(again._db, "bm25")
        assert kept.documents.equals(result.documents)
        np.testing.assert_array_equal(kept.scores(queries), plain)
    scored_copy.source_add("more", write_jsonl(tmp_path / "more.jsonl", text_rows(3, "moon")), stage="pretrain")
    with Store.open(scored_copy.path) as later:
        assert len(bm25.open_lexical(later._db, "bm25").documents) == 19
    (newer,) = kept_indices(scored_copy)
    assert newer != place
    assert capsys.readouterr() == ("", "")  # bm25s would show its progress


def test_samples_of_an_unfinished_addition_are_not_searched(scored_copy, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    rows = write_jsonl(tmp_path / "more.jsonl", text_rows(3, "moon"))
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr("lark_store.ingest.sources.add_named", interrupt)
        scored_copy.source_add("more", rows, stage="pretrain")
    assert scored_copy._db.vectors.table("samples").count_rows("source = 'more'") == 3
    before = scored_copy.similar_text(text="the moon", k=100)
    assert set(before["source"]) == {"finetune", "medical", "songs"}
    scored_copy.source_add("more", rows, stage="pretrain")
    assert set(scored_copy.similar_text(text="the moon", k=100)["source"]) == {"finetune", "medical", "songs", "more"}


@pytest.mark.folder
def test_read_only_store_rebuilds_its_index(scored_copy, monkeypatch):
    def refuse(**_):
        raise PermissionError("read-only")

    monkeypatch.setattr(bm25, "_KEPT_FROM", 1)
    monkeypatch.setattr(bm25.tempfile, "mkdtemp", refuse)
    assert len(bm25.open_lexical(scored_copy._db, "bm25").documents) == 16
    assert kept_indices(scored_copy) == []


def test_the_same_rows_replace_nothing(scored_copy, texts):
    for replace in (True, False):
        report = scored_copy.source_add("songs", texts["songs"], stage="pretrain", replace=replace)
        assert (report.n_read, report.n_existing, report.n_replaced, report.n_added) == (5, 5, 0, 0)
    assert scored_copy.sql("select count(*) from sketches where source = 'songs'").item() == 20


def test_without_samples_there_are_no_words_to_search(tmp_path):
    with Store.create(tmp_path / "empty.store") as empty:
        empty.source_add("asked", write_jsonl(tmp_path / "asked.jsonl", text_rows(2)), stage="query")
        with pytest.raises(NothingToScoreError, match="the store has no samples except queries"):
            bm25.open_lexical(empty._db, "bm25")


# --- scores --------------------------------------------------------------------------------------------------------


def test_one_hit_for_each_query_is_enough(scored_copy):
    best = scored_copy.sql("select query_id, source, variant, argmax from source_influence where checkpoint = 'base'")
    with pytest.raises(LookupError, match="no checkpoint `nowhere`"):
        scored_copy.attribute(["base", "nowhere"], queries="test", sketcher="small", hits=1)
    assert scored_copy.sql("select max(score_run) from score_runs").item() == 10  # nothing is scored before
    scored_copy.attribute(["base"], queries="test", sketcher="small", hits=1)
    rows = scored_copy.sql("select query_id, source, variant, sample_id, rank from influence where checkpoint = 'base'")
    assert set(rows["rank"]) == {1}
    assert sorted(rows.drop("rank").rows()) == sorted(best.rows())
    for table in ("influence", "source_influence"):
        indexed = {c for index in scored_copy._db.vectors.table(table).list_indices() for c in index.columns}
        assert indexed == {"score_run"}


def test_only_new_scores_record_their_geometry(scored_copy):
    new = scored_copy.attribute(["base"], queries="test", sketcher="small", method="centred")
    assert set(new["status"]) == {"scored"}
    assert all(note.startswith("means subtracted at `base`") for note in new["note"])
    again = scored_copy.attribute(["base"], queries="test", sketcher="small", method="centred")
    assert set(again["status"]) == {"current"}
    assert again["note"].is_null().all()
    assert again["score_run"].to_list() == new["score_run"].to_list()
