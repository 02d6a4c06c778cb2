"""Computations whose inputs another process changes: fits, indices, evaluations, lexical scores, SQL."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from helpers.reference_scores import assert_scores_close, score_tables
from helpers.stores import copy_store
from helpers.texts import qa_rows, write_jsonl
from sqlalchemy import select

from lark_store import Store
from lark_store.errors import NameUnknownError, StoreBusyError, StoreError
from lark_store.evaluate.evaluation import Task
from lark_store.ingest import correction_store, fit_corrections, ingest_runs
from lark_store.query.answers import attribute
from lark_store.query.scoring import ann_index, search
from lark_store.query.sql import connection
from lark_store.schema.catalog import Checkpoint, FormatVariant, IngestRun, SearchIndex, Sketcher, Source
from lark_store.schema.catalog_base import now
from lark_store.specs import EvaluateSpec


def first(monkeypatch, module, name, act):
    """Have `act` done before the first call of a module's function."""
    real, calls = getattr(module, name), []

    def acts(*args, **kwargs):
        calls.append(name)
        if len(calls) == 1:
            act()
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, acts)
    return calls


# --- fitted corrections --------------------------------------------------------------------------------------------


@pytest.fixture
def adam(store):
    store.sketcher_add("step", k=256, correction="adam", min_ndim=2)
    return store


def test_fit_uses_texts_read_under_its_lock(adam, tmp_path, monkeypatch):
    rows = [{**qa_rows(1)[0], "answer": "seldom, they say"}]

    def replace():
        with Store.open(adam.path) as other:
            other.source_add("finetune", write_jsonl(tmp_path / "f.jsonl", rows), stage="finetune", replace=True)

    first(monkeypatch, fit_corrections, "working", replace)
    fit = adam.correction_fit("base", sources=["finetune"])
    again = adam.correction_fit("base", sources=["finetune"])
    assert (fit.is_new, fit.n_samples) == (True, 6)
    assert (again.is_new, again.sha256) == (False, fit.sha256)  # the same samples, by their contents


def test_fit_skips_samples_removed_before_it_began(adam, monkeypatch):
    first(monkeypatch, fit_corrections, "working", lambda: adam.sample_remove("finetune", ["q1", "q4"]))
    assert adam.correction_fit("base", sources=["finetune"]).n_samples == 4


def test_fit_for_a_replaced_checkpoint_is_refused(adam, checkpoints, monkeypatch):
    def change():
        adam.checkpoint_remove("base")
        adam.checkpoint_add("base", checkpoints["epoch-1"])

    first(monkeypatch, fit_corrections, "working", change)
    with pytest.raises(NameUnknownError, match="checkpoint `base` was removed and added again"):
        adam.correction_fit("base", sources=["finetune"])
    assert adam.sql("select * from corrections").is_empty()


def test_ingest_keeps_factors_of_a_concurrent_fit(adam, monkeypatch):
    def fit():
        with Store.open(adam.path) as other:
            other.correction_fit("base", sources=["songs"], samples=4)

    first(monkeypatch, fit_corrections, "working", fit)
    adam.ingest(["base"], ["songs"], ["chatml"], sketcher="step")
    assert adam.sql("select sources, n_samples from corrections").rows() == [("songs", 4)]
    assert adam.verify(sketches=5, sketcher="step")["ok"].all()


def test_no_ingest_begins_while_its_factors_are_replaced(adam, monkeypatch):
    """It begins after the look at the runs and before the change: either of the two must be refused."""
    old = adam.correction_fit("base", sources=["finetune"], samples=3).sha256
    errors, threads = [], []

    def ingest():
        with Store.open(adam.path) as other, other._db.session() as session:
            kinds = {"sketcher_id": (Sketcher, "step"), "source_id": (Source, "finetune")}
            kinds |= {"variant_id": (FormatVariant, "chatml"), "checkpoint_id": (Checkpoint, "base")}
            rows = {
                key: session.scalars(select(kind).filter_by(name=name)).one() for key, (kind, name) in kinds.items()
            }
        options = {"recipe": {correction_store.RECIPE_KEY: old}, "versions": {}, "device": "cpu"}
        try:
            with Store.open(adam.path) as other:
                ids = {key: row.id for key, row in rows.items()}
                ingest_runs.begin(other._db, ids | {"fingerprint": "f" * 16}, options, 0)
                correction_store.check_same(other._db, rows["checkpoint_id"], old)
        except StoreError as error:
            errors.append(str(error))

    real, calls = correction_store._check_unused, []

    def checked(*args):
        real(*args)
        calls.append(1)
        if len(calls) == 3:  # behind the catalog's lock
            threads.append(threading.Thread(target=ingest))
            threads[0].start()
            time.sleep(1)

    monkeypatch.setattr(correction_store, "_check_unused", checked)
    fit = adam.correction_fit("base", sources=["finetune"], samples=4)
    threads[0].join(60)
    assert fit.sha256 != old
    assert len(errors) == 1
    assert "another process replaced the factors of checkpoint `base`" in errors[0]


# --- the approximate index -----------------------------------------------------------------------------------------


def test_index_is_remeasured_when_its_run_is_gone(scored_copy, monkeypatch):
    real, calls = ann_index._measure, []

    def measured(*args):
        result = real(*args)
        calls.append(result.n_rows)
        if len(calls) == 1:
            with scored_copy._db.session() as session:
                session.get_one(IngestRun, 1).status = "superseded"
        return result

    monkeypatch.setattr(ann_index, "_measure", measured)
    with scored_copy._db.session() as session:
        gone = session.get_one(IngestRun, 1).n_sketched
    report = scored_copy.index_build("small")
    assert gone > 0
    assert calls == [calls[0], calls[0] - gone]
    assert report["n_rows"].to_list() == calls[1:]


def test_figures_over_more_rows_are_kept(scored_copy, monkeypatch):
    real = ann_index._measure

    def measured(db, fingerprint, *args):
        result = real(db, fingerprint, *args)
        more = {"candidates": 50, "recall": 0.99, "n_queries": 7, "n_rows": result.n_rows + 10, "built_at": now()}
        with db.session() as session:
            session.merge(SearchIndex(fingerprint=fingerprint, **more))
        return result

    monkeypatch.setattr(ann_index, "_measure", measured)
    assert scored_copy.index_build("small")["n_queries"].to_list() == [7]


# --- evaluations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "sample"), [("finetune", "q3"), ("test", "q101")])
def test_evaluation_of_removed_samples_is_not_stored(scored_copy, tmp_path, source, sample):
    spec = EvaluateSpec(sources=["finetune"], queries="test", out=tmp_path / "out")
    task = Task("spearman", scored_copy, ["cosine"], spec)
    task.add("cosine", "rho", np.arange(len(task.material.query_ids), dtype=float))
    scored_copy.sample_remove(source, [sample])
    with pytest.raises(StoreBusyError, match=f"sample `{sample}` of `{source}` was changed or removed during"):
        task.finish()
    assert scored_copy.sql("select * from evaluations").is_empty()


# --- texts and queries ---------------------------------------------------------------------------------------------

HOW = {"queries": "test", "sketcher": "small", "method": "hybrid", "hits": 5}


def added(store, tmp_path):
    """Add samples which change the word frequencies."""
    rows = [{"id": f"more-{i}", "text": "Is the organ seen, affected or not? maybe"} for i in range(9)]
    with Store.open(store.path) as other:
        other.source_add("other", write_jsonl(tmp_path / "more.jsonl", rows), stage="pretrain")


def test_lexical_scores_record_their_corpus(scored_path, tmp_path, monkeypatch):
    """Samples that are added before the first score count, and the recipe knows."""
    with Store.open(copy_store(scored_path, tmp_path / "lark.store")) as store:
        calls = first(monkeypatch, attribute, "_write", lambda: added(store, tmp_path))
        assert set(store.attribute(["base"], **HOW)["status"]) == {"scored"}
        assert len(calls) == 2
        assert set(store.attribute(["base"], **HOW)["status"]) == {"current"}
        actual = score_tables(store, "hybrid")
    with Store.open(copy_store(scored_path, tmp_path / "alone.store")) as store:
        added(store, tmp_path)
        store.attribute(["base"], **HOW)
        assert_scores_close(actual, score_tables(store, "hybrid"))


def test_queries_of_a_pass_share_one_corpus(scored_path, tmp_path, monkeypatch):
    with Store.open(copy_store(scored_path, tmp_path / "alone.store")) as store:
        store.attribute(["base"], **HOW)
        expected = score_tables(store, "hybrid")
    with Store.open(copy_store(scored_path, tmp_path / "lark.store")) as store:
        appends = first(monkeypatch, attribute, "_append", lambda: added(store, tmp_path))
        store.attribute(["base"], memory=1, **HOW)
        assert len(appends) == 4
        assert_scores_close(score_tables(store, "hybrid"), expected)
        assert set(store.attribute(["base"], **HOW)["status"]) == {"scored"}


@pytest.mark.parametrize("method", ["cosine", "bm25"])
def test_query_removed_during_a_search_is_an_error(scored_copy, monkeypatch, method):
    name = "load_queries" if method == "cosine" else "texts_of"
    first(monkeypatch, search, name, lambda: scored_copy.sample_remove("test", ["q102"]))
    with pytest.raises(StoreBusyError, match="queries were removed or replaced during the search"):
        scored_copy.scores(checkpoint="base", queries="test", sketcher="small", method=method)


def test_sql_refuses_to_mix_runs_of_two_moments(scored_copy, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(connection, "_statuses", lambda _: [(next(ticks), "done")])
    with pytest.raises(StoreBusyError, match="other processes keep committing runs while"):
        scored_copy.sql("select 1")
