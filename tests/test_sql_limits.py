"""SQL's limits: time, memory, rows and Ctrl-C; parameters, plans, and Python that computes inside a query."""

from __future__ import annotations

import os
import signal
import threading
import time

import polars as pl
import pytest

from lark_store.errors import InputError, NameUnknownError, QueryError
from lark_store.query.sql.engine import connect, fetch
from lark_store.query.sql.functions import FUNCTIONS, Function
from lark_store.query.sql.reference import reference
from lark_store.query.sql.stop import Stop, is_held_up
from lark_store.query.sql.views import Column, schema

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
def test_a_query_that_runs_too_long_is_ended(scored, query):
    with pytest.raises(QueryError, match=r"^the query ran longer than 0\.3 s\n\nhint: .*`--timeout`"):
        scored.sql(query, timeout=0.3)
    assert scored.sql("SELECT 1", timeout=30).item() == 1


@pytest.mark.parametrize("query", TOO_LARGE)
def test_a_query_or_a_result_that_is_too_large_is_ended(scored, query):
    with pytest.raises(QueryError, match=r"more memory than it may have\n\nhint: .*`--memory`"):
        scored.sql(query, memory="100MB")


@pytest.mark.parametrize("memory", ["", "much", "-1GB", "0", "4 apples", "80%"])
def test_a_size_of_memory_is_a_number_with_a_unit(scored, memory):
    with pytest.raises(InputError, match=f"`{memory}` is no size of memory"):
        scored.sql("SELECT 1", memory=memory)


@pytest.mark.parametrize("rows", [0, 1, 8191, 8192, 8193, 20_000, 30_000])
def test_of_a_long_result_the_first_rows_are_returned(scored, rows):
    frame = scored.sql("SELECT range AS a, 'x' AS b FROM range(20000)", max_rows=rows)
    assert frame["a"].to_list() == list(range(min(rows, 20_000)))
    assert frame.schema == {"a": pl.Int64, "b": pl.String}


def test_a_result_without_end_is_not_made_beyond_its_first_rows(scored):
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
def test_parameters_that_do_not_fit_are_an_error(scored, query, parameters):
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
def test_python_inside_of_a_query_heeds_its_end_and_the_asker_sees_why(scored, kind):
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
    assert schema()["spin"].rows() == [("x :=", "BIGINT", "an argument, by default NULL"), ("n", "BIGINT", "a number")]
    assert schema()["views"].row(-1) == ("spin()", "Never ends")
    assert "### `spin(x := NULL)`\n\nNever ends.\n" in reference()


def test_ctrl_c_ends_a_query_at_once_and_the_store_goes_on(scored):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            scored.sql(TOO_LONG[0], timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert scored.sql("SELECT 1").item() == 1


def test_a_query_that_has_failed_is_not_taken_for_one_that_is_held_up(monkeypatch):
    class Slow(threading.Event):
        """Its thread goes on for a moment."""

        def set(self):
            super().set()
            time.sleep(0.1)

    monkeypatch.setattr(threading, "Event", Slow)

    def work():
        raise QueryError("it failed", "mend it")

    with pytest.raises(QueryError, match="it failed"):
        Stop().watch(work, interrupt=lambda: None)
    assert not is_held_up()
