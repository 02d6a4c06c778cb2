"""`--where`: filtered answers equal brute force over the stored rows, and a condition is nothing but a condition."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from helpers.reference_scores import SEARCH, brute_force_scores, scores_by_key
from helpers.stores import copy_store, read_sketches
from helpers.texts import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_store import Store
from lark_store.errors import InputError, LarkStoreError, NothingToScoreError, QueryError
from lark_store.query.select import rows as rows_module
from lark_store.query.select.resolve import ask
from lark_store.query.select.rows import Rows, find_rows
from lark_store.specs import SearchSpec

ODD = 'it\'s "a" key'


def papers() -> list[dict[str, object]]:
    """Texts with metadata of many kinds."""
    return [
        {
            "id": f"p{i}",
            "text": f"Paper {i} about {'the sea' if i % 3 else 'a kidney'}.",
            "label": ("yes", "no")[i % 2],
            "year": 2000 + i,
            "journal": ("Nature", "Cell", None)[i % 3],
            "nested": {"flag": i % 4 == 0, "Twice": i},
            "nothing": None,
            "source": "elsewhere",
            "mixed": i if i % 2 else f"no {i}",
            "twice": {"a": 1, "A": 2},
            "": "empty",
            "_row": 7,
            ODD: i / 2,
        }
        for i in range(12)
    ]


def notes() -> list[dict[str, object]]:
    """Texts without some of these keys, and with others."""
    return [
        {"id": f"n{i}", "prompt": f"Note {i}?", "response": "no" * i, "year": 1990 + i, "page": -i} for i in range(1, 7)
    ]


@pytest.fixture(scope="module")
def library(scored_path, tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    with Store.open(copy_store(scored_path, root / "lark.store")) as store:
        store.source_add("papers", write_jsonl(root / "papers.jsonl", papers()), stage="pretrain", domain="science")
        store.source_add("notes", write_jsonl(root / "notes.jsonl", notes()), stage="finetune")
        store.ingest(["base"], ["papers", "notes"], ["raw", "chatml"], sketcher="small")
        yield store


@pytest.fixture(scope="module")
def facts(library):
    """Fields of each sketch at `base` for conditions, from the original rows."""
    texts = {(r["source"], r["sample_id"]): r for r in library.sql("from samples").iter_rows(named=True)}
    meta = {("papers", r["id"]): r for r in papers()} | {("notes", r["id"]): r for r in notes()}
    stages = dict(library.sql("select name, stage from sources").iter_rows())
    results = {}
    for row in read_sketches(library).iter_rows(named=True):
        if row["checkpoint"] == "base" and stages[row["source"]] != "query":
            key = (row["source"], row["sample_id"])
            own = {k: v for k, v in meta.get(key, {}).items() if k not in {"id", "source", "text", "label", "_row"}}
            own |= texts[key] | {k: row[k] for k in ("n_tokens", "n_loss_tokens", "loss", "grad_norm", "variant")}
            results[row["source"], row["variant"], row["sample_id"]] = own | {"stage": stages[row["source"]]}
    return results


@dataclass(frozen=True)
class Condition:
    """Conditions in SQL and in Python; for a row the function returns True, False or None (null)."""

    sql: str
    of: Callable[[dict], bool | None]


def compare(name: str, operator: str, value: object) -> Condition:
    column = '"' + name.replace('"', '""') + '"'
    literal = "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)

    def holds(row: dict) -> bool | None:
        mine = row.get(name)
        if mine is None:
            return None
        return {"<": mine < value, ">=": mine >= value, "=": mine == value, "<>": mine != value}[operator]

    return Condition(f"{column} {operator} {literal}", holds)


def both(a: Condition, b: Condition) -> Condition:
    def holds(row: dict) -> bool | None:
        x, y = a.of(row), b.of(row)
        return False if x is False or y is False else None if x is None or y is None else True

    return Condition(f"(\n{a.sql}\n) AND (\n{b.sql}\n)", holds)


def either(a: Condition, b: Condition) -> Condition:
    def holds(row: dict) -> bool | None:
        x, y = a.of(row), b.of(row)
        return True if x or y else None if x is None or y is None else False

    return Condition(f"((\n{a.sql}\n) or (\n{b.sql}\n))", holds)


def negated(a: Condition) -> Condition:
    return Condition(f"not (\n{a.sql}\n) -- not", lambda row: None if a.of(row) is None else not a.of(row))


operators = st.sampled_from(["<", ">=", "=", "<>"])
leaves = st.one_of(
    st.builds(compare, st.just("n_tokens"), operators, st.integers(10, 60)),
    st.builds(compare, st.just("n_loss_tokens"), operators, st.integers(1, 40)),
    st.builds(compare, st.just("loss"), st.sampled_from(["<", ">="]), st.floats(5.5, 6.5)),
    st.builds(compare, st.just("grad_norm"), st.sampled_from(["<", ">="]), st.floats(1, 20)),
    st.builds(compare, st.just("source"), operators, st.sampled_from(["papers", "songs", "elsewhere", "it's"])),
    st.builds(compare, st.just("stage"), operators, st.sampled_from(["finetune", "pretrain"])),
    st.builds(compare, st.just("variant"), operators, st.sampled_from(["raw", "chatml"])),
    st.builds(compare, st.just("label"), operators, st.sampled_from(["yes", "no"])),
    st.builds(compare, st.just("year"), operators, st.integers(1988, 2013)),
    st.builds(compare, st.just("page"), operators, st.integers(-7, 1)),
    st.builds(compare, st.just("journal"), operators, st.sampled_from(["Nature", "Cell", ""])),
    st.builds(compare, st.just(ODD), operators, st.sampled_from([0.0, 2.5, 5.0])),
    st.just(Condition("nested.flag", lambda row: row.get("nested", {}).get("flag"))),
    st.just(Condition("nothing is null", lambda _: True)),
    st.just(Condition("nothing = 'x'", lambda _: None)),
    st.just(Condition("text like '%sea%'", lambda row: None if row["text"] is None else "sea" in row["text"])),
    st.just(Condition("year - 2030 < -28", lambda row: row["year"] < 2002 if "year" in row else None)),
)
conditions = st.recursive(
    leaves,
    lambda inner: st.one_of(st.builds(both, inner, inner), st.builds(either, inner, inner), st.builds(negated, inner)),
    max_leaves=4,
)


@settings(max_examples=30)
@given(
    condition=conditions,
    query=st.sampled_from(["q100", "q103"]),
    opponents=st.booleans(),
    method=st.sampled_from(["cosine", "dot"]),
    k=st.integers(1, 60),
    fetched=st.booleans(),
)
def test_a_filtered_search_equals_brute_force(library, facts, condition, query, opponents, method, k, fetched):
    scores = brute_force_scores(library, query, dot=method == "dot")
    assert scores.keys() == facts.keys()
    chosen = {key: score for key, score in scores.items() if condition.of(facts[key])}
    options = {"k": k, "where": condition.sql, "opponents": opponents, "method": method, **SEARCH}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_FETCH_BELOW", 2.0 if fetched else 0.0)
        if not chosen:
            with pytest.raises(NothingToScoreError, match="no sketch satisfies"):
                library.top(query, **options)
            return
        hits = library.top(query, **options)
    best = sorted(chosen, key=lambda key: chosen[key], reverse=not opponents)[:k]
    actual = scores_by_key(hits.frame)
    np.testing.assert_allclose(list(actual.values()), [chosen[key] for key in best], rtol=1e-3, atol=1e-5)
    assert actual == pytest.approx({key: chosen[key] for key in actual}, rel=1e-3, abs=1e-5)
    assert hits.n_searched == len(chosen)
    assert f" where {condition.sql}" in hits.how


@pytest.mark.parametrize("share", [0.0, 2.0], ids=["scanned", "fetched"])
@pytest.mark.parametrize("batch_rows", [1, 7, 64])
def test_row_stream_keeps_row_numbers(library, monkeypatch, share, batch_rows):
    monkeypatch.setattr(rows_module, "_FETCH_BELOW", share)
    (question,) = ask(library._db, SearchSpec(checkpoints=["base"], sketcher="small", queries="test"))
    every = find_rows(library._db, question.groups)
    picked = np.random.default_rng(0).permutation(len(every))[:17]
    rows = every.only(picked)
    expected = {r["row_key"]: r["vector"] for r in read_sketches(library).iter_rows(named=True)}
    seen = []
    for numbers, column in rows.stream(batch_rows=batch_rows):
        assert 0 < len(numbers) == len(column) <= batch_rows
        for number, vector in zip(numbers, column.to_pylist(), strict=True):
            row = rows.frame.row(int(number), named=True)
            assert vector == expected[f"base/{row['source']}/{row['variant']}/{row['sample_id']}"]
        seen += numbers.tolist()
    assert sorted(seen) == list(range(17))
    assert list(every.only(picked[:0]).stream()) == []


def test_few_rows_are_fetched_and_many_are_scanned(library, monkeypatch):
    ways = []
    for name in ("_scanned", "_fetched"):
        real = getattr(Rows, name)

        def spied(self, *args, real=real, name=name):
            ways.append(name)
            return real(self, *args)

        monkeypatch.setattr(Rows, name, spied)
    library.top("q100", where="sample_id = 'p3'", **SEARCH)
    library.top("q100", where="sample_id <> 'p3'", **SEARCH)
    assert ways == ["_fetched", "_scanned"]


@pytest.mark.parametrize(
    ("condition", "ids"),
    [
        ("mixed = '3'", {"p3"}),
        ("mixed = 'no 4'", {"p4"}),
        ("nested.twice = 5", {"p5"}),
        ("nested.flag and year > 2004", {"p8"}),
        ("twice like '%2%' and year = 2001", {"p1"}),
        ("Year = 1992", {"n2"}),
        ("meta->>'source' = 'elsewhere' and source = 'papers' and year = 2002", {"p2"}),
        ("text = 'Paper 7 about the sea.'", {"p7"}),
        ("response = 'nono' -- it's", {"n2"}),
        ("sample_id in ('p1', 'p2') /* two */ and label = 'no'", {"p1"}),
        ("sample_id = (select max(sample_id) from candidates)", {"sea-4"}),
        ("year in (2001, 1993)", {"p1", "n3"}),
    ],
)
def test_conditions_on_texts_and_metadata(library, condition, ids):
    assert set(library.top("q100", where=condition, k=100, **SEARCH).frame["sample_id"]) == ids


def test_metadata_keys_differing_only_in_case_are_read_from_the_json(scored_copy, tmp_path):
    rows = [{"id": f"k{i}", "text": f"A text, number {i}.", "Year": i, "year": 10 - i, "Page": i} for i in range(1, 5)]
    rows.append({"id": "k5", "text": "Another text.", "page": 5})
    scored_copy.source_add("cases", write_jsonl(tmp_path / "cases.jsonl", rows), stage="pretrain")
    scored_copy.ingest(["base"], ["cases"], ["raw"], sketcher="small")

    def chosen(condition):
        hits = scored_copy.top("q100", where=condition, sources=["cases"], variants=["raw"], k=10, **SEARCH)
        return set(hits.frame["sample_id"])

    for name in ("year", "Year", '"Year"', "YEAR", "page"):
        with pytest.raises(QueryError, match="column") as caught:
            chosen(f"{name} > 2")
        assert "for keys that differ only in case write `meta->>'Year'`" in caught.value.hint
    assert chosen("(meta->>'Year')::int > 2") == {"k3", "k4"}
    assert chosen("(meta->>'year')::int > 8") == {"k1"}
    assert chosen("coalesce(meta->>'page', meta->>'Page')::int >= 4") == {"k4", "k5"}


MORE_THAN_A_CONDITION = [
    "1) union all select 1 from (select 1",
    "true) union all select _row from candidates where (true",
    "true) limit (1",
    "true) offset (3",
    "true) qualify (row_number() over () = 1",
    "true) group by all having (true",
    "true) order by (1",
    "true; drop table _rows",
    "true); drop view candidates; select (1",
    "true, false",
    "true as x",
    "select true",
    "*",
    "(true",
    "true)",
    "true) --",
    "true /*",
    "' or 1=1",
    "year > ",
    "and",
    "text",
    "nested",
    "count(*) > 1",
    "row_number() over () < 3",
    "unnest([true, false])",
    "columns(*) > 3",
    "no_such_column = 1",
    "no_such.column = 1",
    "no_such_function(1)",
    "cast(text as integer) = 1",
    "error('x')",
    "?",
    "$1",
    "n_tokens < $x",
    "\0",
    "read_csv('/etc/passwd')",
    "exists (from read_csv('/etc/passwd'))",
    "exists (from read_text('/etc/passwd'))",
    "exists (from glob('/etc/*'))",
    "exists (from '/etc/passwd')",
    "exists (from sniff_csv('/etc/passwd'))",
    "getenv('HOME') is not null",
    "exists (select * from samples)",
    "exists (insert into _rows values (1) returning 1)",
    "exists (from pragma_table_info('x'))",
    "install_me()",
]


@pytest.mark.parametrize("condition", MORE_THAN_A_CONDITION)
def test_invalid_condition_is_refused(library, condition):
    with pytest.raises(QueryError) as raised:
        library.top("q100", where=condition, **SEARCH)
    assert raised.value.hint
    assert "root:" not in str(raised.value)


@pytest.mark.parametrize("condition", ["", " ", "\n\t"])
def test_an_empty_condition_is_refused(library, condition):
    with pytest.raises(InputError, match="the condition is empty"):
        library.top("q100", where=condition, **SEARCH)


@pytest.mark.parametrize("condition", ["null", "false", "loss > null", "1 = 0", "year = 'x' || null", "0"])
def test_unsatisfied_condition_is_a_clear_error(library, condition):
    with pytest.raises(NothingToScoreError, match="no sketch satisfies"):
        library.top("q100", where=condition, **SEARCH)


@pytest.mark.parametrize(
    "condition", ["true", "1", "'true'", "n_tokens", "true --", "random() < 2", "not null is true"]
)
def test_nonboolean_condition_is_cast_like_where(library, facts, condition):
    assert library.top("q100", where=condition, **SEARCH).n_searched == len(facts)


@pytest.mark.parametrize("meta", ["[1]", "3", '"year"', "{}"])
def test_metadata_without_keys_leaves_the_columns(meta):
    from lark_store.query.select.where import _keys
    from lark_store.query.sql.sandbox import sandbox

    connection = sandbox()
    connection.execute("CREATE TABLE _rows AS SELECT 's' AS source")
    connection.execute("CREATE TABLE _samples AS SELECT 's' AS source, ? AS meta", [meta])
    assert _keys(connection) == "{}"
    connection.close()


def test_removed_sample_is_filtered_by_its_sketch(scored_copy):
    scored_copy._db.vectors.table("samples").delete("source = 'songs' AND sample_id = 'sea-1'")
    hits = scored_copy.top("q100", where="source = 'songs' and variant = 'raw'", **SEARCH)
    assert len(hits) == 5
    assert hits.frame.filter(sample_id="sea-1")["text"].to_list() == [None]
    assert (
        len(scored_copy.top("q100", where="source = 'songs' and variant = 'raw' and text is not null", **SEARCH)) == 4
    )


def test_condition_does_not_filter_the_null_source(library):
    hits = library.top("q100", sources=["finetune"], where="sample_id < 'q3'", null="songs", k=100, **SEARCH)
    assert set(hits.frame["sample_id"]) == {"q0", "q1", "q2"}
    assert hits.n_searched == 3
    scores = brute_force_scores(library, "q100")
    null = [score for (source, variant, _), score in scores.items() if (source, variant) == ("songs", "chatml")]
    for row in hits.frame.iter_rows(named=True):
        above = sum(score >= scores["finetune", "chatml", row["sample_id"]] for score in null)
        assert row["p_value"] == pytest.approx((1 + above) / (1 + len(null)))


def test_conditions_raise_only_own_errors(library):
    words = ["year", "(", ")", ";", "--", "select", "from", "*", "'", '"', "true", ",", "union", "\\", "$$", "nested."]
    rng = np.random.default_rng(0)
    for _ in range(60):
        condition = " ".join(rng.choice(words, rng.integers(1, 7)))
        try:
            library.top("q100", k=1, where=condition, **SEARCH)
        except LarkStoreError as error:
            assert error.hint  # noqa: PT017  # both ways are right, a third isn't


ENDLESS = "(select count(*) from range(1000000) a, range(1000000) b) > 0"


def test_endless_condition_is_interrupted(scored, monkeypatch):
    monkeypatch.setattr("lark_store.query.select.where._SECONDS", 0.5)
    with pytest.raises(QueryError, match=r"longer than 0\.5 s"):
        scored.top("q100", where=ENDLESS, **SEARCH)


def test_condition_in_sql_ends_with_its_query(scored):
    call = f"from top_influence(checkpoint := 'base', query := 'q100', sketcher := 'small', condition := '{ENDLESS}')"
    with pytest.raises(QueryError, match=r"longer than 2 s"):
        scored.sql(call, timeout=2)
    deadline = time.monotonic() + 10
    while any(thread.name == "lark-store-query" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
