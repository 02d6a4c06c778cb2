"""Unit tests of queries, without a model or a store."""

from __future__ import annotations

import platform
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from helpers.gradients import CPU
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from lark_store.core.device import device_name, pick_device
from lark_store.errors import InputError
from lark_store.gradients.corrections import DEFAULT_POWER
from lark_store.modeling.rendering import DEFAULT_MAX_LENGTH
from lark_store.query.methods import Method
from lark_store.query.scoring import ann, geometry, products
from lark_store.query.scoring.geometry import n_fitted
from lark_store.query.scoring.products import Queries, matrix
from lark_store.query.scoring.search import DEFAULT_MEMORY, Search, _common
from lark_store.query.select.coverage import _blocks, _note, _scored, _selection, _sum
from lark_store.query.select.resolve import Question, Term, resolved_method
from lark_store.query.select.rows import Rows
from lark_store.query.select.score_filter import ScoreFilter
from lark_store.schema.sign_codes import code_bins, code_bytes, codes_of
from lark_store.specs import AttributeSpec, SearchSpec
from lark_store.stats import bootstrap, significance
from lark_store.stats.bootstrap import Figure, _tests, evaluate, permutation_p
from lark_store.stats.running_top_k import Tally

# --- scores -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(1, 6), st.booleans())
def test_tally_keeps_the_best_in_any_input_order(seed, sizes, hits, resumed):
    rng = np.random.default_rng(seed)
    codes = rng.permutation(100)[: sum(sizes)]
    scores = rng.choice(np.float32([-1, -0.5, 0, 0.25, 2]), (3, len(codes)))  # many ties
    tally, start = Tally(3, hits), 0
    for n in sizes:
        tally.take(codes[start : start + n], scores[:, start : start + n])
        start += n
        if resumed and (kept := tally.result()):
            tally = Tally(3, hits)
            tally.resume(kept.top_codes, kept.top_scores, kept.mean_Q, kept.std_Q, kept.n)
    result = tally.result()
    if not len(codes):
        assert result is None
        return
    assert result.n == len(codes)
    np.testing.assert_allclose(result.mean_Q, scores.mean(axis=1, dtype=np.float64), atol=1e-6)
    np.testing.assert_allclose(result.std_Q, scores.std(axis=1, dtype=np.float64), atol=1e-6)
    for q in range(3):
        ordered = sorted(zip(-scores[q], codes, strict=True))
        best = list(zip(-result.top_scores[q], result.top_codes[q], strict=True))
        assert best == sorted(best)  # the best first, ties by code
        assert result.top_scores[q].tolist() == [-score for score, _ in ordered[:hits]]
        assert set(best) <= set(ordered)
        assert (result.max_Q[q], result.argmax[q]) == (-best[0][0], best[0][1])
        if len([1 for score, _ in ordered if score == ordered[0][0]]) <= hits:
            assert result.argmax[q] == ordered[0][1]


@pytest.mark.parametrize("hits", [1, 2, 5, 20])
def test_tally_keeps_the_best_of_distinct_scores(hits):
    scores, tally = np.random.default_rng(hits).permutation(3000).astype(np.float32)[None], Tally(1, hits)
    for codes in np.split(np.arange(3000), 3):
        tally.take(codes, scores[:, codes])
    assert tally.result().top_scores.tolist() == [list(range(2999, 2999 - hits, -1))]
    assert tally.result().top_codes.tolist() == np.argsort(-scores)[:, :hits].tolist()


class Stream:
    """Rows that come in batches, in another order than their numbers."""

    def __init__(self, vectors, sizes, seed=0):
        self.vectors, self.sizes = vectors, sizes
        self.order = np.random.default_rng(seed).permutation(len(vectors))

    def __len__(self):
        return len(self.vectors)

    def stream(self):
        start = 0
        for size in self.sizes:
            numbers = self.order[start : start + size]
            flat = pa.array(self.vectors[numbers].reshape(-1))
            yield numbers, pa.FixedSizeListArray.from_arrays(flat, self.vectors.shape[1])
            start += size


@pytest.mark.parametrize("n_queries", [1, 3, products._FEW, products._FEW + 1])
@pytest.mark.parametrize(
    "sizes", [[1], [7, 8, 9], [300, 212], [300, 213, 64, 1], [64] * 17, [512, 512, 3], [1300, 9]], ids=str
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_products_are_independent_of_batches(sizes, n_queries, dtype):
    check_products(sizes, n_queries, dtype, 24)


def check_products(sizes, n_queries, dtype, k):
    rng = np.random.default_rng(1)
    vectors = (rng.normal(size=(sum(sizes), k)) * rng.uniform(0.5, 2, (sum(sizes), 1))).astype(dtype)
    unit = products.normalized(rng.normal(size=(n_queries, k)).astype(np.float32))
    queries = Queries([f"q{i}" for i in range(n_queries)], unit, np.ones(n_queries, np.float32))
    cosine, scale = matrix(Stream(vectors, sizes), queries, device="cpu", scales=True)
    q, rows = unit.astype(np.float64), vectors.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(cosine, q @ rows.T / norms, atol=2e-6)
    np.testing.assert_allclose(scale, np.sqrt(q**2 @ (rows**2).T) / norms, rtol=1e-5)
    assert matrix(Stream(vectors, sizes), queries, device="cpu")[1] is None


@pytest.mark.parametrize("k", [256, 8192, 10_000, 65_536, 131_072])
def test_products_of_few_and_many_queries_are_equal(k):
    for n_queries in (1, products._FEW + 1):
        check_products([5, 64, 1], n_queries, np.float16, k)


@pytest.mark.parametrize(("small", "module"), [(64 * 70, "_few"), (64 * 70 - 1, "_many")])
def test_a_large_store_is_multiplied_by_torch_also_for_one_query(monkeypatch, small, module):
    monkeypatch.setattr(products, "_SMALL", small)
    other = "_many" if module == "_few" else "_few"
    monkeypatch.setattr(products, other, None)
    check_products([64, 6], 1, np.float16, 64)


def test_row_has_an_equal_product_at_any_position():
    row = np.random.default_rng(2).normal(size=(1, 65_536)).astype(np.float16)
    query = Queries(["q"], products.normalized(products.widened(row[:, ::-1])), np.ones(1, np.float32))
    cosine, _ = matrix(Stream(np.repeat(row, 150, axis=0), [64, 64, 22]), query)
    assert len(np.unique(cosine)) == 1


def test_every_finite_float16_is_widened_exactly():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    same = products.widened(every[None])[0].view(np.int32) == every.astype(np.float32).view(np.int32)  # −0 is not 0
    assert same.all()


def test_rows_without_a_batch_give_no_products():
    queries = Queries(["q"], np.ones((1, 24), np.float32), np.ones(1, np.float32))
    assert matrix(Stream(np.zeros((0, 24), np.float32), []), queries, device="cpu")[0].shape == (1, 0)


def test_products_are_computed_on_the_requested_device():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in {"cpu", "cuda", "mps"}
    assert device_name(CPU) == f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(InputError, match=f"device `{name}` is not available"):
            pick_device(name)


@pytest.mark.parametrize(
    ("k", "bins"), [(1, 8), (8, 8), (9, 16), (1001, 1008), (4096, 4096), (4097, 4096), (1 << 20, 4096)]
)
def test_a_code_has_a_bit_for_each_folded_bin(k, bins):
    assert (code_bins(k), code_bytes(k)) == (bins, bins // 8)


@pytest.mark.parametrize(
    ("spec", "fact"),
    [
        ({"checkpoints": ["a", "b"]}, "`cosine` scores at one checkpoint, not at `a`, `b`"),
        ({"checkpoints": ["a", "a"], "over_checkpoints": "sum"}, "a checkpoint is given twice"),
        ({"checkpoints": ["a"], "query_checkpoint": "b", "method": "centred"}, "`centred` needs queries and samples"),
        ({"checkpoints": ["a"], "query_checkpoint": "b", "over_checkpoints": "sum"}, "`cosine-sum` needs queries and"),
    ],
)
def test_method_conflicting_with_its_checkpoints_is_refused(spec, fact):
    with pytest.raises(InputError) as refused:
        resolved_method(SearchSpec(sketcher="s", **spec))
    assert refused.value.fact.startswith(fact)


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ({"checkpoints": ["a"]}, "cosine"),
        ({"checkpoints": ["a"], "query_checkpoint": "a"}, "cosine"),
        ({"checkpoints": ["a"], "query_checkpoint": "a", "method": "centred"}, "centred"),
        ({"checkpoints": ["a"], "query_checkpoint": "b"}, "dot"),
        ({"checkpoints": ["a"], "query_checkpoint": "b", "method": "cosine"}, "cosine"),
        ({"checkpoints": ["a", "b"], "over_checkpoints": "sum"}, "cosine-sum"),
    ],
)
def test_default_method_follows_the_checkpoints(spec, method):
    assert resolved_method(SearchSpec(sketcher="s", **spec)).name == method


# --- rows and estimates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_terms", [1, 2, 3, 4])
def test_sum_covers_common_samples_in_the_last_checkpoints_order(n_terms):
    chance = np.random.default_rng(n_terms)
    ids = [chance.permutation(12)[:9] for _ in range(n_terms)]
    terms = [
        Rows([], None, "", pl.DataFrame({"source": "a", "variant": "raw", "sample_id": [str(i) for i in own]}), 9)
        for own in ids
    ]
    shared = [str(i) for i in ids[-1] if all(i in own for own in ids)]
    assert [rows.frame["sample_id"].to_list() for rows in _common(terms)] == [shared] * n_terms


@pytest.mark.parametrize(
    ("n", "memory", "m"), [(5, 0, 1), (5, 31, 1), (5, 32 * 9, 3), (5, 1 << 20, 5), (1, 1 << 20, 1)]
)
def test_whitening_uses_as_many_rows_as_fit_in_memory(n, memory, m):
    assert n_fitted(n, memory) == m


@pytest.mark.parametrize("remembered", [0, 1 << 20])
@pytest.mark.parametrize("k", [64, 72, 100])
def test_estimates_equal_batched_products_with_folded_signs(monkeypatch, remembered, k):
    rng = np.random.default_rng(0)
    vectors, query = rng.normal(size=(40, k)).astype(np.float32), rng.normal(size=k).astype(np.float32)
    monkeypatch.setattr(ann, "_REMEMBERED", remembered)
    monkeypatch.setattr(ann, "_ROWS_PER_BATCH", 7)
    rows = Stream(codes_of(vectors), [9, 16, 15])
    rows.table, rows.frame = SimpleNamespace(name="t", version=1), pl.DataFrame({"row_id": range(40)})
    rows.stream_vectors, rows.stream = rows.stream, lambda _column, _n: rows.stream_vectors()
    db = SimpleNamespace(remember=lambda _what, _state, make: make())
    bins = code_bins(k)
    folded = np.pad(vectors, ((0, 0), (0, bins - k)))
    expected = np.where(folded > 0, 1, -1) @ np.pad(query, (0, bins - k))
    np.testing.assert_allclose(ann.estimates(db, rows, query), expected, rtol=1e-5, atol=1e-5)


def test_zero_mean_has_no_share():
    means, share = Figure({}, np.zeros(5)), Figure({}, np.zeros(5), is_share=True)
    assert [(row["low"], row["high"] > 0) for row in evaluate([means, share])] == [(0, False), (0, True)]


def test_two_queries_give_large_p_values():
    p_values = permutation_p(np.array([[1.0, 1.0, 0.0], [2.0, -1.0, 0.0]]))
    assert p_values.tolist() == [0.5, 1.0, 1.0]  # of 4 assignments of signs one is as high, and doubled for two sides
    assert permutation_p(np.ones((1, 2))).tolist() == [1.0, 1.0]


def test_differences_over_few_queries_are_tested_exactly_and_others_together():
    rng = np.random.default_rng(0)
    many = [rng.normal(0.3, 1, n) for n in (15, 20)]
    p = _tests([np.ones(13), many[0], np.ones(2), many[1]])
    assert p[[0, 2]].tolist() == [2 / 2**13, 2 / 2**2]
    assert p[[1, 3]].tolist() == permutation_p(np.stack([np.pad(many[0], (0, 5)), many[1]], axis=1)).tolist()


def test_documented_defaults():
    """Values named in the documentation, or fixed by stored answers."""
    assert (AttributeSpec.hits, DEFAULT_MEMORY, DEFAULT_MAX_LENGTH, DEFAULT_POWER) == (100, 1 << 30, 1024, 0.5)
    assert (bootstrap.CONFIDENCE, bootstrap.RESAMPLES, geometry._DAMPING) == (0.95, 9_999, 1.0)
    assert pytest.approx(0.25 / float(ndtr(-(2**0.5))), abs=2e-5) == significance._BENTKUS_DZINDZALIETA
    assert 0.25 / float(ndtr(-(2**0.5))) <= significance._BENTKUS_DZINDZALIETA


@pytest.mark.parametrize(
    ("method", "memory", "sizes"),
    [
        ("cosine", 4 * 1024, [1] * 7),
        ("cosine", 4 * 1024 * 3, [3, 3, 1]),
        ("cosine", 0, [1] * 7),
        ("whitened", (2 * 4 * 1024 + 16 * 10) * 3, [3, 3, 1]),
        ("whitened", (2 * 4 * 1024 + 16 * 10) * 3 - 1, [2, 2, 2, 1]),
        ("hybrid", (4 * 1024 + 16 * 10) * 4, [4, 3]),
    ],
)
def test_query_blocks_fit_in_memory(method, memory, sizes):
    sketcher = SimpleNamespace(k=1024)
    terms = [Term(SimpleNamespace(sketcher=sketcher), [])]
    search = Search.__new__(Search)
    search.question, search.memory, search.rows = Question(terms, Method.of(method)), memory, range(10)
    search.load = list
    assert [len(subset) for subset in search.blocks(range(7))] == sizes
    assert [number for subset in search.blocks(range(7)) for number in subset] == list(range(7))


# --- stored scores and coverage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoints", "method", "query_checkpoint", "summed", "at", "is_across"),
    [
        (["a"], "cosine", None, None, ["a"], False),
        (["a", "b", "c"], "cosine", None, None, ["a", "b", "c"], False),
        (["a", "b", "c"], "cosine-sum", None, "a + b + c", ["c"], False),
        (["a", "b"], "tracin", None, "a + b", ["b"], False),
        (["a"], "tracin", None, None, ["a"], False),
        ([], "tracin", None, None, [], False),
        (["a"], "dot", "a", None, ["a"], False),
        (["a"], "dot", "b", None, ["a"], True),
        (["a", "b"], "dot", "b", None, ["a", "b"], True),
        ([], "dot", "b", None, [], True),
    ],
)
def test_checkpoints_of_stored_scores(checkpoints, method, query_checkpoint, summed, at, is_across):
    scores = ScoreFilter(checkpoints, Method.of(method), query_checkpoint)
    assert (scores.summed, scores.at, scores.is_across) == (summed, at, is_across)


def test_unknown_counts_make_a_sum_unknown():
    assert _sum([]) == (0, 0)
    assert _sum([(1, 10), (2, 30)]) == (3, 40)
    assert _sum([(1, 10), (None, None), (2, 30)]) == (None, None)
    assert _sum([(None, 10), (2, 30)]) == (None, 40)


def test_small_batches_are_joined():
    batches = [pa.RecordBatch.from_pydict({"n": [size] * size}) for size in (3, 1, 3, 2, 4, 1)]
    assert [frame["n"].to_list() for frame in _blocks(batches, 4)] == [[3] * 3 + [1], [3] * 3 + [2] * 2, [4] * 4, [1]]
    assert list(_blocks([], 4)) == []


def test_selection_of_runs():
    whole, first = SimpleNamespace(recipe={}), SimpleNamespace(recipe={"limit": 0})
    chosen = SimpleNamespace(recipe={"candidates": {"by": "bm25", "queries": "test"}, "limit": 7})
    words = "candidates by bm25 for `test`"
    assert _selection([]) is None
    assert _selection([first]) == "the first 0"
    assert _selection([chosen]) == words
    assert _selection([chosen, first, chosen]) == f"{words} and the first 0"
    assert _selection([chosen, whole]) is None  # a run took all samples


def test_note_on_an_incomplete_search():
    run = SimpleNamespace(**{kind: SimpleNamespace(name=kind) for kind in ("source", "variant", "checkpoint")})
    assert _note(run, 5, 5, None) is None
    assert _note(run, 6, 5, "the first 6") is None  # a sample was removed since
    assert _note(run, 1234, 5678, None) == (
        "searched 1,234 of 5,678 samples of `source` as `variant` at `checkpoint`: the rest failed or was added later"
    )
    assert _note(run, 1, 5, "the first 1").endswith("`checkpoint`: the first 1; the rest was not searched")


def test_scored_group_has_its_run_over_the_fewest_samples():
    def run(n, *, status="done", method="cosine", **ids):
        keys = {"fingerprint": "f", "sketcher_id": 1, "checkpoint_id": 1, "source_id": 1, "variant_id": 1} | ids
        return SimpleNamespace(status=status, method=method, n_samples=n, **keys)

    runs = [run(5), run(3), run(4), run(1, status="failed"), run(2, method="dot"), run(9, variant_id=2)]
    assert {key[-1]: found.n_samples for key, found in _scored(runs, "cosine").items()} == {1: 3, 2: 9}
    for name in ("fingerprint", "sketcher_id", "checkpoint_id", "source_id"):
        assert len(_scored([run(5), run(3, **{name: 7})], "cosine")) == 2
