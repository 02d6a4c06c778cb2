"""A whole study on a tiny model: its files, its record in the store, the same again, and killed anywhere."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import polars as pl
import pytest
from helpers.checkpoints import save_checkpoint
from helpers.program import lark
from helpers.study_recipe import RECIPE
from helpers.texts import qa_rows, text_rows, write_jsonl

from lark_store import Store
from lark_store.core.hashing import file_hash
from lark_store.errors import InputError
from lark_store.study import report, run
from lark_store.study.page import save_tables

TABLES = ("checkpoints", "influence", "relevance", "dominance", "format_effect", "storage", "methods", "queries")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a model, texts and a recipe."""
    folder = tmp_path_factory.mktemp("inputs")
    save_checkpoint(folder / "model")
    write_jsonl(folder / "qa.jsonl", qa_rows(24))
    write_jsonl(folder / "medical.jsonl", text_rows(30, "kidney"))
    write_jsonl(folder / "songs.jsonl", text_rows(20))
    (folder / "tiny.toml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """The folder of an uninterrupted study, and its results."""
    folder = tmp_path_factory.mktemp("done") / "study"
    shutil.copytree(inputs, folder)
    return folder, run(folder / "tiny.toml")


def tables(folder):
    """Return the tables' files; of the storage only values independent of the layout on disk."""
    results = {path.stem: path.read_text() for path in sorted((folder / "tiny" / "tables").glob("*.csv"))}
    results["storage"] = (
        pl.read_csv(results["storage"].encode()).select("model", "parameters", "what", "n_samples").rows()
    )
    return results


def test_a_study_leaves_its_tables_figures_and_report(finished):
    folder, results = finished
    assert set(tables(folder)) == set(TABLES)
    for name, frame in results.tables().items():
        kept = pl.read_csv(folder / "tiny" / "tables" / f"{name}.csv", schema_overrides=dict(frame.schema))
        assert kept.select(frame.columns).equals(frame), name
    figures = {path.name for path in (folder / "tiny" / "figures").iterdir()}
    assert {"influence.png", "pt-wins.svg", "storage.png", "methods.svg", "heatmap.png"} <= figures
    assert "A tiny model on made-up questions" in (folder / "tiny" / "report.html").read_text(encoding="utf-8")


def test_store_records_the_studys_inputs(finished):
    folder, results = finished
    with Store.open(folder / "tiny" / "lark.store") as store:
        (row,) = store.sql("from studies").rows(named=True)
        weights = dict(store.sql("select name, weights_sha256 from checkpoints").iter_rows())
        metrics = store.sql("select distinct name from checkpoint_metrics")["name"].to_list()
    assert row["finished_at"] is not None
    assert json.loads(row["recipe"])["finetune"]["learning_rates"] == [3e-3, 3e-4]
    assert {"torch", "transformers", "lark-store", "device", "platform"} <= json.loads(row["environment"]).keys()
    hashes = json.loads(row["hashes"])
    assert {f"weights of {name}": value for name, value in weights.items()}.items() <= hashes.items()
    files = [name for name in hashes if "/" in name]
    assert {f"tables/{name}.csv" for name in TABLES} <= set(files)
    assert {"pools/finetune.jsonl", "pools/medical.jsonl", "pools/evaluation.jsonl"} <= set(files)
    assert all(hashes[name] == file_hash(folder / "tiny" / name) for name in files)
    assert {"accuracy", "accuracy_low", "macro_f1", "macro_f1_high", "train_loss", "n_evaluated"} <= set(metrics)
    assert results.hashes == hashes


def test_rerun_does_nothing(finished):
    folder, _ = finished
    before = tables(folder)
    with Store.open(folder / "tiny" / "lark.store") as store:
        runs = store.sql("select (select count(*) from ingest_runs), (select count(*) from score_runs)").rows()
    seen = []
    run(folder / "tiny.toml", on_progress=seen.append)
    assert tables(folder) == before
    assert not [p.label for p in seen if p.label.startswith(("fine-tuning", "evaluating"))]
    with Store.open(folder / "tiny" / "lark.store") as store:
        assert store.sql("select (select count(*) from ingest_runs), (select count(*) from score_runs)").rows() == runs


CHILD = """
import os, signal, sys
from lark_store.study.pipeline import run

label, nth = sys.argv[2], int(sys.argv[3])
seen = 0


def on_progress(progress):
    global seen
    seen += progress.label.startswith(label)
    if seen == nth:
        os.kill(os.getpid(), signal.SIGKILL)


def say(message):
    if message.startswith(label):
        os.kill(os.getpid(), signal.SIGKILL)


run(sys.argv[1], on_progress=on_progress, say=say)
"""
KILLS = [
    ("fine-tuning", 4),
    ("evaluating epoch-1", 1),
    ("base · medical", 1),
    ("epoch-1 · test", 1),
    ("epoch-2: scoring", 1),
    ("tables", 1),
]


def test_killed_study_resumes_with_equal_tables(inputs, finished, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(inputs, folder)
    for label, nth in KILLS:
        killed = subprocess.run([sys.executable, "-c", CHILD, folder / "tiny.toml", label, str(nth)], check=False)
        assert killed.returncode == -signal.SIGKILL, label
    run(folder / "tiny.toml")
    assert tables(folder) == tables(finished[0])


def test_changed_recipe_is_refused_and_changed_title_accepted(finished):
    folder, _ = finished
    recipe = folder / "tiny.toml"
    try:
        recipe.write_text(RECIPE.replace("3e-4", "1e-4").replace("k = 1024", "k = 2048"), encoding="utf-8")
        with pytest.raises(InputError, match=r"another recipe: `finetune\.learning_rates`, `sketch\.k` changed"):
            run(recipe)
        recipe.write_text(RECIPE.replace("A tiny model", "Another title"), encoding="utf-8")
        assert "Another title" in report(recipe, folder / "other.html").read_text(encoding="utf-8")
    finally:
        recipe.write_text(RECIPE, encoding="utf-8")


def test_obsolete_table_is_deleted(finished, tmp_path):
    _, results = finished
    save_tables(results, tmp_path)
    assert (tmp_path / "methods.csv").is_file()
    save_tables(replace(results, methods=results.methods.clear()), tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == {*TABLES} - {"methods"}


def test_the_commands(finished, tmp_path):
    folder, _ = finished
    result = lark(f"study init {tmp_path / 'new.toml'}")
    assert (result.code, result.out) == (0, "")
    assert "hint: edit it, then run `lark-store study run" in result.err
    again = lark(f"study init {tmp_path / 'new.toml'}")
    assert (again.code, "exists already" in again.err) == (1, True)
    early = lark(f"study report {tmp_path / 'new.toml'}")
    assert (early.code, "has not been run\n\nhint: run `lark-store study run" in early.err) == (1, True)
    wrote = lark(f"study report {folder / 'tiny.toml'} -o {tmp_path / 'r.html'}")
    assert (wrote.code, wrote.err) == (0, f"wrote `{tmp_path / 'r.html'}`\n")
    assert (tmp_path / "r.html").stat().st_size > 100_000
    ran = lark(f"study run {folder / 'tiny.toml'}")
    assert ran.code == 0
    assert "Influence per source at epoch-2" in ran.out
    assert "the report is `" in ran.err
    lost = lark(f"study run {tmp_path / 'none.toml'}")
    assert (lost.code, "can't be read: No such file" in lost.err) == (1, True)


def test_stopped_study_has_no_report(inputs, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(inputs, folder)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder / "tiny.toml", on_progress=stop)
    with pytest.raises(InputError, match="is not finished"):
        report(folder / "tiny.toml")
