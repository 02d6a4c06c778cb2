"""Printed tables: they fit into the terminal, and say so where they leave something out; `--wide` prints everything."""

from __future__ import annotations

import json

import polars as pl
import pytest
from helpers.program import lark
from typer.main import get_command

from lark_store.cli import app
from lark_store.cli.tables import print_markdown, print_table, terminal_width
from lark_store.display.table import About

TEMPLATE = "Answer the question with yes, no or maybe. Question: "
ROWS = pl.DataFrame(
    {
        "checkpoint": ["base", "epoch-1", "epoch-2"],
        "source": ["finetune"] * 3,
        "n": [1200, 1200, 1300],
        "score": [0.91688, None, -0.01],
        "text": ["short", "Context: " + "words " * 40 + "yes", "line\nbreak"],
    }
)


@pytest.fixture
def printed(monkeypatch, capsys):
    def run(frame, width, **options):
        monkeypatch.setenv("COLUMNS", str(width))
        print_table(frame, **options)
        return capsys.readouterr().out.splitlines()

    return run


def test_a_constant_column_is_a_line_above_the_table(printed):
    lines = printed(ROWS, 100, title="Scores")
    assert lines[:2] == ["Scores", "source finetune"]
    assert lines[2].split() == ["checkpoint", "n", "score", "text"]
    assert set(lines[3]) == {"─"}
    assert lines[4].split() == ["base", "1,200", "0.9169", "short"]
    assert lines[7].startswith("epoch-2     1,300  -0.0100  line break")


def test_facts_come_first_then_texts_then_numbers_then_empty_columns(printed):
    frame = pl.DataFrame({"x": [1, 2], "n": [3, 3], "label": [None, None], "scored_by": ["lark · cosine"] * 2})
    lines = printed(frame, 100, about=About(facts={"query": "q7"}))
    assert lines[0] == "query q7 · sketcher lark · method cosine · n 3 · empty: label"
    lines = printed(frame, 40, about=About(facts={"query": "q7"}))
    assert lines[:2] == ["query q7 · sketcher lark · method cosine", "n 3 · empty: label"]


def test_equal_cells_of_different_values_stay_in_the_table(printed):
    lines = printed(pl.DataFrame({"id": ["a", "b"], "cosine": [0.99999, 0.999991]}), 100)
    assert lines[0].split() == ["id", "cosine"]
    assert lines[2].split() == ["a", "1.0000"]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_broken(printed, width):
    lines = printed(ROWS, width)
    assert max(map(len, lines)) <= width
    words = {word for line in lines for word in line.split() if "─" not in word}
    complete = {word for line in printed(ROWS, 1000) for word in line.split()}
    assert words - complete <= {"…", "shortened", "·", "`--wide`", "prints", "everything"}


def test_a_shortened_text_keeps_its_end_and_is_announced(printed):
    lines = printed(ROWS, 80)
    assert lines[4].endswith("words")
    assert lines[5].endswith("words … words yes")
    assert lines[-2] == "… shortened · `--wide` prints everything"


def test_texts_with_one_beginning_are_shown_from_their_difference(printed):
    tail = " in a long text" * 9
    texts = [f"{TEMPLATE}is aspirin safe?{tail} yes", f"{TEMPLATE}was it kidney?{tail} no", f"A song{tail} about it"]
    lines = printed(pl.DataFrame({"rank": [1, 2, 3], "text": texts}), 60)
    starts = [line.split("  ")[-1].strip() for line in lines[2:] if line[:4].strip().isdigit()]
    assert [start[:14] for start in starts] == ["… is aspirin s", "… was it kidne", "A song in a lo"]
    assert printed(pl.DataFrame({"rank": [1, 2], "text": [TEMPLATE + "a", TEMPLATE + "b"]}), 100)[2].endswith(": a")


def test_whole_texts_are_wrapped_not_shortened(printed):
    lines = printed(ROWS, 60, about=About(whole=["text"]))
    assert " ".join(" ".join(lines).split()).count("words") == 40
    assert not any("shortened" in line for line in lines)


def test_hidden_columns_are_named(printed):
    frame = pl.DataFrame({f"column_{i}": [f"value {i}", f"other {i}"] for i in range(12)})
    lines = printed(frame.with_columns(text=pl.lit("word " * 30) + pl.col("column_0")), 80)
    hidden = " ".join(lines).partition("hidden: ")[2].partition(" `")[0].removesuffix(" ·").split(", ")
    shown = [name for name in frame.columns if name not in hidden]
    assert shown
    assert hidden == frame.columns[len(shown) :]
    assert "`--wide` prints everything" in lines[-2]
    assert max(map(len, lines)) <= 80


def test_the_columns_with_least_information_are_hidden_first(printed):
    names = ["rank", "score", "noise", "p_value", "source", "stage", "sample_id", "text"]
    frame = pl.DataFrame({name: [f"{name}-one", f"{name}-two"] for name in names})
    lines = printed(frame, 70)
    assert lines[-2] == "hidden: noise, stage · `--wide` prints everything"


def test_names_of_columns_break_after_underscores(printed):
    frame = pl.DataFrame({f"a_very_long_name_{i}": [i, i + 1] for i in range(9)})
    lines = printed(frame, 80)
    assert max(map(len, lines)) <= 80
    assert not any("hidden" in line for line in lines)
    assert lines[0].split() == ["a_very_"] * 9


def test_a_wide_single_row_is_a_list_of_values(printed):
    lines = printed(ROWS[1:2], 60)
    assert [line.split()[0] for line in lines[:5]] == ["checkpoint", "source", "n", "score", "text"]
    assert lines[0] == "checkpoint  epoch-1"
    assert printed(ROWS[:1], 60)[0].split() == ["checkpoint", "source", "n", "score", "text"]


def test_scores_are_explained(printed):
    frame = pl.DataFrame({"pair": ["a", "b"], "ratio": [1.5, 2.5], "noise": [0.01, 0.02], "p_value": [0.5, 0.04]})
    lines = printed(frame, 200, about=About(legend=["score: +1 is same"]))
    assert lines[-2] == (
        "score: +1 is same · noise: the score's standard deviation from sketching · "
        "p_value: a test of the difference, not of the ratio"
    )
    assert "ratio" not in printed(frame.drop("ratio"), 200)[-2]
    effects = pl.DataFrame({"metric": ["format_effect", "difference"], "value": [1.5, 2.5], "p_value": [0.5, 0.04]})
    assert printed(effects, 200)[-2].endswith("p_value: a test of the difference, not of the ratio")
    spread = frame.select("pair", r_median=pl.Series([1.5, None]))
    assert printed(spread, 200)[-2].startswith("r_median, r_q1, r_q3: median and quartiles of single queries' ratios")
    assert "quartiles" not in "".join(printed(spread.with_columns(r_median=None), 200))


def test_an_empty_table_has_its_header(printed):
    assert printed(ROWS[:0], 100)[0].split() == ["checkpoint", "source", "n", "score", "text"]


def test_wide_prints_all_columns_digits_and_texts(printed):
    frame = ROWS.with_columns(score=pl.Series([0.1234567891, 1e-12, None]), bytes=pl.lit(123456))
    lines = printed(frame, 20, wide=True)
    assert lines[0].split() == ["checkpoint", "source", "n", "score", "text", "bytes"]
    assert lines[2].split() == ["base", "finetune", "1200", "0.1234567891", "short", "123456"]
    assert ("words " * 40).strip() in lines[3]
    assert "1e-12" in lines[3]


def test_markdown_is_complete_and_exact(capsys):
    frame = pl.DataFrame({"a|b": ["x|y"] * 2, "text": ["word " * 30] * 2, "n": [0.123456789] * 2})
    print_markdown(frame)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["|", "a\\|b", "|", "text", "|", "n", "|"]
    assert lines[2] == f"| x\\|y | {('word ' * 30).strip()} | 0.123456789 |"


def test_a_table_is_divided_by_a_column(printed):
    frame = pl.DataFrame({"metric": ["a", "a", "b"], "against": [None, None, "x"], "value": [1.0, 2.0, 3.0]})
    lines = printed(frame, 100, by="metric")
    assert lines[:2] == ["a (2)", "empty: against"]
    assert lines[7] == "b (1)"
    assert printed(frame, 100, by="metric", wide=True)[0].split() == ["metric", "against", "value"]


def test_the_width_is_the_terminals_or_100(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("os.get_terminal_size", lambda _: (_ for _ in ()).throw(OSError))
    assert terminal_width() == 100
    monkeypatch.setenv("COLUMNS", "72")
    assert terminal_width() == 72


def commands(command=None, path=()):
    command = command or get_command(app)
    if not hasattr(command, "commands"):
        yield " ".join(path), {option for parameter in command.params for option in parameter.opts}
        return
    for name, child in command.commands.items():
        yield from commands(child, (*path, name))


def test_every_command_with_a_format_has_wide():
    options = dict(commands())
    with_format = {name for name, flags in options.items() if "--format" in flags}
    assert len(with_format) > 20
    assert "--wide" in options["study run"]
    assert with_format - {name for name, flags in options.items() if "--wide" in flags} == set()


LINES = [
    "top 100 -c epoch-1 --sketcher small",
    "top 100 -c epoch-1 --sketcher small --method hybrid",
    "ft-pt -c epoch-1 --sketcher small",
    "trajectory 100 0 --sketcher small",
    "show",
    "metrics --sketcher small",
    "metrics --view dominance --sketcher small",
    "coverage",
    "sql 'from ingest_runs'",
]


@pytest.mark.parametrize("line", LINES)
def test_answers_fit_into_100_columns(scored, monkeypatch, line):
    """Wide output, by contrast, has what the data formats have."""
    monkeypatch.setenv("COLUMNS", "100")
    query, sample = scored.sql(
        "select (select min(sample_id) from samples where source = 'test'), min(sample_id) "
        "from samples where source = 'finetune'"
    ).row(0)
    line = line.replace("100 0", f"{query} {sample}").replace("top 100", f"top {query}")
    result = lark(line, store=scored.path)
    assert result.code == 0, result.err
    assert max(map(len, result.out.splitlines())) <= 100
    if line != "show":
        rows = json.loads(lark(line, "-f", "json", store=scored.path).out)
        columns = [name for name in rows[0] if name != "note"]
        wide = lark(line, "--wide", store=scored.path).out.splitlines()
        assert wide[0].split() == columns
        assert len(wide) == len(rows) + 3


def test_hits_say_how_to_read_them(scored, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    query = scored.sql("select min(sample_id) from samples where source = 'test'").item()
    result = lark(f"top {query} -c epoch-1 --sketcher small -s finetune", store=scored.path)
    assert result.out.startswith(
        f"query {query} · checkpoint epoch-1 · sketcher small · method cosine · source finetune"
    )
    assert "score: +1 same direction as the query's gradient, −1 opposite direction" in result.out
