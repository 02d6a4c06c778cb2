"""Table functions: SQL, Python and the commands give the same rows and the same errors."""

from __future__ import annotations

import json
import threading
import time

import polars as pl
import pytest
from conftest import copy_store, named, qa_rows, write_jsonl
from polars.testing import assert_frame_equal
from test_cli import PROGRAM, lark, run

from lark_store import Store
from lark_store.errors import InputError, LarkStoreError, NameUnknownError, NothingToScoreError, QueryError
from lark_store.query.rows import Rows
from lark_store.query.sql.functions import FUNCTIONS
from lark_store.query.sql.stop import Stop

AT = {"checkpoint": "base", "sketcher": "small"}
PARTS = ["cosine", "cosine_rank", "bm25", "bm25_rank"]


@pytest.fixture(scope="module")
def reader(scored_path):
    with Store.open(scored_path) as opened:
        yield opened


def call(name, **arguments):
    """Write a call in SQL."""

    def literal(value):
        return (
            "NULL" if value is None else "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)
        )

    return f"{name}({', '.join(f'{key} := {literal(value)}' for key, value in arguments.items())})"


def from_json(rows, like):
    """The rows that a command printed, in the types of a frame."""
    return pl.DataFrame(rows, schema=like.schema)


TOPS = [
    {"k": 3},
    {"k": 30, "opponents": True},
    {"method": "dot", "source": "songs", "variant": "raw"},
    {"method": "tracin", "k": 5},
    {"method": "bm25"},
    {"method": "bm25-okapi", "k": 1},
    {"method": "hybrid", "k": 7},
    {"condition": "n_tokens < 30 and text is not null"},
    {"condition": "label is null and text like '%it''s%' or source = 'songs'", "opponents": True},
    {"query_checkpoint": "epoch-1"},
    {"queries": "test", "query_variant": "chatml"},
]


@pytest.mark.parametrize("asked", TOPS, ids=str)
def test_top_influence_is_top(reader, scored_path, asked):
    made = reader.sql(f"from {call('top_influence', query='q101', **AT, **asked)}")
    how = dict(asked)
    how |= {"where": how.pop("condition", None)}
    how |= {f"{name}s": [how.pop(name)] for name in ("source", "variant") if name in how}
    expected = reader.top("q101", **AT, **how).frame
    assert made.columns == list(FUNCTIONS["top_influence"].columns)
    assert set(made["checkpoint"]) == {"base"}
    assert set(made["query_id"]) == {"q101"}
    assert_frame_equal(made.select(expected.columns), expected, check_exact=True)
    for name in set(PARTS) - set(expected.columns):
        assert made[name].null_count() == len(made)
    options = " ".join(
        f"--{ {'condition': 'where'}.get(name, name).replace('_', '-') }" + ("" if value is True else f' "{value}"')
        for name, value in asked.items()
        if name != "k"
    )
    printed = lark(f"top q101 -c base --sketcher small -k {asked.get('k', 10)} {options} -f json", store=scored_path)
    assert printed.code == 0, printed.err
    assert_frame_equal(from_json(printed.rows, expected), expected, rel_tol=1e-6)
    queried = lark("sql -f json", f"from {call('top_influence', query='q101', **AT, **asked)}", store=scored_path)
    assert (queried.code, queried.err) == (0, "")
    assert_frame_equal(from_json(queried.rows, made), made, rel_tol=1e-6)


def test_all_queries_at_once_get_what_each_gets_alone(reader, monkeypatch):
    passes = []
    stream = Rows.stream

    def counted(self, *args, **kwargs):
        passes.append(1)
        return stream(self, *args, **kwargs)

    monkeypatch.setattr(Rows, "stream", counted)
    lateral = f"lateral {call('top_influence', k=4, **AT)[:-1]}, query := s.sample_id) t"
    made = reader.sql(f"select t.* from samples s, {lateral} where s.source = 'test' order by query_id, rank")
    assert len(passes) == 1  # the sketches are read once for all
    alone = [reader.sql(f"from {call('top_influence', query=f'q10{i}', k=4, **AT)}") for i in range(4)]
    assert_frame_equal(made, pl.concat(alone), rel_tol=1e-5, abs_tol=1e-6)
    some = reader.sql(f"select s.i, t.* from (values (1, 'q103'), (2, null), (3, 'q103')) s(i, sample_id), {lateral}")
    assert some.group_by("i").len().sort("i").rows() == [(1, 4), (3, 4)]
    assert_frame_equal(some.filter(i=3).drop("i"), alone[3], rel_tol=1e-5, abs_tol=1e-6)


def test_each_row_may_ask_at_another_checkpoint(reader):
    lateral = (
        "lateral top_influence(checkpoint := c.name, query := 'q100', sketcher := 'small', k := c.epoch::int + 1) t"
    )
    made = reader.sql(f"select t.* from checkpoints c, {lateral} order by t.checkpoint, rank")
    assert made.select("checkpoint", "rank").rows() == [("base", 1), ("epoch-1", 1), ("epoch-1", 2)]
    for at in ("base", "epoch-1"):
        expected = reader.top("q100", checkpoint=at, sketcher="small", k=1).frame["score"].item()
        assert made.filter(checkpoint=at)["score"][0] == expected


def test_a_query_without_a_sketch_has_no_rows_beside_others(scored_copy, tmp_path):
    scored_copy.source_add("test", write_jsonl(tmp_path / "t.jsonl", qa_rows(1, start=900)), stage="query")
    lateral = f"lateral {call('top_influence', k=2, **AT)[:-1]}, query := s.sample_id) t"
    made = scored_copy.sql(f"select t.* from samples s, {lateral} where s.source = 'test'")
    assert sorted(set(made["query_id"])) == ["q100", "q101", "q102", "q103"]
    for alone in (
        call("top_influence", query="q900", **AT),
        call("ft_pt", query="q900", **AT),
        call("trajectory", query="q900", sample_id="sea-1", sketcher="small"),
        call("trajectory", query="q100", sample_id="sea-1", source="medical", sketcher="small"),
    ):
        assert scored_copy.sql(f"from {alone}").is_empty()
    with pytest.raises(NameUnknownError, match="no query `q900`"):
        scored_copy.top("q900", **AT)
    with pytest.raises(NothingToScoreError, match="query `q900` has no `small` sketch"):
        scored_copy.trajectory("q900", "sea-1", sketcher="small")
    with pytest.raises(NameUnknownError, match="no query `q9`"):
        scored_copy.sql(f"select t.* from (values ('q9'), ('q100')) s(sample_id), {lateral}")


@pytest.mark.parametrize("asked", [{}, {"method": "dot"}, {"queries": "test", "query_variant": "chatml"}], ids=str)
def test_ft_pt_is_ft_pt(reader, scored_path, asked):
    expected = reader.ft_pt("base", sketcher="small", **asked)
    made = reader.sql(f"from {call('ft_pt', **AT, **asked)}")
    assert_frame_equal(made, expected, check_exact=True)
    one = reader.sql(f"from {call('ft_pt', query='q102', **AT, **asked)}")
    assert_frame_equal(one, expected.filter(query_id="q102"), check_exact=True)
    lateral = f"lateral {call('ft_pt', **AT, **asked)[:-1]}, query := s.sample_id) t"
    beside = reader.sql(f"select t.* from samples s, {lateral} where s.source = 'test'")
    assert_frame_equal(beside, expected, check_exact=True, check_row_order=False)
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asked.items())
    printed = lark(f"ft-pt -c base --sketcher small {options} -f json", store=scored_path)
    assert_frame_equal(from_json(printed.rows, expected), expected, rel_tol=1e-6)


@pytest.mark.parametrize("asked", [{}, {"method": "dot", "source": "songs"}, {"variant": "raw"}], ids=str)
def test_trajectory_is_trajectory(reader, scored_path, asked):
    expected = reader.trajectory("q100", "sea-2", sketcher="small", **asked)
    assert len(expected) == (2 if "variant" in asked else 4)
    made = reader.sql(f"from {call('trajectory', query='q100', sample_id='sea-2', sketcher='small', **asked)}")
    assert_frame_equal(made, expected, check_exact=True)
    options = " ".join(f"--{name} {value}" for name, value in asked.items())
    printed = lark(f"trajectory q100 sea-2 --sketcher small {options} -f json", store=scored_path)
    assert_frame_equal(from_json(printed.rows, expected), expected, rel_tol=1e-6)
    lateral = "lateral trajectory(query := 'q100', sample_id := s.sample_id, sketcher := 'small') t"
    beside = reader.sql(f"select t.* from samples s, {lateral} where s.source = 'songs' order by all")
    alone = [reader.trajectory("q100", f"sea-{i}", sketcher="small") for i in range(5)]
    assert_frame_equal(beside, pl.concat(alone), check_row_order=False)


@pytest.mark.parametrize("asked", [{"query": "q100"}, {"text": "it's the night train"}], ids=str)
@pytest.mark.parametrize("source", [None, "songs"])
def test_similar_text_is_similar_text(reader, scored_path, asked, source):
    sources = [source] if source else []
    expected = reader.similar_text(**asked, k=6, sources=sources)
    made = reader.sql(f"from {call('similar_text', k=6, source=source, **asked)}")
    assert_frame_equal(made, expected, check_exact=True)
    words = [asked["query"]] if "query" in asked else ["--text", asked["text"]]
    chosen = ["-s", source] if source else []
    printed = lark("similar-text -k 6 -f json", *words, *chosen, store=scored_path)
    assert_frame_equal(from_json(printed.rows, expected), expected, rel_tol=1e-6)


@pytest.mark.parametrize(
    "query",
    [
        call("top_influence", query=None, **AT),
        call("top_influence", **AT),
        "top_influence()",
        call("ft_pt", checkpoint=None),
        "ft_pt()",
        call("trajectory", query=None, sample_id="sea-1"),
        call("trajectory", query="q100", sample_id=None),
        "trajectory()",
        call("similar_text", query=None, text=None),
        "similar_text()",
    ],
)
def test_without_what_is_asked_about_there_are_no_rows(reader, query):
    made = reader.sql(f"from {query}")
    assert made.is_empty()
    assert made.columns == list(FUNCTIONS[query.split("(")[0]].columns)


def top_error(query="q100", **asked):
    """A call of `top_influence`, and the same question in Python."""
    how = AT | asked
    names = {"source": "sources", "variant": "variants", "condition": "where"}
    python = {names.get(k, k): [v] if k in {"source", "variant"} else v for k, v in how.items()}
    return call("top_influence", query=query, **how), lambda store: store.top(query, **python)


SMALL = {"sketcher": "small"}
ERRORS = [
    top_error("q1000"),
    top_error(checkpoint="bas"),
    top_error(sketcher="smal"),
    top_error(sketcher="lark"),
    top_error(source="song"),
    top_error(variant="chat"),
    top_error(queries="tests"),
    top_error(queries="songs"),
    top_error(query_variant="raw"),
    top_error(query_checkpoint="x"),
    top_error(method="cos"),
    top_error(k=0),
    top_error(condition="yeer > 3"),
    top_error(condition=""),
    top_error(condition="false"),
    (call("ft_pt", checkpoint="bas", **SMALL), lambda s: s.ft_pt("bas", **SMALL)),
    (call("ft_pt", method="bm", **AT), lambda s: s.ft_pt("base", method="bm", **SMALL)),
    (call("trajectory", query="q1", sample_id="sea-1", **SMALL), lambda s: s.trajectory("q1", "sea-1", **SMALL)),
    (call("trajectory", query="q100", sample_id="see", **SMALL), lambda s: s.trajectory("q100", "see", **SMALL)),
    (call("similar_text", query="q1000"), lambda s: s.similar_text("q1000")),
    (call("similar_text", query="q100", source="song"), lambda s: s.similar_text("q100", sources=["song"])),
    (call("similar_text", query="q100", text="x"), lambda s: s.similar_text("q100", text="x")),
    (call("similar_text", query="q100", k=0), lambda s: s.similar_text("q100", k=0)),
]


@pytest.mark.parametrize(("query", "python"), ERRORS, ids=[query for query, _ in ERRORS])
def test_errors_are_those_of_python(reader, scored_path, query, python):
    with pytest.raises(LarkStoreError) as expected:
        python(reader)
    with pytest.raises(type(expected.value)) as raised:
        reader.sql(f"from {query}")
    assert str(raised.value) == str(expected.value)
    assert raised.value.hint
    printed = lark("sql", f"from {query}", store=scored_path)
    assert (printed.code, printed.out, printed.err) == (1, "", f"error: {expected.value}\n")


def test_a_missing_part_of_the_question_is_named(reader):
    with pytest.raises(InputError, match=r"`checkpoint` is missing\n\nhint: for example `checkpoint := 'epoch-2'`"):
        reader.sql("from top_influence(query := 'q100')")
    with pytest.raises(InputError, match="`k` is missing\n\nhint: for example `k := 10`"):
        reader.sql(f"from {call('top_influence', query='q100', k=None, **AT)}")
    with pytest.raises(NameUnknownError, match=r"no query `q99`\n\nhint: "):
        reader.sql(f"from {call('ft_pt', query='q99', **AT)}")


@pytest.mark.parametrize(
    "query",
    [
        "from top_influence('base', 'q100', 'many', sketcher := 'small')",
        "from top_influence('base', 'q100', 30000000000, sketcher := 'small')",
        "from top_influence('base', 'q100', [1], sketcher := 'small')",
        "from top_influence('base', 'q100', opponents := 'perhaps', sketcher := 'small')",
        "from top_influence('base', 'q100', sources := 'songs')",
        "from top_influence(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)",
        "select top_influence('base', 'q100')",
        "select _top_influence({'checkpoint': 'base'})",
        "select _top_influence(1)",
    ],
)
def test_arguments_of_wrong_types_are_errors_of_sql(reader, query):
    with pytest.raises(QueryError) as raised:
        reader.sql(query)
    assert "Traceback" not in str(raised.value)


def test_arguments_are_cast_and_may_be_parameters(reader):
    expected = reader.sql(f"from {call('top_influence', query='q100', k=3, **AT)}")
    for query, parameters in (
        ("from top_influence('base', 'q100', '3', sketcher := 'small', opponents := 'no')", None),
        ("from top_influence(?, ?, ?, sketcher := ?)", ["base", "q100", 3, "small"]),
        ("from top_influence($c, $q, k := $k, sketcher := $s)", {"c": "base", "q": "q100", "k": 3, "s": "small"}),
    ):
        assert_frame_equal(reader.sql(query, parameters), expected)


TOP5 = call("top_influence", query="q100", k=5, **AT)


@pytest.mark.parametrize(
    ("query", "n"),
    [
        (f"with t as (from {TOP5}) from t where rank <= 2", 2),
        (f"select * from (select source, rank from {TOP5}) where rank = 1", 1),
        (f"from {TOP5} qualify row_number() over (partition by source order by score) = 1", 2),
        (f"from {TOP5} t join samples s using (source, sample_id)", 5),
        (f"from {TOP5} t join sketches k using (source, variant, sample_id, checkpoint)", 5),
        (f"from {TOP5} union all from {TOP5}", 10),
        (f"from {TOP5} a join {TOP5} b using (rank)", 5),
        (f"from samples where sample_id in (select sample_id from {TOP5})", 5),
        (f"select count(*) from {TOP5} group by source", 2),
        ("from range(3) r, lateral top_influence('base', 'q100', sketcher := 'small', k := (r.range + 1)::int)", 6),
        (f"explain from {TOP5}", 1),
        (f"explain analyze from {TOP5}", 1),
        (f"from {TOP5} limit 2", 2),
    ],
)
def test_functions_stand_where_tables_stand(reader, query, n):
    assert len(reader.sql(query)) == n


@pytest.mark.parametrize(
    "query",
    [
        "from range(1, 1000000) r, lateral top_influence('base', 'q100', sketcher := 'small', k := r.range::int) t",
        "from range(1, 1000000) r, lateral similar_text('q100', k := r.range::int) t",
        "from range(1, 1000000) r, lateral trajectory('q100', 'sea-' || r.range % 5, sketcher := 'small') t",
    ],
)
def test_a_running_table_function_is_ended(reader, query):
    with pytest.raises(QueryError, match=r"longer than 0\.5 s"):
        reader.sql(f"select count(*) {query}", timeout=0.5)
    until = time.monotonic() + 30
    while any(thread.name == "lark-store-query" for thread in threading.enumerate()):
        assert time.monotonic() < until, "the work goes on"
        time.sleep(0.05)


def test_a_search_heeds_the_end_of_its_query_at_each_batch(reader, monkeypatch):
    from lark_store.query.groups import Wanted, ask
    from lark_store.query.top import Ranking, top

    stop = Stop()
    fetched = Rows._scanned

    def ends(self, *args):
        for batch in fetched(self, *args):
            stop.end(QueryError("it ends", "as it must"))
            yield batch

    monkeypatch.setattr(Rows, "_scanned", ends)
    with pytest.raises(QueryError, match="it ends"):
        top(reader._db, ["q100"], ask(reader._db, Wanted(["base"], "small")), Ranking(check=stop.check))


def test_a_query_in_two_sources_is_told_apart_by_name(scored_copy, tmp_path):
    scored_copy.source_add("again", write_jsonl(tmp_path / "a.jsonl", qa_rows(4, start=100)), stage="query")
    scored_copy.ingest(["base"], ["again"], ["chatml"], sketcher="small")
    with pytest.raises(NothingToScoreError, match=r"query `q100` is in `test`, `again`\n\nhint: say which with"):
        scored_copy.sql(f"from {TOP5}")
    made = scored_copy.sql(f"from {call('top_influence', query='q100', queries='again', k=5, **AT)}")
    assert_frame_equal(made, scored_copy.sql(f"from {call('top_influence', query='q100', queries='test', k=5, **AT)}"))
    assert len(scored_copy.ft_pt("base", sketcher="small")) == 32
    assert set(scored_copy.trajectory("q100", "sea-1", sketcher="small")["queries"]) == {"test", "again"}


PROGRAMS = [
    (["sql", f"select sample_id from {TOP5}"], ""),
    (
        ["top", "q100", "-c", "base", "--sketcher", "small", "--where", "n_tokens > 3"],
        "exact small · cosine over 26 sketches",
    ),
    (["sql", "from top_influence('base', 'q9', sketcher := 'small')"], "error: no query `q9`"),
]


@pytest.mark.parametrize(("arguments", "message"), PROGRAMS, ids=[words[0] + words[1][:20] for words, _ in PROGRAMS])
def test_the_program_says_nothing_but_its_messages(scored_path, arguments, message):
    done = run(PROGRAM, *arguments, "--format", "json", LARK_STORE=named(scored_path))
    assert done.returncode == (1 if message.startswith("error") else 0), done.stderr
    assert done.stderr.startswith(message)
    assert "leak" not in done.stderr
    assert "Traceback" not in done.stderr
    if not message:
        assert done.stderr == ""
    assert (done.stdout == "") == (done.returncode == 1)
    if done.stdout:
        assert json.loads(done.stdout)


def test_an_answer_does_not_change_the_store(scored_path, tmp_path):
    path = copy_store(scored_path, tmp_path / "lark.store")
    before = sorted(str(p.relative_to(path)) for p in path.rglob("*"))
    with Store.open(path) as opened:
        opened.sql(f"from {TOP5}")
        opened.top("q100", method="hybrid", **AT)
        opened.similar_text("q100")
        opened.self_influence(checkpoints=["base"], sketcher="small")
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if "catalog" not in p.name) == [
        name for name in before if "catalog" not in name
    ]
