"""Incremental `attribute`: only new sketches are read, and the tables equal a full scoring."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from helpers.forked import run_forked
from helpers.reference_scores import (
    ATTRIBUTION,
    assert_scores_close,
    brute_force_scores,
    score_tables,
    scores_by_key,
    scores_from_scratch,
)
from helpers.stores import copy_store, store_label
from helpers.texts import qa_rows, write_jsonl

from lark_store import Store
from lark_store.errors import StoreBusyError
from lark_store.query.answers import attribute as module
from lark_store.query.select.rows import Rows

GROWN = [("finetune", "chatml", "scored", 13), ("songs", "raw", "scored", 17)]


@pytest.fixture(scope="module")
def grown_path(scored_path, tmp_path_factory):
    """The scored store (scored also with 5 hits, by dot), then with new samples in two of its groups."""
    root = tmp_path_factory.mktemp("grown")
    with Store.open(copy_store(scored_path, root / "lark.store")) as store:
        for method in ("cosine", "dot"):
            store.attribute(["base"], method=method, hits=5, **ATTRIBUTION)
        for n in (7, 5):  # two runs of the one source
            rows = [{"id": f"new-{n}-{i}", "text": f"Number {i} of {n} about the night."} for i in range(n)]
            store.source_add("songs", write_jsonl(root / "songs.jsonl", rows), stage="pretrain")
            store.ingest(["base"], ["songs"], ["raw"], sketcher="small")
        store.source_add("finetune", write_jsonl(root / "f.jsonl", qa_rows(7, start=500)), stage="finetune")
        store.ingest(["base"], ["finetune"], ["chatml"], sketcher="small")
    return root / "lark.store"


@pytest.fixture
def grown(grown_path, tmp_path):
    with Store.open(copy_store(grown_path, tmp_path / "grown.store")) as opened:
        yield opened


@pytest.fixture
def streamed(monkeypatch):
    """The ids of samples with sketches read, pass by pass."""
    passes = []
    stream = Rows.stream

    def counted(self, *args, **kwargs):
        passes.append([])
        for numbers, column in stream(self, *args, **kwargs):
            passes[-1] += self.frame["sample_id"][numbers].to_list()
            yield numbers, column

    monkeypatch.setattr(Rows, "stream", counted)
    return passes


@pytest.mark.parametrize("queries_at_a_time", [4, 3, 1])
@pytest.mark.parametrize("method", ["cosine", "dot"])
def test_only_new_sketches_are_read_with_results_of_full_scoring(grown, tmp_path, streamed, method, queries_at_a_time):
    memory = 4 * 1024 * queries_at_a_time
    report = grown.attribute(["base"], method=method, hits=5, memory=memory, **ATTRIBUTION)
    again = report.filter(status="scored").select("source", "variant", "status", "n_samples").sort("source").rows()
    assert again == GROWN
    assert report["n_queries"].to_list() == [4] * 5
    new = {f"q{i}" for i in range(500, 507)} | {f"new-{n}-{i}" for n in (7, 5) for i in range(n)}
    assert len(streamed) == -(-4 // queries_at_a_time)
    for ids in streamed:
        assert len(ids) == len(new) == 19
        assert set(ids) == new
    actual = score_tables(grown, method)
    assert_scores_close(actual, scores_from_scratch(grown, tmp_path / "whole", method))
    expected = brute_force_scores(grown, "q102", dot=method == "dot")
    for (source, variant), group in actual[0].filter(query_id="q102").group_by("source", "variant"):
        scores = {key: score for key, score in expected.items() if key[:2] == (source, variant)}
        assert list(scores_by_key(group.sort("rank"))) == sorted(scores, key=lambda key: -scores[key])[:5]
        row = actual[1].filter(query_id="q102", source=source, variant=variant).row(0, named=True)
        values = list(scores.values())
        assert (row["n"], row["argmax"]) == (len(values), max(scores, key=lambda key: scores[key])[2])
        figures = [max(values), np.mean(values), np.std(values)]
        assert [row["max"], row["mean"], row["std"]] == pytest.approx(figures, rel=1e-3, abs=1e-6)
    streamed.clear()
    assert set(grown.attribute(["base"], method=method, hits=5, **ATTRIBUTION)["status"]) == {"current"}
    assert streamed == []


def n_read(streamed):
    return sum(map(len, streamed))


def test_more_hits_need_a_full_scoring(grown, tmp_path, streamed):
    assert set(grown.attribute(["base"], hits=6, **ATTRIBUTION)["status"]) == {"scored"}
    assert n_read(streamed) == 45
    assert_scores_close(score_tables(grown), scores_from_scratch(grown, tmp_path / "whole", hits=6))


def test_new_queries_need_a_full_scoring(grown, tmp_path, streamed):
    grown.source_add("test", write_jsonl(tmp_path / "t.jsonl", qa_rows(1, start=900)), stage="query")
    grown.ingest(["base"], ["test"], ["chatml"], sketcher="small")
    report = grown.attribute(["base"], hits=5, **ATTRIBUTION)
    assert set(report["status"]) == {"scored"}
    assert set(report["n_queries"]) == {5}
    assert n_read(streamed) == 45
    assert_scores_close(score_tables(grown), scores_from_scratch(grown, tmp_path / "whole"))


@pytest.mark.parametrize(("method", "reads"), [("tracin", 45), ("hybrid", 45), ("bm25", 0)])
def test_global_methods_need_a_full_scoring(grown, streamed, method, reads):
    for source in ("songs", "finetune"):
        report = grown.attribute(["base"], sources=[source], method=method, hits=5, **ATTRIBUTION)
        assert set(report["status"]) == {"scored"}
    streamed.clear()
    assert set(grown.attribute(["base"], method=method, hits=5, **ATTRIBUTION)["status"]) == {"scored"}
    assert n_read(streamed) == reads
    assert set(grown.attribute(["base"], method=method, hits=5, **ATTRIBUTION)["status"]) == {"current"}


def test_scoring_by_source_keeps_other_groups(grown, streamed):
    report = grown.attribute(["base"], sources=["finetune"], hits=5, **ATTRIBUTION)
    assert report.select("source", "status", "n_samples").rows() == [("finetune", "scored", 13)]
    assert n_read(streamed) == 7
    assert set(score_tables(grown)[1].filter(source="songs", variant="raw")["n"]) == {5}


def test_previous_run_is_superseded_and_its_rows_deleted(grown):
    grown.attribute(["base"], hits=5, **ATTRIBUTION)
    current = grown.sql("select score_run from score_runs where status = 'done'")["score_run"].to_list()
    for name in ("influence", "source_influence"):
        runs = grown._db.vectors.table(name).to_arrow().column("score_run").to_pylist()
        assert set(runs) == set(current)
    assert set(grown.sql("select status from score_runs")["status"]) == {"done", "superseded"}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_failed_scoring_keeps_the_previous_run_and_is_repeated(grown, tmp_path, monkeypatch, after):
    before = score_tables(grown)
    real, calls = module._append, []

    def breaks(*args):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_append", breaks)
        with pytest.raises(KeyboardInterrupt):
            grown.attribute(["base"], hits=5, memory=4096, **ATTRIBUTION)
    assert_scores_close(score_tables(grown), before)
    assert grown.sql("select count(*) from score_runs where status = 'interrupted'").item() == 2
    grown.attribute(["base"], hits=5, **ATTRIBUTION)
    assert_scores_close(score_tables(grown), scores_from_scratch(grown, tmp_path / "whole"))


KILLED = """
import os, sys
from lark_store import Store
from lark_store.errors import StoreBusyError
from lark_store.query.answers import attribute as module
real, calls = module._append, []
def append(*args):
    real(*args)
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), 9)
module._append = append
Store.open(sys.argv[1]).attribute(["base"], queries="test", sketcher="small", hits=5, memory=4096)
"""


def test_killed_scoring_keeps_the_previous_run_and_is_repeated(grown, tmp_path):
    before = score_tables(grown)
    assert run_forked(KILLED, store_label(grown.path)) == -9
    assert_scores_close(score_tables(grown), before)
    assert grown.sql("select count(*) from score_runs where status = 'running'").item() == 2
    grown.attribute(["base"], hits=5, **ATTRIBUTION)
    assert_scores_close(score_tables(grown), scores_from_scratch(grown, tmp_path / "whole"))
    assert grown.sql("select count(*) from score_runs where status = 'running'").item() == 0


def test_empty_group_grows(store, tmp_path):
    store.variant_add("short", template="chatml", max_length=30)
    odd = [{"id": "long", "prompt": "why?", "response": "because " * 200}]
    store.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", odd), stage="finetune")
    store.ingest(["base"], ["odd"], ["short"], sketcher="small")
    store.ingest(["base"], ["songs", "test"], ["chatml"], sketcher="small")
    store.attribute(["base"], hits=5, **ATTRIBUTION)
    good = [{"id": f"ok-{i}", "prompt": "a", "response": f"b{i}"} for i in range(3)]
    store.source_add("odd", write_jsonl(tmp_path / "ok.jsonl", good), stage="finetune")
    store.ingest(["base"], ["odd"], ["short"], sketcher="small")
    report = store.attribute(["base"], hits=5, **ATTRIBUTION)
    assert report.select("source", "status", "n_samples").rows() == [("songs", "current", 5), ("odd", "scored", 3)]


def test_last_attempt_scores_from_nothing(grown_path, monkeypatch):
    attempts = []

    def unsettled(self, question, hits, seen, *, from_nothing):  # noqa: ARG001
        attempts.append(from_nothing)
        return [SimpleNamespace(run=None)]

    monkeypatch.setattr(module._Scorer, "_settled", unsettled)
    with Store.open(grown_path) as store, pytest.raises(StoreBusyError, match="replaced the scores of the same groups"):
        store.attribute(["base"], **ATTRIBUTION)
    assert set(attempts[:-1]) == {False}
    assert attempts[-1] is True
