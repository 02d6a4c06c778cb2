"""Binary codes and their estimates; approximate search and its measured recall."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.reference_scores import SEARCH, brute_force_scores, scores_by_key
from helpers.stores import copy_store, read_sketches
from helpers.texts import qa_rows, text_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_store import Store
from lark_store.errors import InputError, NameUnknownError, NothingToScoreError
from lark_store.query.scoring import ann, ann_index
from lark_store.query.scoring.search import Search
from lark_store.query.select.resolve import ask, committed_groups
from lark_store.query.select.rows import find_rows
from lark_store.schema.catalog import Checkpoint, SearchIndex, Sketcher
from lark_store.schema.database import find
from lark_store.schema.sign_codes import code_bins, code_bytes, codes_of, fold
from lark_store.specs import SearchSpec


@pytest.fixture(scope="module")
def built_path(scored_path, tmp_path_factory):
    """The scored store with 60 samples more and a measured index."""
    root = tmp_path_factory.mktemp("built")
    with Store.open(copy_store(scored_path, root / "lark.store")) as store:
        store.source_add("many", write_jsonl(root / "many.jsonl", qa_rows(60, start=1000)), stage="pretrain")
        store.ingest(["base"], ["many"], ["raw"], sketcher="small")
        store.index_build("small")
    return root / "lark.store"


@pytest.fixture
def built(built_path):
    with Store.open(built_path) as opened:
        yield opened


@pytest.fixture
def built_copy(built_path, tmp_path):
    with Store.open(copy_store(built_path, tmp_path / "built.store")) as opened:
        yield opened


def table_of(store):
    (name,) = [n for n in store._db.vectors.table_names() if n.startswith("sketches_")]
    return store._db.vectors.table(name)


def take(store, candidates_):
    """Let a search read so many candidates."""
    with store._db.session() as session:
        for index in session.query(SearchIndex):
            index.candidates = candidates_


# --- codes ---------------------------------------------------------------------------------------------------------

K = st.one_of(st.integers(2, 64), st.sampled_from([1000, 1024, 4095, 4096, 4097, 8192, 10_000, 65_536]))


@settings(max_examples=40)
@given(k=K, n=st.integers(0, 4), seed=st.integers(0, 99), half=st.booleans())
def test_folding_sums_bins_modulo_f(k, n, seed, half):
    vectors = np.random.default_rng(seed).normal(size=(n, k)).astype(np.float16 if half else np.float32)
    bins = code_bins(k)
    assert bins % 8 == 0
    assert min(k, 4096) <= bins < max(4097, k + 8)
    folded = fold(vectors, bins)
    expected = np.zeros((n, bins))
    for j in range(k):
        expected[:, j % bins] += vectors[:, j].astype(np.float64)
    assert folded.shape == (n, bins)
    assert folded.dtype == np.float32
    np.testing.assert_allclose(folded, expected, rtol=1e-4, atol=1e-5)
    actual = codes_of(vectors)
    assert actual.shape == (n, code_bytes(k)) == (n, bins // 8)
    assert actual.dtype == np.uint8
    for i in range(n):
        for j in range(0, bins, max(1, bins // 50)):
            assert actual[i, j // 8] >> (j % 8) & 1 == (folded[i, j] > 0)


def test_folding_does_not_modify_its_input():
    vectors = np.ones((2, 1000), np.float32)
    fold(vectors, 8)
    codes_of(vectors)
    assert (vectors == 1).all()


def test_code_estimates_its_own_sketch_and_the_opposite():
    vectors = np.random.default_rng(0).normal(size=(20, 10_000)).astype(np.float32)
    signs = np.unpackbits(codes_of(vectors), axis=1, bitorder="little") * 2.0 - 1
    guess = fold(vectors, code_bins(10_000)) @ signs.T
    assert (guess.argmax(axis=1) == np.arange(20)).all()
    assert (codes_of(-vectors) == ~codes_of(vectors)).mean() > 0.99


def test_codes_are_written_with_the_sketches(scored):
    rows = read_sketches(scored)
    vectors = np.stack(rows["vector"].to_list()).astype(np.float16)
    np.testing.assert_array_equal(np.array(rows["code"].to_list(), np.uint8), codes_of(vectors))


# --- estimates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remembered", [0, 1 << 20], ids=["streamed", "remembered"])
def test_estimates_equal_sums_of_signed_folded_queries(scored, monkeypatch, remembered):
    monkeypatch.setattr(ann, "_REMEMBERED", remembered)
    (question,) = ask(scored._db, SearchSpec(checkpoints=["base"], sketcher="small", queries="test"))
    every = find_rows(scored._db, question.groups)
    codes = {r["row_key"]: r["code"] for r in read_sketches(scored).iter_rows(named=True)}
    query = np.random.default_rng(0).normal(size=1024).astype(np.float32)
    for rows in (every, every.only(np.array([9, 2, 20])), every, every.only(np.array([3]))):
        result = ann.estimates(scored._db, rows, query)
        for row, guess in zip(rows.frame.iter_rows(named=True), result, strict=True):
            code = np.array(codes[f"base/{row['source']}/{row['variant']}/{row['sample_id']}"], np.uint8)
            signs = np.unpackbits(code, bitorder="little") * 2.0 - 1
            assert guess == pytest.approx(signs @ query.astype(np.float64), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("n_bytes", [1, 2, 3, 125, 128])
def test_shares_are_summed_over_any_number_of_bytes(n_bytes):
    rng = np.random.default_rng(n_bytes)
    codes = rng.integers(0, 256, (5, n_bytes)).astype(np.uint8)
    table = rng.normal(size=(n_bytes, 256)).astype(np.float32)
    numbers = np.array([4, 0, 2, 6, 1])
    out = np.full(7, np.nan, np.float32)
    ann._sum_shares(codes, table, numbers, out)
    for code, number in zip(codes, numbers, strict=True):
        assert out[number] == pytest.approx(sum(table[j, byte] for j, byte in enumerate(code)), abs=1e-4)
    assert np.isnan(out[[3, 5]]).all()


# --- building ------------------------------------------------------------------------------------------------------


def test_index_reports_its_measured_recall(built_copy):
    report = built_copy.index_build("small")
    assert report.columns == ["fingerprint", "n_rows", "candidates", "recall", "n_queries"]
    (row,) = report.iter_rows(named=True)
    assert row["n_rows"] == 60 + 60
    assert 0 <= row["recall"] <= 1
    assert row["candidates"] >= 50
    assert 1 <= row["n_queries"] <= 100
    assert built_copy.index_build("small").equals(report)
    hits = built_copy.top("q100", approximate=True, **SEARCH)
    assert not hits.exact
    assert hits.how.startswith(
        f"approximate (recall@10 {row['recall']:.3f} when measured, {row['candidates']} candidates) small · cosine "
    )
    assert "against" not in hits.how
    assert hits.frame["p_value"].null_count() == hits.frame["q_value"].null_count() == 10


def test_measured_recall_equals_the_searchs(built_copy, monkeypatch):
    """With few candidates the reported recall equals the recall of a search over the same queries."""
    monkeypatch.setattr(ann_index, "_CHOICES", (12,))
    (row,) = built_copy.index_build("small").iter_rows(named=True)
    assert row["candidates"] == 12
    assert 0.1 < row["recall"] < 1


def code_ranks(store, checkpoint):
    """The ranks by code of each query's exact best ten, by numpy; the queries are in the order of the draw."""
    sketches = read_sketches(store).filter(checkpoint=checkpoint)
    vectors = np.stack(sketches["vector"].to_list()).astype(np.float64)
    signs = np.unpackbits(np.array(sketches["code"].to_list(), np.uint8), axis=1, bitorder="little") * 2.0 - 1
    is_query = (sketches["source"] == "test").to_numpy()
    with store._db.session() as session:
        groups = committed_groups(session, find(session, Sketcher, "small"), find(session, Checkpoint, checkpoint))
    keys = find_rows(store._db, groups).frame.select("source", "variant", "sample_id").rows()
    of_key = {key: n for n, key in enumerate(sketches.select("source", "variant", "sample_id").rows())}
    pool = [of_key[key] for key in keys if key[0] == "test"]
    ranks = []
    for query in (pool[n] for n in np.random.default_rng(0).permutation(len(pool))):
        exact = (vectors @ vectors[query])[~is_query]
        guess = (signs @ vectors[query])[~is_query]
        best = np.argsort(-exact)[:10]
        ranks.append([int((guess > guess[row]).sum()) for row in best])
    return ranks


def test_recall_is_that_of_every_other_query(built_copy, monkeypatch):
    ranks = code_ranks(built_copy, "base") + code_ranks(built_copy, "epoch-1")
    assert [len(row) for row in ranks] == [10] * 8
    chosen, held_out = np.array(ranks[::2]), np.array(ranks[1::2])
    choices = (2, 4, 7, 10, 13)
    recalls = [float((chosen < n).mean()) for n in choices]
    assert len(set(recalls)) == len({(held_out < n).mean() for n in choices}) == 5
    for aim in (*recalls, 2.0):  # each aim is just met; the last is never met
        monkeypatch.setattr(ann_index, "_CHOICES", choices)
        monkeypatch.setattr(ann_index, "_AIM", aim)
        (row,) = built_copy.index_build("small").iter_rows(named=True)
        n = choices[recalls.index(aim)] if aim in recalls else choices[-1]
        assert (row["candidates"], row["n_queries"]) == (n, 4)
        assert row["recall"] == pytest.approx((held_out < n).mean())


def test_queries_of_a_measurement_are_shared_by_the_checkpoints(built_copy, monkeypatch):
    monkeypatch.setattr(ann_index, "_MOST_QUERIES", 6)  # three of each of two checkpoints
    assert built_copy.index_build("small")["n_queries"].to_list() == [3]
    monkeypatch.setattr(ann_index, "_MOST_QUERIES", 1)  # at least two of each
    assert built_copy.index_build("small")["n_queries"].to_list() == [2]


def test_without_an_index_there_is_a_hint(scored):
    with pytest.raises(
        NothingToScoreError, match=r"have no approximate index\n\nhint: .*`store\.index_build\(\"small\", \.\.\.\)`"
    ):
        scored.top("q100", approximate=True, **SEARCH)


def test_index_without_rows_is_a_clear_error(store, tmp_path):
    with pytest.raises(NothingToScoreError, match="`small` has no committed sketches"):
        store.index_build("small")
    with pytest.raises(NameUnknownError, match="did you mean `small`"):
        store.index_build("smal")
    store.source_add("one", write_jsonl(tmp_path / "one.jsonl", text_rows(1, "one")), stage="pretrain")
    store.ingest(["base"], ["one"], ["raw"], sketcher="small")
    with pytest.raises(NothingToScoreError, match="too few sketches"):
        store.index_build("small")
    store.ingest(["base"], ["test"], ["chatml"], sketcher="small")  # one sample and queries
    assert store.index_build("small")["recall"].to_list() == [1.0]


# --- searching -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("method", ["cosine", "dot"])
@pytest.mark.parametrize("where", [None, "n_tokens % 2 = 0", "sample_id = 'q1007'"])
def test_full_candidates_give_the_exact_answer(built_copy, method, opponents, where):
    take(built_copy, 1000)
    options = {"method": method, "opponents": opponents, "where": where, "k": 20, **SEARCH}
    exact = built_copy.top("q101", null="none", **options)
    hits = built_copy.top("q101", approximate=True, **options)
    assert hits.frame.drop("score", "noise").equals(exact.frame.drop("score", "noise"))
    np.testing.assert_allclose(hits.frame["score"], exact.frame["score"], rtol=1e-4)
    np.testing.assert_allclose(hits.frame["noise"], exact.frame["noise"], rtol=1e-4)
    assert hits.n_searched == exact.n_searched
    assert hits.candidates == 1000


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("method", ["cosine", "dot"])
def test_few_candidates_have_exact_ordered_scores(built_copy, method, opponents):
    take(built_copy, 15)
    hits = built_copy.top("q101", method=method, opponents=opponents, approximate=True, **SEARCH)
    expected = brute_force_scores(built_copy, "q101", dot=method == "dot")
    actual = scores_by_key(hits.frame)
    assert len(actual) == 10
    assert actual == pytest.approx({key: expected[key] for key in actual}, rel=1e-3, abs=1e-5)
    assert hits.frame["score"].is_sorted(descending=not opponents)
    best = sorted(expected, key=lambda key: expected[key], reverse=not opponents)[:10]
    assert len(set(best) & set(actual)) >= 4  # the codes do choose: by chance it would be fewer than two


@pytest.mark.parametrize("method", ["cosine", "dot"])
def test_each_of_several_queries_has_its_own_scores(built, method):
    names = ["q103", "q100", "q101"]
    options = {"method": method, "approximate": True, "k": 99, **SEARCH}
    for name, hits in zip(names, built.top(names, **options), strict=True):
        assert hits.query_id == name
        assert hits.frame.equals(built.top(name, **options).frame)
        expected = brute_force_scores(built, name, dot=method == "dot")
        assert scores_by_key(hits.frame) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize(("k", "n"), [(3, 15), (10, 15), (11, 16), (19, 28), (40, 60), (900, 86)])
def test_candidates_are_the_best_by_code_and_grow_with_the_hits(built_copy, monkeypatch, k, n, opponents):
    take(built_copy, 15)
    asked, of_candidates, estimates = [], Search.of_candidates, ann.estimates

    def estimated(*arguments):
        asked.append(estimates(*arguments))
        return asked[0]

    def counted(search, query, numbers):
        asked.append(numbers)
        return of_candidates(search, query, numbers)

    monkeypatch.setattr(ann, "estimates", estimated)
    monkeypatch.setattr(Search, "of_candidates", counted)
    assert len(built_copy.top("q101", k=k, approximate=True, opponents=opponents, **SEARCH)) == min(k, 86)
    guess_N, numbers = asked
    assert len(set(numbers.tolist())) == len(numbers) == n
    best = np.sort(guess_N)[:n] if opponents else np.sort(guess_N)[-n:]
    assert sorted(guess_N[numbers]) == best.tolist()


def test_more_hits_than_candidates_read_more(built_copy):
    take(built_copy, 15)
    assert len(built_copy.top("q101", k=40, approximate=True, **SEARCH)) == 40
    assert len(built_copy.top("q101", k=900, approximate=True, **SEARCH)) == 86


@pytest.mark.parametrize("remembered", [0, 1 << 28], ids=["streamed", "remembered"])
def test_rows_added_later_are_searched(built_copy, tmp_path, monkeypatch, remembered):
    monkeypatch.setattr(ann, "_REMEMBERED", remembered)
    same = {**qa_rows(1, start=101)[0], "id": "the-same"}
    assert "the-same" not in built_copy.top("q101", approximate=True, **SEARCH).frame["sample_id"]
    built_copy.source_add("finetune", write_jsonl(tmp_path / "same.jsonl", [same]), stage="finetune")
    built_copy.ingest(["base"], ["finetune"], ["chatml"], sketcher="small")
    hits = built_copy.top("q101", approximate=True, **SEARCH)
    assert hits.frame["sample_id"][0] == "the-same"
    assert hits.frame["score"][0] == pytest.approx(1, abs=1e-3)
    assert hits.n_searched == 87


def test_cached_codes_are_not_confused(built):
    """The same open store asked about other rows each time."""
    for where in (None, "source = 'many'", "source = 'songs'", None, "n_tokens > 40"):
        take_all = {"k": 99, "where": where, **SEARCH}
        hits = built.top("q101", approximate=True, **take_all)
        assert (
            hits.frame["sample_id"].to_list() == built.top("q101", null="none", **take_all).frame["sample_id"].to_list()
        )


def test_unsupported_approximate_search_is_a_clear_error(built):
    for method in ("bm25", "bm25-okapi", "hybrid"):
        with pytest.raises(InputError, match=f"`{method}` has no approximate search"):
            built.top("q100", method=method, approximate=True, **SEARCH)
    with pytest.raises(InputError, match="`tracin` has no approximate search"):
        built.top("q100", checkpoint=["base", "epoch-1"], method="tracin", approximate=True, sketcher="small")
    for null in ("sources", "signs", "songs"):
        with pytest.raises(InputError, match="an approximate search has no p-values"):
            built.top("q100", null=null, approximate=True, **SEARCH)
    assert built.top("q100", null="none", approximate=True, **SEARCH).null == "none"
    with pytest.raises(NothingToScoreError, match="no sketch satisfies"):
        built.top("q100", where="false", approximate=True, **SEARCH)
