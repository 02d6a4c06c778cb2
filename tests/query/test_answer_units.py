"""Unit tests of groups and of the answers computed over them, without a model or a store."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from helpers.groups import group, job

from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.answers import attribute
from lark_store.query.answers.attribute import _append, _coded, _extra_recipe, _row, _Scorer, _tally, still_current
from lark_store.query.answers.ft_pt import _compared, _no_pair
from lark_store.query.answers.recheck import _figures, _original
from lark_store.query.answers.score_runs import ReplacedError
from lark_store.query.methods import Method
from lark_store.query.select.resolve import Question, Term, _comparable, _query_groups
from lark_store.specs import AttributeSpec, SearchSpec
from lark_store.stats.running_top_k import Tally


def asked_as(groups, queries=None, variant=None):
    return [(g.source.name, g.variant.name) for g in _query_groups(groups, queries, variant)]


def test_query_variant_defaults_to_chatml():
    raw, chat, odd = (group("test", name, stage="query") for name in ("raw", "chatml", "odd"))
    other, rest = group("more", "raw", stage="query"), group("songs", "raw")
    assert asked_as([rest, raw]) == [("test", "raw")]
    assert asked_as([raw, chat, other]) == [("test", "chatml"), ("more", "raw")]
    assert asked_as([raw, chat, other], "more") == [("more", "raw")]
    assert asked_as([raw, chat, other], None, "raw") == [("test", "raw"), ("more", "raw")]
    assert asked_as([raw, chat, other], None, "chatml") == [("test", "chatml")]
    assert asked_as([rest]) == []
    with pytest.raises(InputError, match="the queries are sketched as `raw`, `odd`"):
        asked_as([raw, odd])


def test_only_sketches_of_one_map_are_compared():
    queries, same, other = group("q", "raw"), group("a", "raw"), group("b", "raw", fingerprint="g", checkpoint="d")
    assert _comparable(queries, [other, same]) == [same]
    with pytest.raises(NothingToScoreError, match="the sketches at `d` can't be compared with the queries' at `c`"):
        _comparable(queries, [other])


def test_group_filter_names_every_key():
    assert group("a_b", "raw", runs=(3, 4)).filter == (
        "checkpoint = 'c' AND source = 'a_b' AND variant = 'raw' AND ingest_run IN (3, 4)"
    )


def test_run_is_extended_only_by_added_sketches():
    before = SimpleNamespace(recipe=job(1, 2).recipe)
    assert before.recipe == {"hits": 5, "ingest_runs": [1, 2], "query_ingest_runs": [9]}
    assert job(1, 2, 3).extends(before)
    assert not job(1, 2).extends(before)  # nothing was added
    assert not job(1).extends(before)  # something went
    assert not job(1, 3).extends(before)
    assert not job(1, 2, 3, hits=6).extends(before)
    assert not job(1, 2, 3, corpus="x").extends(before)
    assert not job(1, 2, 3, method="whitened").extends(SimpleNamespace(recipe=job(1, 2, method="whitened").recipe))
    extended = job(1, 2, 3)
    assert extended.new_group.runs == (1, 2, 3)
    extended.before = before
    assert extended.new_group.runs == (3,)


def test_run_is_extended_unless_its_rows_were_gone(monkeypatch):
    monkeypatch.setattr(attribute, "find_run", lambda _db, job: setattr(job, "before", SimpleNamespace(id=7)))
    monkeypatch.setattr(attribute, "drop_empty", lambda *_: None)
    monkeypatch.setattr(_Scorer, "_score", lambda *_: None)
    scorer, question = _Scorer(None, SimpleNamespace(memory=0), None), job(1).question

    def extended(*, from_nothing):
        (settled,) = scorer._settled(question, 5, frozenset(), from_nothing=from_nothing)
        return settled.before is not None

    assert extended(from_nothing=False)
    assert not extended(from_nothing=True)
    scorer.unusable.add(8)
    assert extended(from_nothing=False)
    scorer.unusable.add(7)
    assert not extended(from_nothing=False)


def test_recipe_names_what_a_method_reads_besides(monkeypatch):
    monkeypatch.setattr(attribute, "corpus_sha256", lambda _: "x")
    monkeypatch.setattr(attribute, "Search", lambda *_: SimpleNamespace(rows=range(10)))

    def inputs(method, n_terms=1):
        return _extra_recipe(None, Question([Term(None, [], weight=1.0)] * n_terms, Method.of(method)), 32 * 9 * 2)

    assert (inputs("cosine"), inputs("bm25"), inputs("hybrid")) == ({}, {"corpus": "x"}, {"corpus": "x"})
    assert inputs("centred") == {"searched": 10}
    assert inputs("whitened") == {"searched": 10, "fitted": 4}
    assert inputs("whitened-sum", 2) == {"searched": 10, "fitted": 3}  # each has half the memory


@pytest.mark.parametrize("corpus", ["a", "z"])
def test_scores_by_an_index_of_other_samples_are_not_kept(monkeypatch, corpus):
    monkeypatch.setattr(attribute, "query_ids", lambda *_: [])
    monkeypatch.setattr(attribute, "Search", lambda *_, **__: SimpleNamespace(lexical=True))
    monkeypatch.setattr(attribute, "corpus_sha256", lambda _: corpus)
    one = job(1, method="bm25", corpus="m")
    with pytest.raises(ReplacedError):
        attribute._write(None, one.question, [one], SimpleNamespace(device="cpu", memory=0), None)


@pytest.mark.parametrize(("n", "scored", "status"), [(0, {1}, "empty"), (1, {1}, "scored"), (1, {2}, "current")])
def test_report_has_a_row_for_each_group(n, scored, status):
    one = job(1)
    one.run = SimpleNamespace(id=1, method="cosine", n_queries=3, n_samples=n)
    assert _row(one, scored) == ("c", "q", "a", "raw", "cosine", 3, n, status, 1, "s · cosine")


def test_run_is_current_while_its_recipe_is():
    groups = [group("a", "raw", runs=(1,)), group("b", "raw", runs=(2,)), group("b", "chatml", runs=(3,))]
    question = Question([Term(group("q", "raw", runs=(9,)), groups, weight=1.0)], Method())
    recipe = {"hits": 5, "ingest_runs": [2], "query_ingest_runs": [9]}
    run = SimpleNamespace(source_id="b", variant_id="raw", recipe=recipe)
    assert still_current(None, question, run)
    run.recipe = recipe | {"ingest_runs": [1]}
    assert not still_current(None, question, run)
    run.recipe, run.source_id = recipe, "c"
    assert not still_current(None, question, run)


def test_at_least_one_hit_is_kept():
    assert AttributeSpec(checkpoints=["base"], hits=1).hits == 1
    with pytest.raises(InputError, match="must be at least 1, not 0"):
        AttributeSpec(checkpoints=["base"], hits=0)


def test_empty_group_does_not_block_others():
    written = {}
    db = SimpleNamespace(
        vectors=SimpleNamespace(table=str, append=lambda name, rows: written.update({name: rows}) or 7)
    )
    jobs = [job(1), job(2), job(3)]
    for number, item in enumerate(jobs):
        item.run = SimpleNamespace(id=number, n_queries=0, n_samples=0, lance_version=None)
    tallies = [Tally(2, 5) for _ in jobs]
    for tally in tallies[1:]:
        tally.take(np.array([1, 0]), np.float32([[0.5, 0.25], [0.25, 0.5]]))
    _append(db, jobs, [np.array(["a", "b"], dtype=object)] * 3, ["q0", "q1"], tallies)
    assert [(item.run.n_queries, item.run.n_samples, item.run.lance_version) for item in jobs] == [
        (0, 0, None),
        (2, 2, 7),
        (2, 2, 7),
    ]
    best = pl.from_arrow(written["source_influence"])
    assert best.select("score_run", "query_id", "argmax", "max", "n").rows() == [
        (run, *row, 0.5, 2) for run in (1, 2) for row in (("q0", "b"), ("q1", "a"))
    ]
    hits = pl.from_arrow(written["influence"]).filter(score_run=1)
    assert hits.select("query_id", "rank", "sample_id", "score").rows() == [
        ("q0", 1, "b", 0.5),
        ("q0", 2, "a", 0.25),
        ("q1", 1, "a", 0.5),
        ("q1", 2, "b", 0.25),
    ]


def test_rows_of_a_group_without_a_job_are_in_none():
    groups = [group("a", "raw"), group("b", "raw"), group("b", "chatml")]
    jobs = [SimpleNamespace(group=groups[number], before=None) for number in (2, 0)]
    frame = pl.DataFrame({"group": [0, 1, 2, 0, 1], "sample_id": ["z", "b", "c", "a", "d"]})
    coded = _coded(None, SimpleNamespace(rows=SimpleNamespace(frame=frame)), groups, jobs)
    assert [number if number >= 0 else None for number in coded.job_N] == [1, None, 0, 1, None]
    assert [names.tolist() for names in coded.names] == [["c"], ["a", "z"]]
    assert coded.code_N[[0, 2, 3]].tolist() == [1, 0, 0]


def test_groups_of_two_stages_are_compared_query_by_query():
    stages = ("finetune", "query", "pretrain", "finetune", "pretrain")
    groups = [group(f"s{number}", "raw", stage=stage) for number, stage in enumerate(stages)]
    question = Question([Term(group("q", "raw", checkpoint="d"), groups, weight=1.0)], Method())
    inf = -np.inf
    phi = [("q0", np.float32([0.5, 9, 0.25, 0.25, 0.25])), ("q1", np.float32([-1, 9, 0, inf, -0.5]))]
    rows = _compared(question, [*phi, ("q2", np.float32([1, 9, inf, 2, inf]))])
    left, right = [("s0", "raw", "s2", "raw"), ("s0", "raw", "s4", "raw")], [("s3", "raw", "s2", "raw")]
    expected = [
        ("c", "q", "q0", *left[0], 0.5, 0.25, 2.0, "finetune"),
        ("c", "q", "q0", *left[1], 0.5, 0.25, 2.0, "finetune"),
        ("c", "q", "q0", *right[0], 0.25, 0.25, 1.0, "tie"),
        ("c", "q", "q0", "s3", "raw", "s4", "raw", 0.25, 0.25, 1.0, "tie"),
        ("c", "q", "q1", *left[0], -1.0, 0.0, None, "pretrain"),
        ("c", "q", "q1", *left[1], -1.0, -0.5, None, "pretrain"),
    ]
    assert rows == [(*row, "d", "s · cosine") for row in expected]
    spec = SearchSpec(checkpoints=["a", "b", "c"])
    for questions in ([], [question]):  # no queries at all checkpoints; all samples of one stage failed
        error = _no_pair(None, spec, questions)
        assert error.fact == "there are no fine-tuning and pretraining sketches to compare at `c`"
        assert error.hint == "see the reasons in the SQL view `failures`"


def test_rows_added_since_a_run_are_not_rechecked():
    def asked(*runs, query_runs=(9,)):
        groups = [group("a", "chatml", runs=(1, 2)), group("a", "raw", runs=runs)]
        return Question([Term(group("q", "raw", runs=query_runs), groups, weight=1.0)], Method())

    run = SimpleNamespace(recipe={"ingest_runs": [1, 2], "query_ingest_runs": [9]}, variant_id="raw")
    for question in (asked(1, 2), asked(1, 2, 3), asked(1, 2, query_runs=(8, 9))):
        limited = _original(question, run)
        assert [(g.variant.name, g.runs) for g in limited.groups] == [("raw", (1, 2))]
        assert limited.queries.runs == (9,)
    for question in (asked(1, 3), asked(2), asked(1, 2, query_runs=(8,))):
        assert _original(question, run) is None  # they were replaced


def test_recomputed_figures_stand_beside_the_stored_ones():
    hits = pl.DataFrame({"sample_id": ["b", "gone", "a"], "score": [0.5, 0.25, 0.125], "rank": [1, 4, 0]})
    sums = pl.DataFrame({"max": [0.5], "mean": [0.1], "std": [0.2]})
    scores = np.float32([-0.25, 0.5, 0.25])
    figures = list(_figures(np.array(["a", "b", "c"]), scores, hits=hits, sums=sums))
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert figures == [
        ("rank 1", 0.5, 0.5),  # of the sample, and of the rank
        ("rank 1", 0.5, 0.5),
        ("rank 4", 0.25, nan),
        ("rank 4", 0.25, nan),  # there are three
        ("rank 0", 0.125, -0.25),
        ("rank 0", 0.125, nan),
        ("max", 0.5, 0.5),
        ("mean", 0.1, pytest.approx(1 / 6)),
        ("std", 0.2, pytest.approx(np.std([-0.25, 0.5, 0.25]))),
    ]
    last = pl.DataFrame({"sample_id": ["a"], "score": [0.0], "rank": [3]})
    assert [figure[2] for figure in _figures(np.array(["a", "b", "c"]), scores, hits=last, sums=sums)][:2] == [
        -0.25,
        -0.25,
    ]


class Stored:
    """The tables of a run's results, with the rows of its hits and its sums."""

    def __init__(self, hits, sums):
        self.frames = {"influence": hits, "source_influence": sums}

    def read(self, table, columns, condition):  # noqa: ARG002
        return self.frames[table].select(columns)


def earlier(n_samples, hits, *, ids=("q0", "q1"), n=None):
    """Return a database with a run over `n_samples`, whose two queries have so many hits, and the run."""
    rows = [(query, f"s{rank}", 0.5 / rank, rank) for query in ids for rank in range(1, hits + 1)]
    sums = [(query, 0.25, 0.0, n or n_samples) for query in ids]
    stored = Stored(
        pl.DataFrame(rows, schema=["query_id", "sample_id", "score", "rank"], orient="row"),
        pl.DataFrame(sums, schema=["query_id", "mean", "std", "n"], orient="row"),
    )
    run = SimpleNamespace(id=1, n_queries=2, n_samples=n_samples, recipe={"hits": 2})
    return SimpleNamespace(vectors=stored), run


@pytest.mark.parametrize(
    ("n_samples", "hits", "options", "is_whole"),
    [
        (1, 1, {}, True),
        (2, 2, {}, True),
        (3, 2, {}, True),
        (3, 1, {}, False),
        (3, 3, {}, False),
        (1, 2, {}, False),
        (2, 2, {"n": 1}, False),
        (2, 2, {"n": 3}, False),
        (2, 2, {"ids": ("q0", "q2")}, False),
    ],
)
def test_tally_resumes_only_from_a_whole_run(n_samples, hits, options, is_whole):
    db, run = earlier(n_samples, hits, **options)
    one = SimpleNamespace(hits=2, before=run)
    names = np.array(["s1", "s2", "s3"], dtype=object)
    if not is_whole:
        with pytest.raises(ReplacedError):
            _tally(db, one, names, ["q0", "q1"])
        return
    result = _tally(db, one, names, ["q0", "q1"]).result()
    assert (result.n, result.mean_Q.tolist(), result.top_codes.tolist()) == (n_samples, [0.25] * 2, [[0, 1][:hits]] * 2)


@pytest.mark.parametrize("before", [None, SimpleNamespace(n_samples=0)])
def test_tally_begins_without_an_earlier_sample(before):
    assert _tally(None, SimpleNamespace(hits=2, before=before), np.array([]), ["q0"]).result() is None
