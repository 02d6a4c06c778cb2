"""The command `sql`: where a query comes from, plans, the schema, limits and what is said on stderr."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time

import pytest
from conftest import named
from test_cli import PROGRAM, lark, run

from lark_store.query.sql.functions import FUNCTIONS
from lark_store.query.sql.views import VIEWS

ENDLESS = "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range * b.range % 7 = 3"


@pytest.fixture
def typed(monkeypatch):
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.mark.parametrize("line", ["sql -f json", "sql - -f json"])
def test_a_query_is_read_from_stdin(scored_path, typed, line):
    typed("select count(*) as n -- all\nfrom samples;\n")
    result = lark(line, store=scored_path)
    assert (result.code, result.rows, result.err) == (0, [{"n": 20}], "")


def test_a_query_is_read_from_a_file(scored_path, tmp_path):
    (tmp_path / "q.sql").write_text("select 'é' as letter\n", encoding="utf-8")
    assert lark("sql -f json --file", tmp_path / "q.sql", store=scored_path).rows == [{"letter": "é"}]


def test_a_file_that_can_not_be_read_is_named(scored_path, tmp_path):
    (tmp_path / "latin.sql").write_bytes(b"select '\xe9'")
    for name, reason in (("none.sql", "No such file or directory"), ("latin.sql", "it is not UTF-8 text")):
        result = lark("sql --file", tmp_path / name, store=scored_path)
        assert (result.code, result.out) == (1, "")
        assert result.err == f"error: `{tmp_path / name}` can't be read: {reason}\n\nhint: check the path\n"


def test_a_query_and_a_file_are_wrong_usage(scored_path):
    assert lark("sql 'select 1' --file q.sql", store=scored_path).code == 2


def test_a_plan_is_printed_as_it_is_drawn_and_nothing_is_run(scored_path):
    plan = lark(f"sql --explain '{ENDLESS}; -- all'", store=scored_path)
    assert (plan.code, plan.err) == (0, "")
    assert plan.out.startswith("╭─ ")
    assert plan.out == lark(f"sql 'explain {ENDLESS}'", store=scored_path).out
    assert [*lark("sql --explain 'select 1' -f json", store=scored_path).rows[0]] == ["explain_key", "explain_value"]
    assert lark("sql --explain 'select 1; select 2'", store=scored_path).code == 1


def test_the_schema_needs_no_store_and_has_every_view_and_column():
    made = lark("sql --schema -f json").rows
    assert [row["name"] for row in made["views"]] == [*VIEWS, *(f"{name}()" for name in FUNCTIONS)]
    assert [*made] == ["views", *VIEWS, *FUNCTIONS]
    assert made["self_influence"][-1]["column"] == "tracin"
    table = lark("sql --schema").out
    arguments = [row for row in made["top_influence"] if row["column"].endswith(" :=")]
    assert {"column": "k :=", "type": "INTEGER", "meaning": "an argument, by default 10"} in arguments
    for name, view in VIEWS.items():
        assert f"\n{name} ({len(view.columns)})\n" in table
    assert " … " not in table


def test_more_rows_than_allowed_are_cut_with_a_word_on_stderr(scored_path):
    cut = lark("sql 'from range(5)' --max-rows 3 -f csv", store=scored_path)
    assert (cut.code, cut.out.split()) == (0, ["range", "0", "1", "2"])
    assert cut.err == "cut after 3 rows\n\nhint: `--max-rows N` prints more of them, 0 all\n"
    for enough in (5, 0):
        whole = lark(f"sql 'from range(5)' --max-rows {enough} -f csv", store=scored_path)
        assert (len(whole.out.split()), whole.err) == (6, "")


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (f"'{ENDLESS}' --timeout 0.3", "error: the query ran longer than 0.3 s\n\nhint: "),
        ("'from range(1000000000)' --max-rows 0 --memory 50MB", "error: the result needs more memory than it may have"),
        ("'select 1' --memory lots", "error: `lots` is no size of memory\n\nhint: for example `4GB`"),
    ],
)
def test_a_limit_ends_the_query(scored_path, options, fact):
    result = lark(f"sql {options}", store=scored_path)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(fact)


def test_a_call_that_can_not_be_interrupted_ends_with_the_process(scored_path):
    done = run(PROGRAM, "sql", "select range(100000000)", "--timeout", "0.2", LARK_STORE=named(scored_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: the query ran longer than 0.2 s\n\nhint: ask for less, or give it more with `--timeout`\n"
    )


def test_ctrl_c_ends_with_130(scored_path, monkeypatch):
    monkeypatch.setattr("os._exit", sys.exit)  # how it ends where a busy machine holds DuckDB up: not with this process
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt():
        while not any(thread.name == "lark-store-query" for thread in threading.enumerate()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    try:
        threading.Thread(target=interrupt, daemon=True).start()
        result = lark(f"sql '{ENDLESS}'", store=scored_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.code, result.out) == (130, "")
    assert "Traceback" not in result.err


def test_a_slow_query_draws_no_progress_on_stdout(scored_path):
    done = run(PROGRAM, "sql", ENDLESS, "--timeout", "4", LARK_STORE=named(scored_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the query ran longer than 4 s")
