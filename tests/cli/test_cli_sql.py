"""The command `sql`: sources of a query, plans, the schema, limits and messages on stderr."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time

import pytest
from helpers.program import PROGRAM, lark, run_process
from helpers.stores import store_label

from lark_store.query.sql.functions import FUNCTIONS
from lark_store.query.sql.views import VIEWS

ENDLESS = "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range * b.range % 7 = 3"


@pytest.fixture
def typed(monkeypatch):
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.mark.parametrize("line", ["sql -f json", "sql - -f json"])
def test_query_from_stdin(scored_path, typed, line):
    typed("select count(*) as n -- all\nfrom samples;\n")
    result = lark(line, store=scored_path)
    assert (result.code, result.rows, result.err) == (0, [{"n": 20}], "")


def test_query_from_a_file(scored_path, tmp_path):
    (tmp_path / "q.sql").write_text("select 'é' as letter\n", encoding="utf-8")
    assert lark("sql -f json --file", tmp_path / "q.sql", store=scored_path).rows == [{"letter": "é"}]


def test_unreadable_query_file_is_named(scored_path, tmp_path):
    (tmp_path / "latin.sql").write_bytes(b"select '\xe9'")
    for name, reason in (("none.sql", "No such file or directory"), ("latin.sql", "it is not UTF-8 text")):
        result = lark("sql --file", tmp_path / name, store=scored_path)
        assert (result.code, result.out) == (1, "")
        assert result.err == f"error: `{tmp_path / name}` can't be read: {reason}\n\nhint: check the path\n"


def test_query_and_file_together_are_refused(scored_path):
    assert lark("sql 'select 1' --file q.sql", store=scored_path).code == 2


def test_plan_is_printed_without_running_the_query(scored_path):
    plan = lark(f"sql --explain '{ENDLESS}; -- all'", store=scored_path)
    assert (plan.code, plan.err) == (0, "")
    assert plan.out.startswith("╭─ ")
    assert plan.out == lark(f"sql 'explain {ENDLESS}'", store=scored_path).out
    assert [*lark("sql --explain 'select 1' -f json", store=scored_path).rows[0]] == ["explain_key", "explain_value"]
    assert lark("sql --explain 'select 1; select 2'", store=scored_path).code == 1


def test_schema_lists_every_view_and_column_without_a_store(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = lark("sql --schema -f json").rows
    assert [row["name"] for row in result["views"]] == [*VIEWS, *(f"{name}()" for name in FUNCTIONS)]
    assert [*result] == ["views", *VIEWS, *FUNCTIONS]
    assert result["self_influence"][-1]["column"] == "tracin"
    table = lark("sql --schema").out
    arguments = [row for row in result["top_influence"] if row["column"].endswith(" :=")]
    assert {"column": "k :=", "type": "INTEGER", "meaning": "an argument, default 10"} in arguments
    for name, view in VIEWS.items():
        assert f"\n{name} ({len(view.columns)})\n" in table
    assert " … " not in table


def test_rows_beyond_the_limit_are_cut_with_a_note_on_stderr(scored_path):
    cut = lark("sql 'from range(5)' --max-rows 3 -f csv", store=scored_path)
    assert (cut.code, cut.out.split()) == (0, ["range", "0", "1", "2"])
    assert cut.err == "stopped after 3 rows\n\nhint: `--max-rows N` prints more, `--max-rows 0` all\n"
    for enough in (5, 0):
        whole = lark(f"sql 'from range(5)' --max-rows {enough} -f csv", store=scored_path)
        assert (len(whole.out.split()), whole.err) == (6, "")


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (f"'{ENDLESS}' --timeout 0.3", "error: the query ran longer than 0.3 s\n\nhint: "),
        ("'from range(1000000000)' --max-rows 0 --memory 50MB", "error: the result exceeded its memory limit"),
        ("'select 1' --memory lots", "error: `lots` is not a memory size\n\nhint: for example `4GB`"),
    ],
)
def test_time_limit_ends_the_query(scored_path, options, fact):
    result = lark(f"sql {options}", store=scored_path)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(fact)


def test_uninterruptible_call_ends_with_the_process(scored_path):
    completed = run_process(
        PROGRAM, "sql", "select range(100000000)", "--timeout", "0.2", LARK_STORE=store_label(scored_path)
    )
    assert (completed.returncode, completed.stdout) == (1, "")
    assert completed.stderr == (
        "error: the query ran longer than 0.2 s\n\nhint: simplify the query, or raise the limit with `--timeout`\n"
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it interrupts any code, open files too
def test_ctrl_c_exits_with_130(scored_path, monkeypatch):
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


def test_slow_query_prints_no_progress_on_stdout(scored_path):
    completed = run_process(PROGRAM, "sql", ENDLESS, "--timeout", "4", LARK_STORE=store_label(scored_path))
    assert (completed.returncode, completed.stdout) == (1, "")
    assert completed.stderr.startswith("error: the query ran longer than 4 s")
