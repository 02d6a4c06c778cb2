"""Table functions: SQL, Python and the commands give the same rows and the same errors."""

from __future__ import annotations

import json
import re
import threading
import time

import polars as pl
import pytest
from helpers.program import PROGRAM, lark, run_process
from helpers.stores import copy_store, store_label
from helpers.texts import qa_rows, write_jsonl
from polars.testing import assert_frame_equal

from lark_store import Store
from lark_store.errors import InputError, LarkStoreError, NameUnknownError, NothingToScoreError, QueryError
from lark_store.query.scoring.prefilter import find_nearest
from lark_store.query.select.rows import Rows
from lark_store.query.sql.functions import FUNCTIONS
from lark_store.query.sql.limits import Stop
from lark_store.specs import SearchSpec

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
    """The printed rows of a command, in the types of a frame."""
    return pl.DataFrame(rows, schema=like.schema)


TOPS = [
    {"k": 3},
    {"k": 30, "opponents": True},
    {"method": "dot", "source": "songs", "variant": "raw"},
    {"method": "tracin", "k": 5},
    {"method": "bm25"},
    {"method": "bm25-okapi", "k": 1},
    {"method": "hybrid", "k": 7},
    {"method": "centred", "k": 4},
    {"method": "whitened", "variant": "raw"},
    {"over_checkpoints": "sum", "k": 4},
    {"method": "bm25plus", "k": 4},
    {"condition": "n_tokens < 30 and text is not null"},
    {"condition": "label is null and text like '%it''s%' or source = 'songs'", "opponents": True},
    {"query_checkpoint": "epoch-1"},
    {"queries": "test", "query_variant": "chatml"},
]


@pytest.mark.parametrize("arguments", TOPS, ids=str)
def test_top_influence_equals_top(reader, scored_path, arguments):
    rows = reader.sql(f"from {call('top_influence', query='q101', **AT, **arguments)}")
    settings = dict(arguments)
    settings |= {"where": settings.pop("condition", None)}
    settings |= {f"{name}s": [settings.pop(name)] for name in ("source", "variant") if name in settings}
    expected = reader.top("q101", **AT, **settings).frame
    assert rows.columns == list(FUNCTIONS["top_influence"].columns)
    assert set(rows["checkpoint"]) == {"base"}
    assert set(rows["query_id"]) == {"q101"}
    assert_frame_equal(rows.select(expected.columns), expected, check_exact=True)
    for name in set(PARTS) - set(expected.columns):
        assert rows[name].null_count() == len(rows)
    options = " ".join(
        f"--{ {'condition': 'where'}.get(name, name).replace('_', '-') }" + ("" if value is True else f' "{value}"')
        for name, value in arguments.items()
        if name != "k"
    )
    printed = lark(
        f"top q101 -c base --sketcher small -k {arguments.get('k', 10)} {options} -f json", store=scored_path
    )
    assert printed.code == 0, printed.err
    assert_frame_equal(from_json(printed.rows, expected), expected, rel_tol=1e-6)
    queried = lark("sql -f json", f"from {call('top_influence', query='q101', **AT, **arguments)}", store=scored_path)
    assert (queried.code, queried.err) == (0, "")
    assert_frame_equal(from_json(queried.rows, rows), rows, rel_tol=1e-6)


def test_many_queries_equal_single_queries(reader, monkeypatch):
    passes = []
    stream = Rows.stream

    def counted(self, *args, **kwargs):
        passes.append(1)
        return stream(self, *args, **kwargs)

    monkeypatch.setattr(Rows, "stream", counted)
    lateral = f"lateral {call('top_influence', k=4, **AT)[:-1]}, query := s.sample_id) t"
    rows = reader.sql(f"select t.* from samples s, {lateral} where s.source = 'test' order by query_id, rank")
    assert len(passes) == 1  # the sketches are read once for all
    alone = [reader.sql(f"from {call('top_influence', query=f'q10{i}', k=4, **AT)}") for i in range(4)]
    assert_frame_equal(rows, pl.concat(alone), rel_tol=1e-5, abs_tol=1e-6)
    subset = reader.sql(f"select s.i, t.* from (values (1, 'q103'), (2, null), (3, 'q103')) s(i, sample_id), {lateral}")
    assert subset.group_by("i").len().sort("i").rows() == [(1, 4), (3, 4)]
    assert_frame_equal(subset.filter(i=3).drop("i"), alone[3], rel_tol=1e-5, abs_tol=1e-6)


def test_rows_may_use_different_checkpoints(reader):
    lateral = (
        "lateral top_influence(checkpoint := c.name, query := 'q100', sketcher := 'small', k := c.epoch::int + 1) t"
    )
    rows = reader.sql(f"select t.* from checkpoints c, {lateral} order by t.checkpoint, rank")
    assert rows.select("checkpoint", "rank").rows() == [("base", 1), ("epoch-1", 1), ("epoch-1", 2)]
    for checkpoint in ("base", "epoch-1"):
        expected = reader.top("q100", checkpoint=checkpoint, sketcher="small", k=1).frame["score"].item()
        assert rows.filter(checkpoint=checkpoint)["score"][0] == expected


def test_query_without_sketch_has_no_rows(scored_copy, tmp_path):
    scored_copy.source_add("test", write_jsonl(tmp_path / "t.jsonl", qa_rows(1, start=900)), stage="query")
    lateral = f"lateral {call('top_influence', k=2, **AT)[:-1]}, query := s.sample_id) t"
    rows = scored_copy.sql(f"select t.* from samples s, {lateral} where s.source = 'test'")
    assert sorted(set(rows["query_id"])) == ["q100", "q101", "q102", "q103"]
    for alone in (
        call("top_influence", query="q900", **AT),
        call("ft_pt", query="q900", **AT),
        call("trajectory", query="q900", sample_id="sea-1", sketcher="small"),
        call("trajectory", query="q100", sample_id="sea-1", source="medical", sketcher="small"),
    ):
        assert scored_copy.sql(f"from {alone}").is_empty()
    with pytest.raises(NameUnknownError, match="no query `q900`"):
        scored_copy.top("q900", **AT)
    with pytest.raises(NothingToScoreError, match="query `q900` has no comparable `small` sketch"):
        scored_copy.trajectory("q900", "sea-1", sketcher="small")
    with pytest.raises(NameUnknownError, match="no query `q9`"):
        scored_copy.sql(f"select t.* from (values ('q9'), ('q100')) s(sample_id), {lateral}")


@pytest.mark.parametrize("arguments", [{}, {"method": "dot"}, {"queries": "test", "query_variant": "chatml"}], ids=str)
def test_ft_pt_function_equals_the_method(reader, scored_path, arguments):
    expected = reader.ft_pt("base", sketcher="small", **arguments)
    rows = reader.sql(f"from {call('ft_pt', **AT, **arguments)}")
    assert_frame_equal(rows, expected, check_exact=True)
    one = reader.sql(f"from {call('ft_pt', query='q102', **AT, **arguments)}")
    assert_frame_equal(one, expected.filter(query_id="q102"), check_exact=True)
    lateral = f"lateral {call('ft_pt', **AT, **arguments)[:-1]}, query := s.sample_id) t"
    beside = reader.sql(f"select t.* from samples s, {lateral} where s.source = 'test'")
    assert_frame_equal(beside, expected, check_exact=True, check_row_order=False)
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in arguments.items())
    printed = lark(f"ft-pt -c base --sketcher small {options} -f json", store=scored_path)
    assert_frame_equal(from_json(printed.rows, expected), expected, rel_tol=1e-6)


@pytest.mark.parametrize("arguments", [{}, {"method": "dot", "source": "songs"}, {"variant": "raw"}], ids=str)
def test_trajectory_function_equals_the_method(reader, scored_path, arguments):
    expected = reader.trajectory("q100", "sea-2", sketcher="small", **arguments)
    assert len(expected) == (2 if "variant" in arguments else 4)
    rows = reader.sql(f"from {call('trajectory', query='q100', sample_id='sea-2', sketcher='small', **arguments)}")
    assert_frame_equal(rows, expected, check_exact=True)
    options = " ".join(f"--{name} {value}" for name, value in arguments.items())
    printed = lark(f"trajectory q100 sea-2 --sketcher small {options} -f json", store=scored_path)
    assert_frame_equal(from_json(printed.rows, expected), expected, rel_tol=1e-6)
    lateral = "lateral trajectory(query := 'q100', sample_id := s.sample_id, sketcher := 'small') t"
    beside = reader.sql(f"select t.* from samples s, {lateral} where s.source = 'songs' order by all")
    alone = [reader.trajectory("q100", f"sea-{i}", sketcher="small") for i in range(5)]
    assert_frame_equal(beside, pl.concat(alone), check_row_order=False)


@pytest.mark.parametrize("options", [{"query": "q100"}, {"text": "it's the night train"}], ids=str)
@pytest.mark.parametrize("source", [None, "songs"])
def test_similar_text_function_equals_the_method(reader, scored_path, options, source):
    sources = [source] if source else []
    expected = reader.similar_text(**options, k=6, sources=sources)
    rows = reader.sql(f"from {call('similar_text', k=6, source=source, **options)}")
    assert_frame_equal(rows, expected, check_exact=True)
    words = [options["query"]] if "query" in options else ["--text", options["text"]]
    chosen = ["-s", source] if source else []
    printed = lark("similar-text -k 6 -f json", *words, *chosen, store=scored_path)
    assert_frame_equal(from_json(printed.rows, expected), expected, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("query", "missing"),
    [
        (call("top_influence", **AT), "query"),
        ("top_influence()", "checkpoint"),
        ("ft_pt()", "checkpoint"),
        (call("trajectory", sample_id="sea-1"), "query"),
        (call("trajectory", query="q100"), "sample_id"),
    ],
)
def test_missing_argument_is_named(reader, query, missing):
    with pytest.raises(InputError, match=rf"^`{missing}` is missing\n\nhint: for example `{missing} := '"):
        reader.sql(f"from {query}")


@pytest.mark.parametrize(
    "function",
    [
        f"{call('top_influence', **AT)[:-1]}, query := q.id)",
        "ft_pt(checkpoint := if(q.id is null, null, 'base'), query := q.id, sketcher := 'small')",
        "trajectory(query := q.id, sample_id := 'sea-1', sketcher := 'small')",
        "similar_text(query := q.id)",
    ],
)
def test_a_null_among_other_arguments_has_no_rows(reader, function):
    ids = "(values ('q100'), (null)) q(id)"
    rows = reader.sql(f"select q.id, count(*) as n from {ids}, lateral {function} t group by q.id")
    assert rows["id"].to_list() == ["q100"]
    assert rows["n"].item() > 0


def top_error(query="q100", **asked):
    """A call of `top_influence`, and the same question in Python."""
    settings = AT | asked
    names = {"source": "sources", "variant": "variants", "condition": "where"}
    python = {names.get(k, k): [v] if k in {"source", "variant"} else v for k, v in settings.items()}
    return call("top_influence", query=query, **settings), lambda store: store.top(query, **python)


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


def without_code(message):
    """Return a message without its quoted code, which SQL, Python and the command line spell differently."""
    return re.sub("`[^`]*`", "`…`", message)


@pytest.mark.parametrize(("query", "python"), ERRORS, ids=[query for query, _ in ERRORS])
def test_errors_equal_the_python_api(reader, scored_path, query, python):
    with pytest.raises(LarkStoreError) as expected:
        python(reader)
    with pytest.raises(type(expected.value)) as raised:
        reader.sql(f"from {query}")
    assert without_code(str(raised.value)) == without_code(str(expected.value))
    assert raised.value.hint
    printed = lark("sql", f"from {query}", store=scored_path)
    assert (printed.code, printed.out, printed.err) == (1, "", f"error: {raised.value.command_line}\n")


def test_missing_query_part_is_named(reader):
    with pytest.raises(InputError, match=r"`checkpoint` is missing\n\nhint: for example `checkpoint := 'epoch-2'`"):
        reader.sql("from top_influence(query := 'q100')")
    with pytest.raises(InputError, match="`k` is missing\n\nhint: for example `k := 10`"):
        reader.sql(f"from {call('top_influence', query='q100', k=None, **AT)}")
    with pytest.raises(NameUnknownError, match=r"no query `q99`\n\nhint: "):
        reader.sql(f"from {call('ft_pt', query='q99', **AT)}")


def test_hints_use_sql_argument_names(reader, scored_path):
    query = f"from {call('top_influence', query='q100', k=0, **AT)}"
    with pytest.raises(InputError, match=r"try `k := 10`") as expected:
        reader.sql(query)
    assert lark("sql", query, store=scored_path).err == f"error: {expected.value}\n"
    with pytest.raises(NothingToScoreError, match=r"\n\nhint: .*`sketcher := '"):
        reader.sql("from top_influence('base', 'q100', sketcher := 'adam')")


@pytest.mark.parametrize(
    "query",
    [
        "from top_influence('base', 'q100', 'many', sketcher := 'small')",
        "from top_influence('base', 'q100', 30000000000, sketcher := 'small')",
        "from top_influence('base', 'q100', [1], sketcher := 'small')",
        "from top_influence('base', 'q100', opponents := 'perhaps', sketcher := 'small')",
        "from top_influence('base', 'q100', sources := 'songs')",
        "from top_influence(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)",
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
def test_functions_are_usable_as_tables(reader, query, n):
    assert len(reader.sql(query)) == n


@pytest.mark.parametrize(
    "query",
    [
        "from range(1, 1000000) r, lateral top_influence('base', 'q100', sketcher := 'small', k := r.range::int) t",
        "from range(1, 1000000) r, lateral similar_text('q100', k := r.range::int) t",
        "from range(1, 1000000) r, lateral trajectory('q100', 'sea-' || r.range % 5, sketcher := 'small') t",
    ],
)
def test_running_table_function_is_interrupted(reader, query):
    with pytest.raises(QueryError, match=r"longer than 0\.5 s"):
        reader.sql(f"select count(*) {query}", timeout=0.5)
    until = time.monotonic() + 30
    while any(thread.name == "lark-store-query" for thread in threading.enumerate()):
        assert time.monotonic() < until, "the work goes on"
        time.sleep(0.05)


def test_search_stops_at_the_next_batch(reader, monkeypatch):
    from lark_store.query.answers.top import Ranking, top
    from lark_store.query.select.resolve import ask

    stop = Stop()
    fetched = Rows._scanned

    def ends(self, *args):
        for batch in fetched(self, *args):
            stop.end(QueryError("it ends", "as it must"))
            yield batch

    monkeypatch.setattr(Rows, "_scanned", ends)
    with pytest.raises(QueryError, match="it ends"):
        top(
            reader._db,
            ["q100"],
            ask(reader._db, SearchSpec(checkpoints=["base"], sketcher="small")),
            Ranking(check=stop.check),
        )


def test_query_in_two_sources_needs_a_source(scored_copy, tmp_path):
    scored_copy.source_add("again", write_jsonl(tmp_path / "a.jsonl", qa_rows(4, start=100)), stage="query")
    scored_copy.ingest(["base"], ["again"], ["chatml"], sketcher="small")
    with pytest.raises(NothingToScoreError, match=r"query `q100` is in `test`, `again`\n\nhint: choose one with"):
        scored_copy.sql(f"from {TOP5}")
    rows = scored_copy.sql(f"from {call('top_influence', query='q100', queries='again', k=5, **AT)}")
    assert_frame_equal(rows, scored_copy.sql(f"from {call('top_influence', query='q100', queries='test', k=5, **AT)}"))
    assert len(scored_copy.ft_pt("base", sketcher="small")) == 32
    assert set(scored_copy.trajectory("q100", "sea-1", sketcher="small")["queries"]) == {"test", "again"}
    with pytest.raises(InputError, match=r"query `q100` is in `(test|again)`, `"):
        scored_copy.similar_text("q100")
    with pytest.raises(InputError, match=r"several sources have queries\n\nhint: .*: test, again"):
        find_nearest(scored_copy._db, ["songs"], 2, "bm25", None)
    assert find_nearest(scored_copy._db, ["songs", "test"], 2, "bm25", "again").sources == ["songs"]


PROGRAMS = [
    (["sql", f"select sample_id from {TOP5}"], ""),
    (
        ["top", "q100", "-c", "base", "--sketcher", "small", "--where", "n_tokens > 3"],
        "exact small · cosine over 26 sketches",
    ),
    (["sql", "from top_influence('base', 'q9', sketcher := 'small')"], "error: no query `q9`"),
]


@pytest.mark.parametrize(("arguments", "message"), PROGRAMS, ids=[words[0] + words[1][:20] for words, _ in PROGRAMS])
def test_program_prints_only_its_messages(scored_path, arguments, message):
    completed = run_process(PROGRAM, *arguments, "--format", "json", LARK_STORE=store_label(scored_path))
    assert completed.returncode == (1 if message.startswith("error") else 0), completed.stderr
    assert completed.stderr.startswith(message)
    assert "leak" not in completed.stderr
    assert "Traceback" not in completed.stderr
    if not message:
        assert completed.stderr == ""
    assert (completed.stdout == "") == (completed.returncode == 1)
    if completed.stdout:
        assert json.loads(completed.stdout)


def test_queries_do_not_change_the_store(scored_path, tmp_path):
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
