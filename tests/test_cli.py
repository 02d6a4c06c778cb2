"""The command line: every command on a small store, data alone on stdout, messages and exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
import typer.main
from conftest import named, qa_rows, write_jsonl

from lark_store import Store, evaluate, study
from lark_store.cli import app, main

PROGRAM = Path(sys.executable).with_name("lark-store")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def rows(self):
        return json.loads(self.out)

    def columns(self, *names):
        return [tuple(row[name] for name in names) for row in self.rows]


def lark(line, *args, store=None):
    """Run the program's `main` in this process: the words of a line, then arguments as they are."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["lark-store", *shlex.split(line), *map(str, args)])
        patch.setenv("LARK_STORE", str(store))  # also where there is none: the program itself sets it
        if store is None:
            patch.delenv("LARK_STORE")
        with pytest.raises(SystemExit) as stopped:
            main()
    return Result(stopped.value.code or 0, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("cli") / "lark.store"


@pytest.fixture(scope="module")
def made(place, checkpoints, texts):
    """Return what each command printed on the way to an attributed store."""
    changed = [{**qa_rows(1)[0], "answer": "changed"}, *qa_rows(8)[1:]]
    write_jsonl(place.parent / "changed.jsonl", changed)
    facts = "--epoch 1 --step 40 --learning-rate 2e-4 --metric accuracy=0.74 --metric f1=0.5 --model tiny"
    lines = {
        "init": "init",
        "checkpoint": f"checkpoint add base {checkpoints['base']} {facts}",
        "finetune": f"source add finetune {texts['finetune']} --stage finetune --domain medical --licence CC0-1.0",
        "songs": f"source add songs {texts['songs']} --stage pretrain",
        "test": f"source add test {texts['test']} --stage query --map label=answer",
        "variant": "variant add short --template chatml --max-length 64",
        "strict": "variant add strict --template chatml --max-length 2",
        "sketcher": "sketcher add tiny -k 256 --parameters layers --exclude norm",
        "dry": "ingest -c base -s finetune -s test -s songs --variant short --sketcher tiny --dry-run -f json",
        "limit": "ingest -c base -s songs --variant short --sketcher tiny --limit 2 -f json",
        "ingest": "ingest -c base -s finetune -s test -s songs --variant short --sketcher tiny -f json",
        "attribute": "attribute -c base --queries test --sketcher tiny --hits 3 -f json",
        "again": "attribute -c base --sketcher tiny --hits 3 -f json",
        "top": "top q100 -c base --sketcher tiny -k 3 -f json",
        "metrics": "metrics --sketcher tiny -f json",
        "sql": "sql 'SELECT label, count(*) AS n FROM samples GROUP BY ALL ORDER BY label NULLS LAST' -f json",
        "show": "show -f json",
        "preview": "variant show short --sample q0",
        "status": "db status -f json",
        "upgrade": "db upgrade",
        "failing": "ingest -c base -s finetune --variant strict --sketcher tiny -f json",
        "changed": f"source add finetune {place.parent / 'changed.jsonl'} --stage finetune",
    }
    return {name: lark(line, store=place) for name, line in lines.items()}


def test_every_command_succeeds_on_the_way_but_for_failed_samples_and_changed_rows(made):
    assert {name: result.code for name, result in made.items() if result.code} == {"failing": 1, "changed": 1}
    assert [name for name, result in made.items() if "Traceback" in result.out + result.err] == []


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("init", "made the store `"),
        ("checkpoint", "checkpoint `base`: tiny, weights "),
        ("finetune", "source `finetune`: 6 samples added, 0 there already\n"),
        ("variant", "variant `short`: chatml, targets auto, at most 64 tokens\n"),
        ("sketcher", "sketcher `tiny`: k = 256, seed 0, float16, only `layers`, without `norm`\n"),
        ("upgrade", "nothing to do\n"),
        ("changed", "source `finetune`: 2 samples added, 5 there already\n"),
    ],
)
def test_a_command_that_changes_the_store_says_so_on_stderr_alone(made, step, message):
    assert made[step].out == ""
    assert made[step].err.startswith(message)


def test_changed_rows_and_failed_samples_are_named_on_stderr(made):
    assert "  1 with an id that is there with other content, not taken: q0\n\nhint: " in made["changed"].err
    assert made["failing"].columns("n_sketched", "n_failed") == [(0, 6)]
    assert "6 samples failed; the SQL view `failures` has the reasons" in made["failing"].err
    assert "\n  finetune q0: " in made["failing"].err


def test_a_dry_run_counts_and_makes_nothing(made):
    planned = json.loads(made["dry"].out)
    assert [(unit["n_samples"], unit["bytes"]) for unit in planned["units"]] == [(n, n * 256 * 2) for n in (6, 4, 5)]
    assert planned["checkpoints"][0]["path"] == "BatchPath"
    assert "15 sketches to make: 0.0 MiB, about " in made["dry"].err
    assert made["limit"].columns("n_existing", "run") == [(0, 1)]


def test_an_ingest_does_what_its_limit_says_and_then_the_rest(made):
    assert made["limit"].columns("n_samples", "n_existing", "n_sketched") == [(2, 0, 2)]
    assert made["ingest"].columns("n_samples", "n_existing", "n_sketched") == [(6, 0, 6), (4, 0, 4), (5, 2, 3)]


def test_attribute_scores_each_group_once(made):
    scored = sorted(made["attribute"].columns("source", "n_samples", "status"))
    assert scored == [("finetune", 6, "scored"), ("songs", 5, "scored")]
    assert made["again"].columns("status") == [("current",)] * 2


def test_the_answers_are_data_on_stdout(made, place):
    assert made["top"].columns("rank") == [(1,), (2,), (3,)]
    assert made["top"].err.startswith("exact tiny · cosine over 11 sketches at `base`, query as `short`; ingest runs ")
    assert {"mean_max_influence", "ft_pt_ratio"} <= {row["metric"] for row in made["metrics"].rows}
    assert made["sql"].columns("label", "n") == [("maybe", 1), ("no", 2), ("yes", 1), (None, 11)]
    [checkpoint] = made["show"].rows["checkpoints"]
    assert (checkpoint["name"], checkpoint["metrics"], checkpoint["step"]) == ("base", "accuracy 0.74, f1 0.5", 40)
    assert "⟦yes⟧" in made["preview"].out
    assert "(rule `response`)" in made["preview"].err
    status = Store.db_status(place)
    assert made["status"].err == f"store {status.schema}, lark-store {status.newest}\n"
    assert made["status"].columns("table")[-2:] == [("catalog",), ("snapshots",)]
    assert "".join(made[step].err for step in ("metrics", "sql", "show")) == ""


def test_top_of_a_group_without_a_sketch_is_an_answer_or_an_error(made, place):
    assert made["failing"].code == 1
    result = lark("top q100 -c base --sketcher tiny --variant strict -f json", store=place)
    assert result.code in (0, 1)


def as_json(frame):
    return json.loads(frame.write_json())


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("", {}),
        ("-k 3 --opponents", {"k": 3, "opponents": True}),
        ("--source medical --source songs --variant raw", {"sources": ["medical", "songs"], "variants": ["raw"]}),
        ("--method dot --queries test --query-variant chatml", {"method": "dot"}),
        ("--query-checkpoint epoch-1", {"query_checkpoint": "epoch-1"}),
    ],
)
def test_top_is_that_of_the_api(scored, line, options):
    result = lark(f"top q101 -c base --sketcher small -f json {line}", "--store", scored.path)
    hits = scored.top("q101", checkpoint="base", sketcher="small", **options)
    assert (result.rows, result.err) == (as_json(hits.frame), hits.how + "\n")


@pytest.mark.parametrize("view", ["all", "influence", "dominance", "comparisons"])
def test_metrics_are_those_of_the_api(scored, view):
    result = lark(f"metrics --view {view} -c epoch-1 --sketcher small -f json", "--store", scored.path)
    assert result.rows == as_json(scored.metrics(view=view, checkpoint="epoch-1", sketcher="small"))


VALUES = "(VALUES ('a \"quote\", | and' || chr(10) || 'a line', 1234567, 0.1::DOUBLE), (NULL, -1, NULL)) t(x, n, f)"
READERS = {
    "json": lambda text: pl.DataFrame(json.loads(text)),
    "jsonl": lambda text: pl.read_ndjson(text.encode()),
    "csv": lambda text: pl.read_csv(text.encode()),
}


@pytest.mark.parametrize("form", READERS)
def test_rows_for_programs_come_whole_and_unrounded(scored, form):
    read = READERS[form](lark("sql", f"FROM {VALUES}", "-f", form, store=scored.path).out)
    assert read.rows() == [('a "quote", | and\na line', 1234567, 0.1), (None, -1, None)]


def test_rows_for_people_come_as_a_table_and_as_markdown(scored):
    table = lark("sql", f"FROM {VALUES}", store=scored.path).out
    assert [line.split()[-2:] for line in table.splitlines()[:3:2]] == [["n", "f"], ["1,234,567", "0.1000"]]
    header, rule, *rows = lark("sql", f"FROM {VALUES}", "-f", "md", store=scored.path).out.splitlines()
    assert [cell.strip() for cell in header.split("|")] == ["", "x", "n", "f", ""]
    assert set(rule) == set("|-")
    assert rows[0].startswith(r'| a "quote", \| and a line |')


@pytest.mark.parametrize(
    ("form", "query", "answer"),
    [
        ("json", "SELECT [1, 2] AS a, {'b': 'c'} AS d", '[{"a":[1,2],"d":{"b":"c"}}]\n'),
        ("jsonl", "SELECT * FROM samples WHERE false", ""),
        ("csv", "SELECT name, value FROM checkpoint_metrics WHERE false", "name,value\n"),
        ("json", "SELECT sum(n) AS n FROM (VALUES (1), (2)) t(n)", '[{"n":3}]\n'),
        ("csv", "SELECT [1, 2] AS a", 'a\n"[1, 2]"\n'),
        ("json", "SELECT 'a'::BLOB AS a", '[{"a":"61"}]\n'),
        ("md", 'SELECT 1 AS "a|b"', "| a\\|b |\n|------|\n|    1 |\n"),
    ],
)
def test_unusual_answers_are_printed_too(scored, form, query, answer):
    assert lark("sql", query, "-f", form, store=scored.path) == Result(0, answer, "")


@pytest.mark.parametrize("form", ["table", "json", "jsonl", "csv", "md"])
def test_show_names_every_kind_in_every_format(scored, form):
    result = lark("show", "-f", form, store=scored.path)
    assert (result.code, result.err) == (0, "")
    mark = {"csv": "# {}\n", "md": "## {}\n", "table": "{} ("}.get(form, '"{}": [')
    assert [kind for kind in scored.show().frames() if mark.format(kind) not in result.out] == []


@pytest.mark.folder
def test_the_store_is_the_option_else_the_environment_else_the_default(scored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lark("db status").err.startswith("error: there is no lark-store at `lark.store`\n")
    assert lark("db status", store="nowhere").err.startswith("error: there is no lark-store at `nowhere`\n")
    assert lark("db status", store=scored.path).code == 0
    assert lark("db status", "--store", scored.path, store="nowhere").code == 0
    assert lark("--store", scored.path, "db", "status", store="nowhere").code == 0
    assert lark("--store nowhere db status", "--store", scored.path).code == 0


SELECT = "the store is changed by its commands"
ERRORS = [
    ("top q100 -c epoch1 --sketcher small", "no checkpoint `epoch1`", "did you mean `epoch-1`?"),
    ("top q1000 -c base --sketcher small", "no query `q1000`", "did you mean `q100`?"),
    ("top q100 -c base --sketcher smal", "no sketcher `smal`", "did you mean `small`?"),
    ("top q100 -c base --sketcher small -s song", "no source `song`", "did you mean `songs`?"),
    ("top q100 -c base --sketcher small --variant rav", "no variant `rav`", "did you mean `raw`?"),
    ("top q100 -c base --sketcher small -k 0", "k = 0 is not from 1 to 1000000", "try `-k 10`"),
    ("ingest -c base -s finetun --variant raw", "no source `finetun`", "did you mean `finetune`?"),
    ("attribute -c base --queries tests", "no source `tests`", "did you mean `test`?"),
    ("metrics -c nothing", "no checkpoint `nothing`", "the store has `base`, `epoch-1`"),
    (
        "metrics --view most",
        "`most` is no view of the metrics",
        "the views are `all`, `influence`, `dominance`, `comparisons`",
    ),
    ("variant show chatm --sample q0", "no variant `chatm`", "did you mean `chatml`?"),
    ("variant show raw --sample kidney0", "no sample `kidney0`", "did you mean `kidney-0`?"),
    ("sql 'SELECT 1; SELECT 2'", "one SELECT is allowed, this is SELECT, SELECT", SELECT),
    ("sql 'DROP VIEW samples'", "one SELECT is allowed, this is DROP", SELECT),
    ("show --store {folder}", "there is no lark-store at `{folder}`", "make one with `lark-store init`"),
    ("init", "there is a store at `{store}` already", "use it as it is"),
    ("init --store {folder}", "there is something at `{folder}` already", "name another path with `--store PATH`"),
    ("source add a {folder}/no.csv --stage query", "there is no file `{folder}/no.csv`", "check the path"),
    ("source add a b.csv --stage query --map text", "`--map text` is not NAME=VALUE", "for example `--map text=abs"),
    ("source add a b.csv --stage train", "`train` is no stage", "a stage is one of `finetune`, `pretrain`, `query`"),
    ("checkpoint add a {folder}/no", "there is no checkpoint folder `{folder}/no`", "check the path"),
    ("checkpoint add a b --metric f1=x", "`--metric f1=x`: the value is no number", "for example `f1=0.74`"),
    ("variant add a --template {folder}/no", "`{folder}/no` is neither a built-in template nor a file", "use `raw`"),
    ("sketcher add A", "`A` can't be a name: ", "try `a`"),
    ("sketcher add a -k 1000", "k = 1000 is not a power of two from 256 to 1048576", "the paper's k is 65536"),
    ("metrics --sketcher smal", "no sketcher `smal`", "did you mean `small`?"),
    ("metrics --method dott", "`dott` is no method", "the methods are `cosine`, `dot`"),
    ("checkpoint add base {base} --metric f1=nan", "f1 is nan, not a finite number", "leave it out"),
    (f"sketcher add a --seed {10**20}", f"seed {10**20} is not from 0", ""),
    ("variant add a --template {folder}/latin.jinja", "`{folder}/latin.jinja`", ""),
    ("init --store {folder}/latin.jinja/a", "a store can't be made at", ""),
]


@pytest.mark.parametrize(("line", "fact", "hint"), ERRORS)
@pytest.mark.folder
def test_an_error_is_a_fact_and_a_hint_on_stderr_alone(scored_path, checkpoints, tmp_path, line, fact, hint):
    (tmp_path / "latin.jinja").write_bytes(b"{{ text }} \xe9")
    names = {"folder": tmp_path, "store": scored_path, "base": checkpoints["base"]}
    result = lark(line.format(**names), store=scored_path)
    assert (result.code, result.out) == (1, "")
    found, found_hint = result.err.removesuffix("\n").split("\n\nhint: ")
    assert found.startswith(f"error: {fact.format(**names)}")
    assert found_hint.startswith(hint)


@pytest.mark.parametrize(
    "line",
    ["tops", "top", "top q1", "show -f xml", "top q1 -c base -k many", "source add a b", "db", "sql 'SELECT 1' 2"],
)
def test_wrong_usage_ends_with_2(line, scored_path):
    result = lark(line, store=scored_path)
    assert result.code == 2
    assert "Usage: " in result.err + result.out
    assert "Traceback" not in result.err


def run(*command, **environment):
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_a_process_prints_data_alone_and_an_error_without_a_traceback(scored_path):
    done = run(PROGRAM, "sql", "SELECT count(*) AS n FROM sketches", "-f", "jsonl", LARK_STORE=named(scored_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, '{"n":60}\n', "")
    wrong = run(PROGRAM, "show", "--store", "nowhere")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: there is no lark-store at `nowhere`\n\nhint: make one")


HELP = "sys.argv[1:] = ['--help']; from lark_store.cli import main; main()"


@pytest.mark.parametrize("code", ["import lark_store", HELP])
def test_importing_and_helping_load_nothing_heavy(code):
    report = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    done = run(sys.executable, "-c", f"{report}; {code}")
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert (done.returncode, "lark_store" in loaded) == (0, True)
    assert loaded & {"torch", "transformers", "lancedb", "altair", "duckdb", "polars", "datasets"} == set()


INGEST = "ingest -c base -s songs --variant raw --sketcher small -f json --store"


def wait_for_a_commit(path):
    until = time.monotonic() + 120
    while time.monotonic() < until:
        with contextlib.closing(sqlite3.connect(f"file:{path}/catalog.sqlite?mode=ro", uri=True)) as db:
            if db.execute("SELECT 1 FROM ingest_run WHERE n_sketched > 0").fetchone():
                return
        time.sleep(0.01)
    pytest.fail("the ingest committed nothing in two minutes")


def interrupt(path):
    """Start an ingest as a process and send it SIGINT after its first commit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    command = [PROGRAM, *INGEST.split(), named(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    wait_for_a_commit(path)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, checkpoints):
    """Return an interrupted ingest, its run then, the same ingest once more, and how many sketches there are."""
    folder = tmp_path_factory.mktemp("interrupted")
    rows = [{"id": f"{i}", "text": f"A song about the sea and the night train, number {i}. " * 4} for i in range(250)]
    with Store.create(folder / "lark.store") as store:
        store.checkpoint_add("base", checkpoints["base"])
        store.source_add("songs", write_jsonl(folder / "songs.jsonl", rows), stage="pretrain")
        store.sketcher_add("small", k=1024)
        result = interrupt(store.path)
        run_then = store.sql("SELECT status, n_sketched FROM ingest_runs").row(0)
        again = lark(INGEST, store.path)
        counts = store.sql("SELECT count(*), count(DISTINCT sample_id) FROM sketches").row(0)
    return result, run_then, again, counts


def test_an_interrupted_ingest_ends_with_130_and_keeps_its_rows(interrupted):
    result, (status, n_sketched), _, _ = interrupted
    assert (result.code, result.out, status) == (130, "", "interrupted")
    assert 64 <= n_sketched < 250
    assert "Traceback" not in result.err


def test_an_interrupted_ingest_says_how_to_go_on(interrupted):
    last = "interrupted\n\nhint: what was written is kept; run the command again to go on\n"
    assert interrupted[0].err.endswith(last)


def test_an_interrupted_ingest_is_completed_by_the_next(interrupted):
    _, (_, n_sketched), again, counts = interrupted
    assert again.columns("n_samples", "n_existing") == [(250, n_sketched)]
    assert counts == (250, 250)


def test_the_report_of_a_continued_ingest_adds_up(interrupted):
    [row] = interrupted[2].rows
    assert row["n_existing"] + row["n_sketched"] + row["n_failed"] == row["n_samples"]


def tree(group, *path):
    for name, command in group.commands.items():
        yield ((*path, name), command)
        yield from tree(command, *path, name) if hasattr(command, "commands") else ()


COMMANDS = dict(tree(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_command_and_each_of_its_parameters_has_a_help_text(path):
    command = COMMANDS[path]
    assert command.help.strip()
    assert [parameter.name for parameter in command.params if not (parameter.help or "").strip()] == []


def test_each_command_is_a_method_of_the_store_and_each_method_a_command():
    leaves = {"_".join(path) for path, command in COMMANDS.items() if not hasattr(command, "commands")}
    methods = {name for name in dir(Store) if not name.startswith("_") and callable(getattr(Store, name))}
    twins = {
        "create" if name == "init" else name.replace("-", "_")
        for name in leaves
        if not name.startswith(("study_", "evaluate_"))
    }
    assert twins == methods - {"open", "close", "study_keep", "evaluation_keep"}
    assert {name for name in leaves if name.startswith("study_")} == {f"study_{name}" for name in study.__all__}
    kinds = {name.removeprefix("evaluate_") for name in leaves if name.startswith("evaluate_")}
    assert {kind.replace("-", "_") for kind in kinds} == set(evaluate.__all__) - {"Outcome", "Scorer"}
