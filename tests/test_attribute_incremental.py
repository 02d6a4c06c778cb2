"""`attribute` after samples were added: only the new sketches are read, and the tables are those of a whole scoring."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from conftest import copy_store, named, qa_rows, write_jsonl
from test_query import as_dict, brute_force

from lark_store import Store
from lark_store.query import attribute as module
from lark_store.query.rows import Rows

HOW = {"queries": "test", "sketcher": "small"}
HITS = ["query_id", "source", "variant", "rank", "sample_id", "score"]
SUMS = ["query_id", "source", "variant", "argmax", "n", "max", "mean", "std"]
GROWN = [("finetune", "chatml", "scored", 13), ("songs", "raw", "scored", 17)]


@pytest.fixture(scope="module")
def grown_path(scored_path, tmp_path_factory):
    """The scored store (scored also with 5 hits, by dot), then with new samples in two of its groups."""
    root = tmp_path_factory.mktemp("grown")
    with Store.open(copy_store(scored_path, root / "lark.store")) as made:
        for method in ("cosine", "dot"):
            made.attribute(["base"], method=method, hits=5, **HOW)
        for n in (7, 5):  # two runs of the one source
            rows = [{"id": f"new-{n}-{i}", "text": f"Number {i} of {n} about the night."} for i in range(n)]
            made.source_add("songs", write_jsonl(root / "songs.jsonl", rows), stage="pretrain")
            made.ingest(["base"], ["songs"], ["raw"], sketcher="small")
        made.source_add("finetune", write_jsonl(root / "f.jsonl", qa_rows(7, start=500)), stage="finetune")
        made.ingest(["base"], ["finetune"], ["chatml"], sketcher="small")
    return root / "lark.store"


@pytest.fixture
def grown(grown_path, tmp_path):
    with Store.open(copy_store(grown_path, tmp_path / "grown.store")) as opened:
        yield opened


@pytest.fixture
def streamed(monkeypatch):
    """The ids of the samples whose sketches are read, pass by pass."""
    passes = []
    stream = Rows.stream

    def counted(self, *args, **kwargs):
        passes.append([])
        for numbers, column in stream(self, *args, **kwargs):
            passes[-1] += self.frame["sample_id"][numbers].to_list()
            yield numbers, column

    monkeypatch.setattr(Rows, "stream", counted)
    return passes


def tables(store, method="cosine"):
    """Both tables at `base` as they can be compared: names alone, and numbers."""
    hits, sums = (
        store.sql(
            f"select {', '.join(names)} from {view} where checkpoint = 'base' and method = ? order by all", [method]
        )
        for view, names in (("influence", HITS), ("source_influence", SUMS))
    )
    return hits, sums


def assert_same(made, expected):
    for mine, theirs, numbers in zip(made, expected, (["score"], ["max", "mean", "std"]), strict=True):
        assert mine.drop(numbers).equals(theirs.drop(numbers))
        for name in numbers:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-6)


def from_scratch(store, path, method="cosine", hits=5):
    """The tables that a whole scoring of the same sketches gives: no run is there that it could extend."""
    from sqlalchemy import delete

    from lark_store.schema.catalog import ScoreRun

    with Store.open(copy_store(store.path, path)) as other:
        with other._db.session() as session:
            session.execute(delete(ScoreRun))
        for name in ("influence", "source_influence"):
            other._db.vectors.table(name).delete("true")
        assert set(other.attribute(["base"], method=method, hits=hits, **HOW)["status"]) == {"scored"}
        return tables(other, method)


@pytest.mark.parametrize("queries_at_a_time", [4, 3, 1])
@pytest.mark.parametrize("method", ["cosine", "dot"])
def test_only_new_sketches_are_read_and_the_answer_is_that_of_a_whole_scoring(
    grown, tmp_path, streamed, method, queries_at_a_time
):
    memory = 4 * 1024 * queries_at_a_time
    report = grown.attribute(["base"], method=method, hits=5, memory=memory, **HOW)
    again = report.filter(status="scored").select("source", "variant", "status", "n_samples").sort("source").rows()
    assert again == GROWN
    assert report["n_queries"].to_list() == [4] * 5
    new = {f"q{i}" for i in range(500, 507)} | {f"new-{n}-{i}" for n in (7, 5) for i in range(n)}
    assert len(streamed) == -(-4 // queries_at_a_time)
    for ids in streamed:
        assert len(ids) == len(new) == 19
        assert set(ids) == new
    made = tables(grown, method)
    assert_same(made, from_scratch(grown, tmp_path / "whole", method))
    expected = brute_force(grown, "q102", dot=method == "dot")
    for (source, variant), group in made[0].filter(query_id="q102").group_by("source", "variant"):
        scores = {key: score for key, score in expected.items() if key[:2] == (source, variant)}
        assert list(as_dict(group.sort("rank"))) == sorted(scores, key=lambda key: -scores[key])[:5]
        row = made[1].filter(query_id="q102", source=source, variant=variant).row(0, named=True)
        values = list(scores.values())
        assert (row["n"], row["argmax"]) == (len(values), max(scores, key=lambda key: scores[key])[2])
        figures = [max(values), np.mean(values), np.std(values)]
        assert [row["max"], row["mean"], row["std"]] == pytest.approx(figures, rel=1e-3, abs=1e-6)
    streamed.clear()
    assert set(grown.attribute(["base"], method=method, hits=5, **HOW)["status"]) == {"current"}
    assert streamed == []


def n_read(streamed):
    return sum(map(len, streamed))


def test_with_more_hits_all_is_read(grown, tmp_path, streamed):
    assert set(grown.attribute(["base"], hits=6, **HOW)["status"]) == {"scored"}
    assert n_read(streamed) == 45
    assert_same(tables(grown), from_scratch(grown, tmp_path / "whole", hits=6))


def test_with_new_queries_all_is_read(grown, tmp_path, streamed):
    grown.source_add("test", write_jsonl(tmp_path / "t.jsonl", qa_rows(1, start=900)), stage="query")
    grown.ingest(["base"], ["test"], ["chatml"], sketcher="small")
    report = grown.attribute(["base"], hits=5, **HOW)
    assert set(report["status"]) == {"scored"}
    assert set(report["n_queries"]) == {5}
    assert n_read(streamed) == 45
    assert_same(tables(grown), from_scratch(grown, tmp_path / "whole"))


@pytest.mark.parametrize(("method", "reads"), [("tracin", 45), ("hybrid", 45), ("bm25", 0)])
def test_by_a_method_that_looks_at_all_rows_all_is_read(grown, streamed, method, reads):
    for source in ("songs", "finetune"):
        report = grown.attribute(["base"], sources=[source], method=method, hits=5, **HOW)
        assert set(report["status"]) == {"scored"}
    streamed.clear()
    assert set(grown.attribute(["base"], method=method, hits=5, **HOW)["status"]) == {"scored"}
    assert n_read(streamed) == reads
    assert set(grown.attribute(["base"], method=method, hits=5, **HOW)["status"]) == {"current"}


def test_groups_are_chosen_by_source_and_the_others_stay(grown, streamed):
    report = grown.attribute(["base"], sources=["finetune"], hits=5, **HOW)
    assert report.select("source", "status", "n_samples").rows() == [("finetune", "scored", 13)]
    assert n_read(streamed) == 7
    assert set(tables(grown)[1].filter(source="songs", variant="raw")["n"]) == {5}


def test_the_run_before_is_superseded_and_its_rows_are_gone(grown):
    grown.attribute(["base"], hits=5, **HOW)
    current = grown.sql("select score_run from score_runs where status = 'done'")["score_run"].to_list()
    for name in ("influence", "source_influence"):
        runs = grown._db.vectors.table(name).to_arrow().column("score_run").to_pylist()
        assert set(runs) == set(current)
    assert set(grown.sql("select status from score_runs")["status"]) == {"done", "superseded"}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_scoring_that_breaks_off_shows_the_run_before_and_is_done_again(grown, tmp_path, monkeypatch, after):
    before = tables(grown)
    real, calls = module._append, []

    def breaks(*args):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_append", breaks)
        with pytest.raises(KeyboardInterrupt):
            grown.attribute(["base"], hits=5, memory=4096, **HOW)
    assert_same(tables(grown), before)
    assert grown.sql("select count(*) from score_runs where status = 'interrupted'").item() == 2
    grown.attribute(["base"], hits=5, **HOW)
    assert_same(tables(grown), from_scratch(grown, tmp_path / "whole"))


KILLED = """
import os, sys
from lark_store import Store
from lark_store.query import attribute as module
real, calls = module._append, []
def append(*args):
    real(*args)
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), 9)
module._append = append
Store.open(sys.argv[1]).attribute(["base"], queries="test", sketcher="small", hits=5, memory=4096)
"""


def test_a_scoring_that_is_killed_shows_the_run_before_and_is_done_again(grown, tmp_path):
    before = tables(grown)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, named(grown.path)], check=False, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    assert_same(tables(grown), before)
    assert grown.sql("select count(*) from score_runs where status = 'running'").item() == 2
    grown.attribute(["base"], hits=5, **HOW)
    assert_same(tables(grown), from_scratch(grown, tmp_path / "whole"))
    assert grown.sql("select count(*) from score_runs where status = 'running'").item() == 0


def test_a_group_that_had_no_sample_grows(store, tmp_path):
    store.variant_add("short", template="chatml", max_length=30)
    odd = [{"id": "long", "prompt": "why?", "response": "because " * 200}]
    store.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", odd), stage="finetune")
    store.ingest(["base"], ["odd"], ["short"], sketcher="small")
    store.ingest(["base"], ["songs", "test"], ["chatml"], sketcher="small")
    store.attribute(["base"], hits=5, **HOW)
    good = [{"id": f"ok-{i}", "prompt": "a", "response": f"b{i}"} for i in range(3)]
    store.source_add("odd", write_jsonl(tmp_path / "ok.jsonl", good), stage="finetune")
    store.ingest(["base"], ["odd"], ["short"], sketcher="small")
    report = store.attribute(["base"], hits=5, **HOW)
    assert report.select("source", "status", "n_samples").rows() == [("songs", "current", 5), ("odd", "scored", 3)]
