"""SQL's limits: time, memory, rows and Ctrl-C; parameters, plans, and Python inside a query."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import polars as pl
import pytest

from lark_store.errors import InputError, NameUnknownError, QueryError
from lark_store.query.sql import limits
from lark_store.query.sql.columns import Column
from lark_store.query.sql.engine import connect, fetch
from lark_store.query.sql.functions import FUNCTIONS, Function
from lark_store.query.sql.limits import Stop, is_held_up
from lark_store.query.sql.overview import schema
from lark_store.query.sql.reference import reference

# Each would take more time or memory than a machine has.
TOO_LONG = [
    "SELECT count(*) FROM range(1000000000) a, range(1000000000) b WHERE a.range * b.range % 7 = 3",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT 1 FROM t) FROM t LIMIT 1000000000 OFFSET 999999999999",
    "EXPLAIN ANALYZE SELECT sum(a.range + b.range) FROM range(1000000000) a, range(1000000000) b",
]
TOO_LARGE = [
    "SELECT list(range) FROM range(1000000000)",
    "SELECT string_agg(repeat('x', 1000), '') FROM range(100000000)",
    "SELECT count(*) FROM (SELECT DISTINCT range, hash(range) FROM range(1000000000))",
    "SELECT repeat('x', 1000000) FROM range(1000)",
    "SELECT range, range * 2 FROM range(1000000000)",
    "SELECT range, md5(range::VARCHAR) m FROM range(1000000000) ORDER BY m",
    "SELECT histogram(range) FROM range(1000000000)",
    "SELECT range(30000000)",
]


@pytest.mark.parametrize("query", TOO_LONG)
def test_too_long_query_is_interrupted(scored, query):
    with pytest.raises(QueryError, match=r"^the query ran longer than 0\.3 s\n\nhint: .*`timeout`"):
        scored.sql(query, timeout=0.3)
    assert scored.sql("SELECT 1", timeout=30).item() == 1


@pytest.mark.parametrize("query", TOO_LARGE)
def test_too_large_query_or_result_is_refused(scored, query):
    with pytest.raises(QueryError, match=r"exceeded its memory limit\n\nhint: .*`memory`"):
        scored.sql(query, memory="100MB")


@pytest.mark.parametrize("memory", ["", "much", "-1GB", "0", "4 apples", "80%"])
def test_a_size_of_memory_is_a_number_with_a_unit(scored, memory):
    with pytest.raises(InputError, match=f"`{memory}` is not a memory size"):
        scored.sql("SELECT 1", memory=memory)


@pytest.mark.parametrize("rows", [0, 1, 8191, 8192, 8193, 20_000, 30_000])
def test_long_result_is_cut_to_its_first_rows(scored, rows):
    frame = scored.sql("SELECT range AS a, 'x' AS b FROM range(20000)", max_rows=rows)
    assert frame["a"].to_list() == list(range(min(rows, 20_000)))
    assert frame.schema == {"a": pl.Int64, "b": pl.String}


def test_endless_result_stops_after_its_first_rows(scored):
    assert len(scored.sql("FROM range(1000000000000)", max_rows=10, timeout=30)) == 10


@pytest.mark.parametrize(
    ("query", "parameters", "rows"),
    [
        ("SELECT sample_id FROM samples WHERE source = $s AND sample_id = $i", {"s": "test", "i": "q100"}, [("q100",)]),
        ("SELECT sample_id FROM samples WHERE source = ? AND sample_id = ?", ["test", "q100"], [("q100",)]),
        ("SELECT $2, $1", ("it's", 2), [(2, "it's")]),
        ("SELECT $a, $a IS NULL", {"a": None}, [(None, True)]),
        ("SELECT count(*) FROM samples WHERE sample_id IN (SELECT unnest($ids))", {"ids": ["q100", "q101"]}, [(2,)]),
        ("SELECT '$x', '?'", None, [("$x", "?")]),
    ],
)
def test_parameters_are_values_by_name_or_by_place(scored, query, parameters, rows):
    assert scored.sql(query, parameters).rows() == rows


@pytest.mark.parametrize(("query", "parameters"), [("SELECT $a", {"b": 1}), ("SELECT ?", []), ("SELECT ?", [1, 2])])
def test_mismatched_parameters_are_an_error(scored, query, parameters):
    with pytest.raises(QueryError):
        scored.sql(query, parameters)


def test_a_plan_is_explained(scored):
    plan = scored.sql("EXPLAIN SELECT source, max(rank) FROM influence GROUP BY source")
    assert plan.columns == ["explain_key", "explain_value"]
    assert "Group" in plan["explain_value"].item()


def slow(stop):
    """Register a function that never ends unless `stop` says so, as a table function of Python would."""

    def spin(_):
        while True:
            stop.check()
            time.sleep(0.01)

    return lambda connection: connection.create_function("spin", spin, ["BIGINT"], "BIGINT")


@pytest.mark.parametrize("kind", [QueryError, NameUnknownError])
def test_python_in_a_query_is_interrupted_with_the_reason(scored, kind):
    stop = Stop()
    connection = connect(scored._db, stop=stop)
    slow(stop)(connection)
    threading.Timer(0.2, lambda: stop.end(kind("it ends", "as it must"))).start()
    with pytest.raises(kind, match=r"^it ends\n\nhint: as it must$"):
        stop.watch(lambda: fetch(connection, "SELECT spin(1)"), connection.interrupt)
    assert stop.expired
    connection.close()


def test_a_table_function_is_registered_documented_and_stopped(scored, monkeypatch):
    def endless(_, calls, stop):
        assert calls == [{"x": 1}]
        while True:
            stop.check()
            time.sleep(0.01)

    function = Function("spin", "Never ends", {"x": ("BIGINT", "NULL")}, {"n": Column("BIGINT", "a number")}, endless)
    monkeypatch.setitem(FUNCTIONS, "spin", function)
    with pytest.raises(QueryError, match="longer than 0\\.5 s"):
        scored.sql("FROM spin(x := 1)", timeout=0.5)
    with pytest.raises(QueryError, match=r"the views are .*, spin\(\);"):
        scored.sql("FROM nothing")
    assert schema()["spin"].rows() == [("x :=", "BIGINT", "an argument, default NULL"), ("n", "BIGINT", "a number")]
    assert schema()["views"].row(-1) == ("spin()", "Never ends")
    assert "### `spin(x := NULL)`\n\nNever ends.\n" in reference()


def test_ctrl_c_ends_a_query_and_the_store_stays_usable(scored):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            scored.sql(TOO_LONG[0], timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert scored.sql("SELECT 1").item() == 1


def test_failed_query_is_not_mistaken_for_a_blocked_one(monkeypatch):
    class Slow(threading.Event):
        """Its thread goes on for a moment."""

        def set(self):
            super().set()
            time.sleep(0.1)

    for thread in threading.enumerate():
        if thread.name == limits._THREAD:
            thread.join()  # the blocked query of an earlier test
    monkeypatch.setattr(threading, "Event", Slow)

    def work():
        raise QueryError("it failed", "mend it")

    with pytest.raises(QueryError, match="it failed"):
        Stop().watch(work, interrupt=lambda: None)
    assert not is_held_up()


# DuckDB reads these in tens of seconds, and Python stands still meanwhile: nested parentheses, and a long list.
SLOW_TO_READ = {
    "parentheses": "SELECT " + "(" * 4000,
    "list": f"SELECT 1 WHERE 1 IN ({','.join('1' for _ in range(450_000))})",
}
READ = """
import os, sys, time
from lark_store import Store
from lark_store.errors import LarkStoreError
store, query = Store.open(sys.argv[1]), open(sys.argv[2]).read()
store.sql("SELECT 1")
begun = time.monotonic()
try:
    store.sql(query, timeout=1.0)
except LarkStoreError as error:
    print(f"{time.monotonic() - begun:.1f} {error}", flush=True)
os._exit(0)  # a thread still reads
"""


@pytest.mark.folder
@pytest.mark.parametrize("kind", SLOW_TO_READ)
def test_time_limit_covers_parsing(scored_path, tmp_path, kind):
    (tmp_path / "q.sql").write_text(SLOW_TO_READ[kind], encoding="utf-8")
    command = [sys.executable, "-c", READ, str(scored_path), str(tmp_path / "q.sql")]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seconds, _, output = completed.stdout.strip().partition(" ")
    assert output.startswith("the query ran longer than 1 s")
    assert float(seconds) < 8  # 1 s, two seconds of grace, and a busy machine


def test_sql_length_is_limited(scored):
    query = f"SELECT 1 WHERE 1 IN ({','.join(map(str, range(200_000)))})"
    for use in (lambda: scored.sql(query), lambda: scored.export(query, "x.csv")):
        with pytest.raises(QueryError, match=r"^the SQL has 1,288,\d+ characters; the limit is 1,000,000\n\nhint: "):
            use()
    with pytest.raises(QueryError, match="characters; the limit is 1,000,000"):
        scored.top("q100", checkpoint="base", sketcher="small", where=f"n_tokens IN ({query[22:-1]})")
    ids = [f"q{i}" for i in range(300_000)]
    rows = scored.sql("SELECT count(*) FROM samples WHERE sample_id IN (SELECT unnest($ids))", {"ids": ids})
    assert rows.item() == 10


@pytest.mark.parametrize("rows", [499, 501, 20_000])
def test_long_sql_parses_like_short_sql(scored, rows):
    query = f"SELECT count(*) FROM samples WHERE sample_id IN ({', '.join(repr(f'q{i}') for i in range(rows))})"
    assert scored.sql(query, timeout=60).item() == 10


def test_too_long_condition_hints_no_option(scored, monkeypatch):
    monkeypatch.setattr("lark_store.query.select.where._SECONDS", 0.2)
    condition = "(SELECT count(*) FROM range(1000000000) a, range(1000000000) b WHERE a.range * b.range % 7 = 3) > 0"
    with pytest.raises(QueryError, match=r"longer than 0\.2 s\n\nhint: simplify the query$"):
        scored.top("q100", checkpoint="base", sketcher="small", where=condition)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_table_function_passes_no_null(scored, name):
    with pytest.raises(InputError, match=rf"^`_{name}\(NULL\)` has no arguments\n\nhint: call `{name}\("):
        scored.sql(f"SELECT _{name}(NULL)")
