"""The SQL shell, driven through a pipe as by a keyboard: queries, commands, completion, errors and history."""

from __future__ import annotations

import os
import signal
import threading
import time
from stat import S_IMODE

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from lark_store.cli.shell import Shell, SqlCompleter, history_path, is_complete
from lark_store.cli.sql import QueryRunner
from lark_store.query.sql.views import VIEWS

TAB, CTRL_C, CTRL_D, UP = "\t", "\x03", "\x04", "\x1b[A"


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def type_in(scored, capsys):
    """Return a function: it types a text into a fresh shell and returns the output."""

    def type_in(text, form="csv", max_rows=1000, store=scored):
        with create_pipe_input() as keyboard:
            keyboard.send_text(text)
            shell = Shell(
                QueryRunner(store, 60, "1GB", max_rows), form, terminal_input=keyboard, terminal_output=DummyOutput()
            )
            shell.run()
        return capsys.readouterr()

    return type_in


def test_query_ends_with_a_semicolon_and_may_span_lines(type_in):
    printed = type_in("select count(*) as n\nfrom samples\nwhere source = 'test';\n" + CTRL_D)
    assert printed.out == "n\n4\n"


def test_shell_answers_queries_until_exit(type_in):
    assert type_in("select 1 as a;\n;\n\nselect 2 as b;\n\\q\nselect 3 as c;\n").out == "a\n1\nb\n2\n"


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("select 1", False),
        ("select 1;  \n", True),
        ("select ';", False),
        ("select 'it''s;'", False),
        ("select 'it''s';", True),
        ('select 1 as ";";', True),
        ("select 1 -- one;", False),
        ("select 1; -- it's one", True),
        ("/* ' */ select 1;", True),
        ("\\d samples", True),
        ("  ", True),
    ],
)
def test_input_is_complete_at_its_semicolon(text, complete):
    assert is_complete(text) == complete


@pytest.mark.parametrize("wrong", ["select nothing;", "drop view samples;", "selec;", "from read_text('/etc/passwd');"])
def test_shell_continues_after_an_error(type_in, wrong):
    printed = type_in(f"{wrong}\nselect 1 as one;\n{CTRL_D}")
    assert printed.out == "one\n1\n"
    assert "\nerror: " in printed.err


def test_d_lists_views_or_columns(type_in):
    names = {line.partition(" ")[0] for line in type_in("\\d\n\\q\n").out.splitlines()}
    assert names >= set(VIEWS)
    printed = type_in("\\d self_influence;\n\\d sampels\n\\q\n")
    names = {line.partition(" ")[0] for line in printed.out.splitlines()}
    assert names >= set(VIEWS["self_influence"].columns)
    assert printed.err.endswith("error: no view `sampels`\n\nhint: did you mean `samples`?\n")


def test_f_switches_the_format(type_in):
    printed = type_in("\\f jsonl\nselect 1 as a;\n\\f md\nselect 1 as a;\n\\f xml\n\\q\n")
    assert printed.out.replace(" ", "") == '{"a":1}\n|a|\n|---|\n|1|\n'
    assert printed.err.endswith("the format is md; `\\f FORMAT` takes table, json, jsonl, csv, md\n")


def test_w_switches_wide_tables(type_in, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    query = "select 'word ' || repeat('word ', 30) as a, n from range(2) t(n);\n"
    narrow = type_in(f"\\f table\n{query}\\q\n")
    assert "… shortened · `\\w` prints everything" in narrow.out
    wide = type_in(f"\\f table\n\\w\n{query}\\w\n{query}\\q\n")
    assert wide.out.count("word " * 30) == 2
    assert wide.out.endswith(narrow.out)
    assert "tables are printed in full" in wide.err


def test_other_commands_are_explained(type_in):
    printed = type_in("\\?\n\\x\n\\q\n").err
    assert "\\d VIEW    list its columns" in printed
    assert printed.endswith("`\\x` is not a command\n\nhint: \\? lists the commands\n")


def test_rows_beyond_the_limit_are_cut(type_in):
    printed = type_in("from range(5);\n\\q\n", max_rows=2)
    assert printed.out == "range\n0\n1\n"
    assert "stopped after 2 rows" in printed.err


def test_ctrl_c_discards_the_input(type_in):
    printed = type_in(f"select nonsense{CTRL_C}select 1 as one;\n\\q\n")
    assert printed.out == "one\n1\n"
    assert printed.err.endswith("interrupted\n")


def test_ctrl_c_ends_only_the_running_query(type_in):
    def interrupt():
        while not any(thread.name == "lark-store-query" for thread in threading.enumerate()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    endless = "select count(*) from range(1000000000) a, range(1000000000) b where a.range * b.range % 7 = 3"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        printed = type_in(f"{endless};\nselect 1 as one;\n\\q\n")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (printed.out, printed.err.splitlines()[-1]) == ("one\n1\n", "interrupted")


def test_queries_see_earlier_commits(store, capsys):
    runner = QueryRunner(store, 60, "1GB", 1000)
    query = "select count(*) as n from sketches;\n"
    with create_pipe_input() as keyboard:
        shell = Shell(runner, "csv", terminal_input=keyboard, terminal_output=DummyOutput())
        keyboard.send_text(query + "\\q\n")
        shell.run()
        store.ingest(["base"], ["songs"], ["raw"], sketcher="small")
        keyboard.send_text(query + "\\q\n")
        shell.run()
    assert capsys.readouterr().out == "n\n0\nn\n5\n"


def test_history_is_private_and_recalled_with_the_arrow_key(type_in, state, scored):
    files = set(scored.path.rglob("*"))
    assert type_in("select 1 as one;\n\\q\n").out == "one\n1\n"
    history = state / "lark-store" / "sql_history"
    assert "+select 1 as one;\n" in history.read_text(encoding="utf-8")
    assert S_IMODE(history.stat().st_mode) == 0o600
    assert type_in(f"{UP}{UP}\n\\q\n").out == "one\n1\n"
    assert {path for path in set(scored.path.rglob("*")) - files if "sqlite" not in path.name} == set()


def test_history_is_in_the_users_state_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert history_path() == tmp_path / ".local" / "state" / "lark-store" / "sql_history"


def test_shell_works_without_a_writable_history(type_in, state):
    state.write_text("a file in the way", encoding="utf-8")
    printed = type_in("select 1 as one;\n\\q\n")
    assert printed.out == "one\n1\n"
    assert printed.err.startswith("the history is not saved: ")


def completed(text, after=""):
    result = SqlCompleter().get_completions(Document(text + after, len(text)), CompleteEvent())
    return [completion.text for completion in result]


@pytest.mark.parametrize(
    ("text", "after", "expected"),
    [
        ("select * from sketch", "", ["sketchers", "sketches"]),
        ("select * from samples s join self", "", ["self_influence"]),
        ("select * from samples, check", "", ["checkpoints", "checkpoint_metrics"]),
        ("select grad", " from sketches", ["grad_norm"]),
        ("select samples.con", " from samples", ["content_sha256"]),
        ("select i.ra", " from influence as i join samples s using (sample_id)", ["rank"]),
        ("select s.la", " from influence i join samples s using (sample_id)", ["label"]),
        ("select tra", "", ["tracin", "trajectory"]),
        ("select * from samples qua", "", ["QUALIFY", "quantile_cont"]),
        ("\\", "", ["\\d", "\\f", "\\w", "\\q", "\\?"]),
        ("\\d ing", "", ["ingest_runs"]),
        ("\\f js", "", ["json", "jsonl"]),
        ("select zzz", "", []),
    ],
)
def test_completion_knows_views_columns_aliases_and_keywords(text, after, expected):
    assert completed(text, after) == expected


def test_completion_offers_every_match_in_open_positions():
    offered = completed("")
    assert {*VIEWS, "tracin", "SELECT", "argmax"} <= set(offered)
    assert len(offered) == len(set(offered))


def test_tab_completes_in_the_shell(scored, capsys):
    with create_pipe_input() as keyboard:
        runner = QueryRunner(scored, 60, "1GB", 1000)
        shell = Shell(runner, "csv", terminal_input=keyboard, terminal_output=DummyOutput())
        buffer = shell._session.default_buffer

        def type_slowly():
            keyboard.send_text("select count(*) as n from checkpoint_m" + TAB)
            while "checkpoint_metrics" not in buffer.text:
                time.sleep(0.01)
            keyboard.send_text(";\n\\q\n")

        threading.Thread(target=type_slowly, daemon=True).start()
        shell.run()
    assert capsys.readouterr().out == "n\n2\n"
