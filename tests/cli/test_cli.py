"""The command line: every command on a small store, data alone on stdout, messages and exit codes."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import time

import polars as pl
import pytest
import typer.main
from helpers.program import PROGRAM, Result, lark, run_process
from helpers.stores import store_label
from helpers.texts import qa_rows, write_jsonl

from lark_store import Store, evaluate, study
from lark_store.cli import app


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("cli") / "lark.store"


@pytest.fixture(scope="module")
def outputs(place, checkpoints, texts):
    """Build an attributed store by commands; returns the output of each."""
    changed = [{**qa_rows(1)[0], "answer": "changed"}, *qa_rows(8)[1:]]
    write_jsonl(place.parent / "changed.jsonl", changed)
    facts = "--epoch 1 --step 40 --learning-rate 2e-4 --metric accuracy=0.74 --metric f1=0.5 --model tiny"
    lines = {
        "init": "init",
        "checkpoint": f"checkpoint add base {checkpoints['base']} {facts}",
        "finetune": f"source add finetune {texts['finetune']} --stage finetune --domain medical --licence CC0-1.0",
        "songs": f"source add songs {texts['songs']} --stage pretrain",
        "test": f"source add test {texts['test']} --stage query --column label=answer",
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


def test_commands_succeed_except_with_failed_samples_or_changed_rows(outputs):
    assert {name: result.code for name, result in outputs.items() if result.code} == {"failing": 1, "changed": 1}
    assert [name for name, result in outputs.items() if "Traceback" in result.out + result.err] == []


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("init", "created store `"),
        ("checkpoint", "checkpoint `base`: tiny, weights "),
        ("finetune", "source `finetune`: 6 samples added, 0 already stored\n"),
        ("variant", "variant `short`: chatml, targets auto, at most 64 tokens\n"),
        ("sketcher", "sketcher `tiny`: k = 256, seed 0, float16, only `layers`, without `norm`\n"),
        ("upgrade", "the schema is up to date\n"),
        ("changed", "source `finetune`: 2 samples added, 5 already stored\n"),
    ],
)
def test_commands_report_changes_on_stderr_only(outputs, step, message):
    assert outputs[step].out == ""
    assert outputs[step].err.startswith(message)


def test_stderr_names_changed_rows_and_failed_samples(outputs):
    assert "  1 rows skipped: their id exists with different content: q0\n\nhint: " in outputs["changed"].err
    assert outputs["failing"].columns("n_sketched", "n_failed") == [(0, 6)]
    assert "6 samples failed; the SQL view `failures` has the reasons" in outputs["failing"].err
    assert "\n  finetune q0: " in outputs["failing"].err


def test_dry_run_counts_and_writes_nothing(outputs):
    planned = json.loads(outputs["dry"].out)
    assert [(unit["n_samples"], unit["bytes"]) for unit in planned["units"]] == [(n, n * 256 * 2) for n in (6, 4, 5)]
    assert planned["checkpoints"][0]["path"] == "BatchPath"
    assert "15 sketches to compute: 7.5 KiB, about " in outputs["dry"].err
    assert outputs["limit"].columns("n_existing", "run") == [(0, 1)]


def test_ingest_respects_its_limit_and_later_completes(outputs):
    assert outputs["limit"].columns("n_samples", "n_existing", "n_sketched") == [(2, 0, 2)]
    assert outputs["ingest"].columns("n_samples", "n_existing", "n_sketched") == [(6, 0, 6), (4, 0, 4), (5, 2, 3)]


def test_attribute_scores_each_group_once(outputs):
    scored = sorted(outputs["attribute"].columns("source", "n_samples", "status"))
    assert scored == [("finetune", 6, "scored"), ("songs", 5, "scored")]
    assert outputs["again"].columns("status") == [("current",)] * 2


def test_answers_are_data_on_stdout(outputs, place):
    assert outputs["top"].columns("rank") == [(1,), (2,), (3,)]
    assert outputs["top"].err.startswith(
        "exact tiny · cosine over 11 sketches at `base`, query as `short`; ingest runs "
    )
    assert {"mean_max_influence", "ft_pt_ratio"} <= {row["metric"] for row in outputs["metrics"].rows}
    assert outputs["sql"].columns("label", "n") == [("maybe", 1), ("no", 2), ("yes", 1), (None, 11)]
    [checkpoint] = outputs["show"].rows["checkpoints"]
    assert (checkpoint["name"], checkpoint["metrics"], checkpoint["step"]) == ("base", "accuracy 0.74, f1 0.5", 40)
    assert "⟦yes⟧" in outputs["preview"].out
    assert "(rule `response`)" in outputs["preview"].err
    status = Store.db_status(place)
    assert outputs["status"].err == f"store {status.schema}, lark-store {status.newest}\n"
    assert outputs["status"].columns("table")[-2:] == [("catalog",), ("snapshots",)]
    assert "".join(outputs[step].err for step in ("metrics", "sql", "show")) == ""


def test_top_of_a_group_without_sketches_answers_or_fails_clearly(outputs, place):
    assert outputs["failing"].code == 1
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
def test_top_equals_the_api(scored, line, options):
    result = lark(f"top q101 -c base --sketcher small -f json {line}", "--store", scored.path)
    hits = scored.top("q101", checkpoint="base", sketcher="small", **options)
    assert (result.rows, result.err) == (as_json(hits.frame), hits.how + "\n")


@pytest.mark.parametrize("view", ["all", "influence", "dominance", "comparisons"])
def test_metrics_equal_the_api(scored, view):
    result = lark(f"metrics --view {view} -c epoch-1 --sketcher small -f json", "--store", scored.path)
    assert result.rows == as_json(scored.metrics(view=view, checkpoint="epoch-1", sketcher="small"))


@pytest.mark.parametrize("option", ["--column", "--map"])
def test_a_field_is_read_from_another_column(store, tmp_path, option):
    write_jsonl(tmp_path / "rows.jsonl", [{"name": "n1", "body": "A song about the sea."}])
    line = f"source add other {tmp_path / 'rows.jsonl'} --stage pretrain {option} text=body {option} sample_id=name"
    assert lark(line, store=store.path).code == 0
    assert store.sql("select sample_id, text from samples where source = 'other'").rows() == [
        ("n1", "A song about the sea.")
    ]
    assert "--map" not in lark("source add --help").out


VALUES = "(VALUES ('a \"quote\", | and' || chr(10) || 'a line', 1234567, 0.1::DOUBLE), (NULL, -1, NULL)) t(x, n, f)"
READERS = {
    "json": lambda text: pl.DataFrame(json.loads(text)),
    "jsonl": lambda text: pl.read_ndjson(text.encode()),
    "csv": lambda text: pl.read_csv(text.encode()),
}


@pytest.mark.parametrize("form", READERS)
def test_machine_formats_are_complete_and_unrounded(scored, form):
    read = READERS[form](lark("sql", f"FROM {VALUES}", "-f", form, store=scored.path).out)
    assert read.rows() == [('a "quote", | and\na line', 1234567, 0.1), (None, -1, None)]


def test_rows_are_printed_as_table_and_markdown(scored):
    table = lark("sql", f"FROM {VALUES}", store=scored.path).out
    assert [line.split()[-2:] for line in table.splitlines()[:3:2]] == [["n", "f"], ["1,234,567", "0.1"]]
    header, rule, *rows = lark("sql", f"FROM {VALUES}", "-f", "md", store=scored.path).out.splitlines()
    assert [cell.strip() for cell in header.split("|")] == ["", "x", "n", "f", ""]
    assert set(rule) == set("|-")
    assert rows[0] == r'| a "quote", \| and a line | 1234567 | 0.1 |'


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
def test_unusual_values_are_printed(scored, form, query, answer):
    assert lark("sql", query, "-f", form, store=scored.path) == Result(0, answer, "")


@pytest.mark.parametrize("form", ["table", "json", "jsonl", "csv", "md"])
def test_show_lists_every_kind_in_every_format(scored, form):
    result = lark("show", "-f", form, store=scored.path)
    assert (result.code, result.err) == (0, "")
    mark = {"csv": "# {}\n", "md": "## {}\n", "table": "{} ("}.get(form, '"{}": [')
    assert [kind for kind in scored.show().frames() if mark.format(kind) not in result.out] == []


@pytest.mark.folder
def test_store_comes_from_option_environment_or_default(scored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lark("db status").err.startswith("error: there is no lark-store at `lark.store`\n")
    assert lark("db status", store="nowhere").err.startswith("error: there is no lark-store at `nowhere`\n")
    assert lark("db status", store=scored.path).code == 0
    assert lark("db status", "--store", scored.path, store="nowhere").code == 0
    assert lark("--store", scored.path, "db", "status", store="nowhere").code == 0
    assert lark("--store nowhere db status", "--store", scored.path).code == 0


SELECT = "change the store with its commands"
ERRORS = [
    ("top q100 -c epoch1 --sketcher small", "no checkpoint `epoch1`", "did you mean `epoch-1`?"),
    ("top q1000 -c base --sketcher small", "no query `q1000`", "did you mean `q100`, "),
    ("top q100 -c base --sketcher smal", "no sketcher `smal`", "did you mean `small`?"),
    ("top q100 -c base --sketcher small -s song", "no source `song`", "did you mean `songs`?"),
    ("top q100 -c base --sketcher small --variant rav", "no variant `rav`", "did you mean `raw`?"),
    ("top q100 -c base --sketcher small -k 0", "`-k` must be between 1 and 1,000,000, not 0", "try `-k 10`"),
    ("ingest -c base -s finetun --variant raw", "no source `finetun`", "did you mean `finetune`?"),
    ("attribute -c base --queries tests", "no source `tests`", "did you mean `test`?"),
    ("metrics -c nothing", "no checkpoint `nothing`", "the store has `base`, `epoch-1`"),
    (
        "metrics --view most",
        "metrics have no view `most`",
        "the views are `all`, `influence`, `dominance`, `comparisons`",
    ),
    ("variant show chatm --sample q0", "no variant `chatm`", "did you mean `chatml`?"),
    ("variant show raw --sample kidney0", "no sample `kidney0`", "did you mean `kidney-0`?"),
    ("sql 'SELECT 1; SELECT 2'", "only one SELECT is allowed, not SELECT, SELECT", SELECT),
    ("sql 'DROP VIEW samples'", "only one SELECT is allowed, not DROP", SELECT),
    ("show --store {folder}", "there is no lark-store at `{folder}`", "create one with `lark-store init`"),
    ("init", "there is a store at `{store}` already", "use it as it is"),
    ("init --store {folder}", "there is something at `{folder}` already", "choose another path with `--store PATH`"),
    ("source add a {folder}/no.csv --stage query", "there is no file `{folder}/no.csv`", "check the path"),
    (
        "source add a b.csv --stage query --column text",
        "`--column text` is not NAME=VALUE",
        "for example `--column text=abs",
    ),
    ("source add a b.csv --stage train", "unknown stage `train`", "the stages are `finetune`, `pretrain`, `query`"),
    ("checkpoint add a {folder}/no", "there is no checkpoint folder `{folder}/no`", "check the path"),
    ("checkpoint add a b --metric f1=x", "`--metric f1=x`: not a number", "for example `f1=0.74`"),
    ("variant add a --template {folder}/no", "`{folder}/no` is neither a built-in template nor a file", "use `raw`"),
    ("sketcher add A", "`A` is not a valid name: ", "try `a`"),
    ("sketcher add a -k 1000", "k = 1000 is not a power of two from 256 to 1048576", "the paper's k is 65536"),
    ("metrics --sketcher smal", "no sketcher `smal`", "did you mean `small`?"),
    ("metrics --method dott", "there is no method `dott`", "the methods are `cosine`, `dot`"),
    ("checkpoint add base {base} --metric f1=nan", "f1 is nan, not a finite number", "omit it if unknown"),
    (f"sketcher add a --seed {10**20}", f"`seed` {10**20} doesn't fit in 64 bits", ""),
    ("variant add a --template {folder}/latin.jinja", "`{folder}/latin.jinja`", ""),
    ("init --store {folder}/latin.jinja/a", "can't create a store at", ""),
]


@pytest.mark.parametrize(("line", "fact", "hint"), ERRORS)
@pytest.mark.folder
def test_errors_print_fact_and_hint_on_stderr_only(scored_path, checkpoints, tmp_path, line, fact, hint):
    (tmp_path / "latin.jinja").write_bytes(b"{{ text }} \xe9")
    names = {"folder": tmp_path, "store": scored_path, "base": checkpoints["base"]}
    result = lark(line.format(**names), store=scored_path)
    assert (result.code, result.out) == (1, "")
    actual_fact, found_hint = result.err.removesuffix("\n").split("\n\nhint: ")
    assert actual_fact.startswith(f"error: {fact.format(**names)}")
    assert found_hint.startswith(hint)


@pytest.mark.parametrize(
    "line",
    ["tops", "top", "top q1", "show -f xml", "top q1 -c base -k many", "source add a b", "db", "sql 'SELECT 1' 2"],
)
def test_wrong_usage_exits_with_2(line, scored_path):
    result = lark(line, store=scored_path)
    assert result.code == 2
    assert "Usage: " in result.err + result.out
    assert "Traceback" not in result.err


def test_process_prints_only_data_and_errors_without_traceback(scored_path):
    completed = run_process(
        PROGRAM, "sql", "SELECT count(*) AS n FROM sketches", "-f", "jsonl", LARK_STORE=store_label(scored_path)
    )
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, '{"n":60}\n', "")
    wrong = run_process(PROGRAM, "show", "--store", "nowhere")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: there is no lark-store at `nowhere`\n\nhint: create one")


HELP = "sys.argv[1:] = ['--help']; from lark_store.cli import main; main()"


@pytest.mark.parametrize("code", ["import lark_store", HELP])
def test_import_and_help_load_no_heavy_library(code):
    report = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    completed = run_process(sys.executable, "-c", f"{report}; {code}")
    loaded = {name.split(".")[0] for name in completed.stderr.split()}
    assert (completed.returncode, "lark_store" in loaded) == (0, True)
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
    command = [PROGRAM, *INGEST.split(), store_label(path)]
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


def test_interrupted_ingest_exits_with_130_and_keeps_its_rows(interrupted):
    result, (status, n_sketched), _, _ = interrupted
    assert (result.code, result.out, status) == (130, "", "interrupted")
    assert 64 <= n_sketched < 250
    assert "Traceback" not in result.err


def test_interrupted_ingest_hints_how_to_resume(interrupted):
    last = "interrupted\n\nhint: finished work is saved; run the command again to resume\n"
    assert interrupted[0].err.endswith(last)


def test_next_ingest_completes_an_interrupted_one(interrupted):
    _, (_, n_sketched), again, counts = interrupted
    assert again.columns("n_samples", "n_existing") == [(250, n_sketched)]
    assert counts == (250, 250)


def test_report_of_a_resumed_ingest_adds_up(interrupted):
    [row] = interrupted[2].rows
    assert row["n_existing"] + row["n_sketched"] + row["n_failed"] == row["n_samples"]


def tree(group, *path):
    for name, command in group.commands.items():
        yield ((*path, name), command)
        yield from tree(command, *path, name) if hasattr(command, "commands") else ()


COMMANDS = dict(tree(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_commands_and_parameters_have_help_texts(path):
    command = COMMANDS[path]
    assert command.help.strip()
    assert [parameter.name for parameter in command.params if not (parameter.help or "").strip()] == []


def test_commands_and_store_methods_correspond():
    leaves = {"_".join(path) for path, command in COMMANDS.items() if not hasattr(command, "commands")}
    methods = {name for name in dir(Store) if not name.startswith("_") and callable(getattr(Store, name))}
    twins = {
        "create" if name == "init" else name.replace("-", "_")
        for name in leaves
        if not name.startswith(("study_", "evaluate_"))
    }
    other = {"open", "close", "study_keep", "evaluation_check", "evaluation_keep"}
    assert twins - {"ui", "mcp", "domain_make"} == methods - other - {
        "checkpoint_add_run",
        "explainer",
    }  # of `checkpoint add` and `explain`, too
    assert {name for name in leaves if name.startswith("study_")} == {f"study_{name}" for name in study.__all__}
    kinds = {name.removeprefix("evaluate_") for name in leaves if name.startswith("evaluate_")}
    assert {kind.replace("-", "_") for kind in kinds} == set(evaluate.__all__) - {"Outcome", "Scorer"}
