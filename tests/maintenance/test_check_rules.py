"""Unit tests of the checks, without a model or a store."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from lark_store.maintenance.check.frozen_store import hashes
from lark_store.maintenance.check.rows import _portions, _unread_rows, _wrong_groups, _wrong_values
from lark_store.maintenance.check.sketches import (
    _FAULTS,
    _check_vectors,
    _codes_agree,
    _fault,
    check_ingest_runs,
)
from lark_store.schema.sign_codes import codes_of
from lark_store.schema.table_schemas import sketch_table


def scored_rows(n_queries=2, hits=3):
    """Valid rows of a score run of 4 samples."""
    tops = pl.DataFrame(
        [
            {
                "query_id": f"q{q}",
                "rank": rank,
                "score": np.float32(1 - rank / 10),
                "sample_id": f"s{rank}",
                "source": "a",
            }
            for q in range(n_queries)
            for rank in range(1, hits + 1)
        ]
    )
    best = tops.filter(rank=1).select("query_id", max="score", argmax="sample_id", mean=0.1, std=0.2, n=4)
    return SimpleNamespace(n_queries=n_queries, n_samples=4, recipe={"hits": hits}), tops, best


def ranked(query, rank):
    return (pl.col("query_id") == query) & (pl.col("rank") == rank)


def test_scores_matching_their_run_have_no_fault():
    for n_queries, hits in ((2, 3), (1, 1), (3, 4)):
        assert list(_wrong_values(*scored_rows(n_queries, hits), None)) == []
    run, tops, sums = scored_rows(2, 4)
    run.recipe = {"hits": 100}  # there are 4 samples
    assert list(_wrong_values(run, tops, sums, None)) == []
    run.n_samples, run.n_queries = 0, 0
    assert list(_wrong_values(run, tops.clear(), sums.clear(), None)) == []
    tops = tops.with_columns(score=pl.lit(0.9, pl.Float32))  # ties are in order
    assert list(_wrong_values(*scored_rows(2, 4)[:1], tops, sums, None)) == []


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda t, s: (t, s.head(1)), "source_influence has 1 rows for 2 queries"),
        (lambda t, s: (t, pl.concat([s, s.head(1)])), "source_influence has 3 rows for 2 queries"),
        (lambda t, s: (t, pl.concat([s.head(1), s.head(1)])), "source_influence has 2 rows for 2 queries"),
        (lambda t, s: (t.filter(~ranked("q1", 3)), s), "influence lacks ranks 1 to 3 for some of 2 queries"),
        (lambda t, s: (t.filter(query_id="q0"), s), "influence lacks ranks 1 to 3 for some of 2 queries"),
        (lambda t, s: (t.with_columns(rank=pl.col("rank") + 1), s), "influence lacks ranks 1 to 3"),
        (lambda t, s: (t, s.with_columns(n=5)), "source_influence does not count 4 samples"),
        (lambda t, s: (t, s.with_columns(n=pl.Series([4, 3]))), "source_influence does not count 4 samples"),
        (lambda t, s: (t, s.with_columns(std=float("nan"))), "scores are not finite"),
        (lambda t, s: (t, s.with_columns(mean=float("inf"))), "scores are not finite"),
        (lambda t, s: (t, s.with_columns(max=pl.lit(0.95, pl.Float32))), "the maximum is not the score of rank 1"),
        (lambda t, s: (t, s.with_columns(argmax=pl.lit("s2"))), "the maximum is not the score of rank 1"),
        (
            lambda t, s: (
                t.with_columns(score=pl.when(ranked("q1", 3)).then(0.85).otherwise("score").cast(pl.Float32)),
                s,
            ),
            "scores do not decrease with rank",
        ),
    ],
)
def test_scores_differing_from_their_run_are_reported(change, fact):
    run, tops, sums = scored_rows()
    result = list(_wrong_values(run, *change(tops, sums), None))
    assert [item for item in result if item.startswith(fact)], result


def test_hits_without_samples_are_reported():
    run, tops, sums = scored_rows()
    known = np.unique(hashes(tops, ["source", "sample_id"]))
    assert list(_wrong_values(run, tops, sums, known)) == []
    assert list(_wrong_values(run, tops, sums, known[1:])) == ["some of its hits are not in the store"]


def test_score_runs_are_checked_in_portions(monkeypatch):
    monkeypatch.setattr("lark_store.maintenance.check.rows._ROWS_PER_PORTION", 10)
    runs = [SimpleNamespace(id=i) for i in range(7)]
    counts = {0: 4, 1: 6, 2: 1, 3: 11, 5: 10}
    assert [[run.id for run in subset] for subset in _portions(runs, counts)] == [[0, 1], [2], [3], [4, 5, 6]]
    assert list(_portions([], counts)) == []


def test_codes_agree_up_to_a_few_bits():
    vectors = np.random.default_rng(0).normal(size=(3, 400)).astype(np.float32)
    stored = codes_of(vectors)
    stored[1, 0] ^= 0b11111111  # 8 of 400 bits: 2%
    stored[2, :2] ^= 0b11111
    column = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1])
    assert _codes_agree(column, vectors).tolist() == [True, True, False]


SKETCH = {
    "checkpoint": "c",
    "source": "s",
    "variant": "v",
    "sample_id": "a/b",
    "row_key": "c/s/v/a/b",
    "grad_norm": 0.5,
}
SKETCH |= {"loss": 1.0, "of_checkpoint": "c", "of_source": "s", "of_variant": "v"}
SKETCH |= {"here": True, "gone": False, "busy": False, "imported": False}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"grad_norm": 1e-30}, None),
        ({"here": None}, "orphan rows"),
        ({"gone": True}, "unfinished removal"),
        ({"here": False}, "fingerprint"),
        ({"of_checkpoint": "d"}, "names"),
        ({"of_source": "d"}, "names"),
        ({"of_variant": "d"}, "names"),
        ({"row_key": "c/s/v/a"}, "row key"),
        ({"grad_norm": 0.0}, "norm"),
        ({"grad_norm": -1.0}, "norm"),
        ({"grad_norm": float("inf")}, "norm"),
        ({"grad_norm": float("nan")}, "norm"),
        ({"loss": float("nan")}, "nan"),
        ({"loss": float("nan"), "imported": True}, None),
        ({"known": False}, "sample"),
        ({"gone": True, "loss": float("nan"), "known": False}, "unfinished removal"),  # the gravest
        ({"row_key": "x", "grad_norm": 0.0}, "row key"),
        ({"grad_norm": 0.0, "known": False, "busy": True}, None),  # it is being written
    ],
)
def test_gravest_fault_of_a_sketch_is_reported(change, fault):
    row = SKETCH | {"known": True} | change
    kinds = {"here": pl.Boolean, "loss": pl.Float32, "grad_norm": pl.Float32}
    frame = pl.DataFrame([SKETCH | {"known": True}, row], schema_overrides=kinds)
    result = frame.select(_fault(frame["known"])).to_series().to_list()
    assert result[0] == -1
    assert (None if result[1] < 0 else _FAULTS[result[1]][0]) == fault


class Table:
    """A sketch table of one batch."""

    def __init__(self, vectors, codes=None):
        kind = pa.list_(pa.from_numpy_dtype(vectors.dtype), vectors.shape[1])
        columns = {
            "row_key": pa.array([f"row-{i}" for i in range(len(vectors))]),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=kind),
            "_rowid": pa.array(range(100, 100 + len(vectors)), pa.uint64()),
        }
        if codes is not None:
            columns["code"] = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1])
        self.batch = pa.record_batch(columns)
        self.schema = self.batch.schema

    def to_lance(self):
        return self

    def scanner(self, **_):
        return SimpleNamespace(to_batches=lambda: [self.batch])


def faults_of(table, *, deep=True):
    frozen = SimpleNamespace(vectors=SimpleNamespace(table=lambda _: table), deep=deep)
    results = [(f.severity, f.what, f.n, re.findall(r"row-\d+", f.detail)) for f in _check_vectors(frozen, "t")]
    assert results.pop(0) == ("note", "checksum", table.batch.num_rows, [])  # these rows have none
    return results


@pytest.mark.parametrize(("dtype", "little", "much"), [(np.float16, 1.0005, 1.002), (np.float32, 1.00005, 1.0002)])
def test_vectors_have_norm_root_k_and_finite_numbers(dtype, little, much):
    vectors = np.ones((6, 64)) * np.array([1, little, much, 1 / much, 1, 1])[:, None]
    vectors = vectors.astype(np.float64)
    if dtype is np.float16:  # its steps near 1 are too wide: change some bins alone
        vectors = np.ones((6, 64))
        for row, factor in ((1, little), (2, much), (3, 1 / much)):
            vectors[row, :16] = np.sqrt(1 + 4 * (factor**2 - 1))
    vectors[4, 3], vectors[5, 0] = np.nan, np.inf
    result = faults_of(Table(vectors.astype(dtype)))
    assert result == [("error", "nan", 2, ["row-4", "row-5"]), ("error", "norm", 2, ["row-2", "row-3"])]


def test_codes_are_sampled_and_all_compared_with_deep():
    vectors = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) / 8
    codes = codes_of(vectors)
    assert faults_of(Table(vectors, codes)) == []
    codes[[1, 5]] = ~codes[[1, 5]]
    assert faults_of(Table(vectors, codes)) == [("warning", "code", 2, ["row-1", "row-5"])]
    assert faults_of(Table(vectors, codes), deep=False) == [("warning", "code", 1, ["row-1"])]
    assert faults_of(Table(vectors)) == []  # an older table has none


def ingest_run(number, **changed):
    facts = {"id": number, "status": "done", "started_at": 10, "checkpoint_id": 1, "source_id": 1, "variant_id": 1}
    return SimpleNamespace(**facts | changed)


def moment(**changed):
    """A moment in which nobody is at work, ingest run 1 has 4 sketches of samples and run 2 has 2 of queries."""
    runs = {number: ingest_run(number) for number in (1, 2)}
    facts = {"ingest_runs": runs, "counts": {1: 4, 2: 2}, "unreadable": set(), "broken": {}, "score_runs": {}}
    facts |= {"pause": SimpleNamespace(works=[]), "label": lambda run: f"run {run.id}"}
    return SimpleNamespace(**facts | changed)


def score_run(**changed):
    facts = {"id": 7, "n_samples": 4, "n_queries": 2, "status": "done", "finished_at": 20, "over_checkpoints": None}
    recipe = {"ingest_runs": [1], "query_ingest_runs": [2]}
    return SimpleNamespace(**facts | {"recipe": recipe, "source_id": 1, "variant_id": 1} | changed)


MORE = {"counts": {1: 5, 2: 2}}
NOT_THERE = "ingest runs of its samples or queries are missing or not committed"


@pytest.mark.parametrize(
    ("frozen", "run", "facts"),
    [
        ({}, {}, []),
        (MORE, {}, ["it scored 4 samples, its ingest runs have 5"]),
        ({"counts": {1: 4}}, {}, ["it scored 2 queries, its ingest runs have 0"]),
        (
            {"counts": {}},
            {},
            ["it scored 4 samples, its ingest runs have 0", "it scored 2 queries, its ingest runs have 0"],
        ),
        (MORE | {"unreadable": {"t"}}, {}, []),
        (MORE | {"broken": {"t": "x"}}, {}, []),
        ({"counts": {2: 2}}, {"n_samples": 0, "n_queries": 0}, []),  # nothing to score: no query is counted
        (MORE, {"over_checkpoints": "a + b"}, []),  # an older recipe does not name all runs of a sum
        ({"ingest_runs": {2: ingest_run(2)}}, {}, [NOT_THERE]),
        ({"ingest_runs": {1: ingest_run(1, status="superseded"), 2: ingest_run(2)}}, {}, [NOT_THERE]),
        ({"ingest_runs": {1: ingest_run(1), 2: ingest_run(2, status="failed")}}, {}, [NOT_THERE]),
        ({"ingest_runs": {1: ingest_run(1, started_at=21), 2: ingest_run(2)}}, {}, []),  # a clock may go back
    ],
)
def test_score_runs_are_compared_with_their_ingest_runs(frozen, run, facts):
    assert list(_wrong_groups(moment(**frozen), score_run(**run))) == facts


def test_rows_of_unread_runs_are_reported():
    statuses = {1: "done", 2: "superseded", 3: "running", 4: "interrupted", 5: "failed"}
    runs = {number: score_run(id=number, status=status) for number, status in statuses.items()}
    counts = {"influence": dict.fromkeys((1, 2, 3, 9), 5), "source_influence": {3: 2, 4: 1}}

    def told(works):
        result = _unread_rows(moment(score_runs=runs, pause=SimpleNamespace(works=works)), counts)
        return [(f.severity, f.what, f.where, f.n) for f in result]

    orphan = ("error", "orphan rows", "influence of score run 9", 5)
    dead = ("warning", "orphan rows", "influence of score run 2", 5)
    stale = [("note", "stale run", f"run {number}", n) for number, n in ((3, 7), (4, 1), (5, 0))]
    assert told([]) == [dead, orphan, *stale]
    assert told([{"touches": {"source": ["a"]}}]) == [dead, orphan, *stale]
    assert told([{"touches": None}]) == [orphan]  # somebody scores


def test_ingest_runs_count_the_rows_they_have():
    def told(n_sketched, status="done", *, busy=False, **changed):
        run = SimpleNamespace(id=1, status=status, n_sketched=n_sketched, fingerprint="f" * 64)
        frozen = moment(ingest_runs={1: run}, **changed)
        frozen.sketch_tables = lambda: [] if "gone" in changed.get("counts", {}) else [sketch_table(run.fingerprint)]
        frozen.is_at_work = lambda _: busy
        return [(f.severity, f.what, f.n) for f in check_ingest_runs(frozen)]

    table = sketch_table("f" * 64)
    assert told(4) == []
    assert told(6) == told(2) == [("error", "count", 2)]
    assert told(4, counts={"gone": 0}) == [("error", "missing table", 4)]
    assert told(6, unreadable={table}) == told(6, broken={table: "x"}) == []
    assert told(6, unreadable={"other"}, broken={"another": "x"}) == [("error", "count", 2)]
    for status in ("running", "interrupted", "failed"):
        assert told(4, status) == [("note", "stale run", 4)]
        assert told(4, status, busy=True) == []
    assert told(0, "superseded") == []
