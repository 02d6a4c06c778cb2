"""Many at once: four ingest the same work, one scores, one optimizes, two read; and four upgrade one older store.

`LARK_CROWD=5 LARK_UPGRADES=10 pytest tests/reliability/test_many.py -s` does so for longer and prints the counts.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from helpers.checkpoints import save_checkpoint
from helpers.texts import qa_rows, text_rows, write_jsonl
from places import FolderPlace, Place, cluster_place
from processes import Runner
from script import differences, keys, orphans, read

from lark_store import Store, migrations

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CROWD = int(os.environ.get("LARK_CROWD", "1"))
SOURCES = ["finetune", *(f"text-{number}" for number in range(1, 4 * CROWD))]
ROWS = 72  # of a source: more than one commit
QUERIES = 10
INGEST = ["ingest", "-c", "base", "--sketcher", "small", "--batch-tokens", "1", "--variant", "raw"]
ATTRIBUTE = ["attribute", "-c", "base", "--sketcher", "small", "--hits", "1000"]
RUNS = """
SELECT r.ingest_run, r.status, r.source, r.n_sketched, count(s.row_key) AS n
FROM ingest_runs r LEFT JOIN sketches s ON s.ingest_run = r.ingest_run GROUP BY ALL ORDER BY ALL
"""
SCORES = """
WITH hits AS (SELECT score_run, count(*) AS hits FROM influence GROUP BY ALL)
SELECT r.score_run, r.n_queries, r.n_samples, count(s.query_id) AS rows, min(s.n) AS least, max(s.n) AS most,
    any_value(h.hits) AS hits
FROM score_runs r LEFT JOIN source_influence s ON s.score_run = r.score_run
LEFT JOIN hits h ON h.score_run = r.score_run WHERE r.status = 'done' GROUP BY ALL ORDER BY ALL
"""
UPGRADES = int(os.environ.get("LARK_UPGRADES", "1"))  # of each older schema
say = partial(print, flush=True)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with Runner(tmp_path_factory.mktemp("processes")) as server:
        yield server


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_checkpoint(folder / "base", hidden_size=32, intermediate_size=64)
    write_jsonl(folder / "test.jsonl", qa_rows(QUERIES, start=1000))
    write_jsonl(folder / "finetune.jsonl", qa_rows(ROWS))
    for name in SOURCES[1:]:
        write_jsonl(folder / f"{name}.jsonl", text_rows(ROWS, name))
    return folder


def begin(runner: Runner, place: Place, files: Path) -> None:
    """Make a store with all names in it, and the queries and one source sketched and scored."""
    run = partial(runner.run, place)
    run(*place.init)
    run("checkpoint", "add", "base", f"{files}/base")
    for name in ("test", *SOURCES):
        stage = {"test": "query", "finetune": "finetune"}.get(name, "pretrain")
        run("source", "add", name, f"{files}/{name}.jsonl", "--stage", stage)
    run("sketcher", "add", "small", "-k", "1024")
    run(*INGEST, "-s", "test", "-s", "finetune")
    run(*ATTRIBUTE)


class Crowd:
    """Processes which work on one store at once, again and again; `seen` holds the readers' answers."""

    def __init__(self, runner: Runner, place: Place) -> None:
        self.runner, self.place = runner, place
        self.counts: Counter[str] = Counter()
        self.seen: list[tuple[str, Any]] = []
        self.over = threading.Event()

    def run(self, kind: str, *arguments: str, busy: str | None = None) -> str | None:
        """Run a command; returns its output, or None if another process is at work on the same."""
        process = self.runner.start(self.place, *arguments)
        code = process.wait()
        self.counts[f"{kind}: conflicts tried again"] += process.conflicts
        if code == 0:
            self.counts[f"{kind}: done"] += 1
            return process.out
        assert busy, f"{arguments}: {code}\n{process.err}"
        assert re.search(busy, process.err), process.err
        assert "hint: wait for it" in process.err
        self.counts[f"{kind}: said who is at work"] += 1
        return None

    def ingest(self, number: int) -> None:
        """Ingest everything, beginning with another source than others, until all is there."""
        chance = random.Random(number)  # noqa: S311  no secret
        order = SOURCES[number * CROWD :] + SOURCES[: number * CROWD]
        words = [word for name in order for word in ("-s", name)]
        while self.run("ingest", *INGEST, *words, busy=r"another process is ingesting base · [\w-]+ · raw") is None:
            time.sleep(chance.uniform(0.02, 0.2))

    def until_over(self, once: Callable[[], None]) -> None:
        """Do something again and again."""
        while not self.over.is_set():
            once()

    def read(self) -> None:
        """Ask in each way once."""
        for kind, query in (("runs", RUNS), ("scores", SCORES)):
            out = self.run("read", "sql", query, "-f", "json", "--max-rows", "0")
            self.seen.append((kind, json.loads(out or "")))
        process = self.runner.run(
            self.place, "top", "q1001", "-c", "base", "--sketcher", "small", "-k", "9999", "-f", "json"
        )
        self.seen.append(("top", (process.out, process.err)))
        self.seen.append(
            ("metrics", json.loads(self.run("read", "metrics", "--sketcher", "small", "-f", "json") or ""))
        )
        self.counts["read: done"] += 1

    def work(self) -> None:
        """Let all work at once, until the four have ingested everything."""
        attribute = partial(self.run, "attribute", *ATTRIBUTE)
        optimize = partial(self.run, "optimize", "db", "optimize", busy="another process is")
        with ThreadPoolExecutor(8) as pool:
            loops = [pool.submit(self.until_over, once) for once in (attribute, optimize, self.read, self.read)]
            try:
                for ingest in [pool.submit(self.ingest, number) for number in range(4)]:
                    ingest.result()
            finally:
                self.over.set()
            for loop in loops:
                loop.result()


def judge(seen: list[tuple[str, Any]], store: Store) -> Counter[str]:
    """Compare the readers' answers with the committed runs; returns the counts of complete ones."""
    sizes = dict(store.sql("SELECT ingest_run, n_sketched FROM ingest_runs").iter_rows())
    final = {row["source"]: row["value"] for row in means(store.metrics(sketcher="small").to_dicts())}
    told: Counter[str] = Counter()
    for kind, answer in seen:
        if kind == "runs":
            for run in answer:
                whole = sizes[run["ingest_run"]] if run["status"] == "done" else 0
                assert run["n"] == whole, run
                told[f"runs, {'whole' if whole else 'nothing yet'}"] += 1
        elif kind == "scores":
            for run in answer:
                n_queries, n = run["n_queries"], run["n_samples"]
                assert (n_queries, run["rows"], run["hits"]) == (QUERIES, QUERIES, QUERIES * n), run
                assert run["least"] == run["most"] == n == ROWS, run
                told["score runs, whole"] += 1
        elif kind == "top":
            rows, how = len(json.loads(answer[0])), answer[1]
            named = re.search(r"ingest runs (\d+(?:, \d+)*)", how)
            assert named, how
            runs = [int(run) for run in named[1].split(", ")]
            assert rows == sum(sizes[run] for run in runs if run != sizes_of_queries(store)), how
            told["rankings over whole runs"] += 1
        else:
            for row in means(answer):
                assert row["value"] == pytest.approx(final[row["source"]], rel=1e-5)
                assert row["n_queries"] == QUERIES
                told["metrics, final"] += 1
    return told


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of mean max influence, one per source."""
    return [row for row in rows if row["metric"] == "mean_max_influence"]


def sizes_of_queries(store: Store) -> int:
    """Return the number of the queries' ingest run."""
    return int(store.sql("SELECT ingest_run FROM ingest_runs WHERE source = 'test'").item())


def met(store: Store) -> tuple[int, int]:
    """Return how many commits the tables' versions are of, and how many had met another since they had begun.

    A transaction's file is named after the version that it began with, and makes the next one unless it met others.
    """
    begun: dict[tuple[str, int], int] = {}
    for name in store._db.vectors.table_names():
        for batch in store._db.vectors.table(name).to_lance().tracked_files():
            for version, path in zip(
                *(batch.column(column).to_pylist() for column in ("version", "path")), strict=True
            ):
                if path.startswith("_transactions/"):
                    begun[name, version] = int(path.removeprefix("_transactions/").partition("-")[0])
    return len(begun), sum(began_with < version - 1 for (_, version), began_with in begun.items())


@pytest.mark.parametrize("kind", ["folder", "cluster"])
def test_concurrent_processes_equal_a_single_one(runner, files, tmp_path, request, kind):
    place = FolderPlace(tmp_path) if kind == "folder" else cluster_place(tmp_path, request)
    alone, together = place.fresh("alone"), place.fresh("together")
    begin(runner, alone, files)
    for name in SOURCES[1:]:
        runner.run(alone, *INGEST, "-s", name)
    runner.run(alone, *ATTRIBUTE)

    begin(runner, together, files)
    crowd = Crowd(runner, together)
    crowd.work()
    runner.run(together, *ATTRIBUTE)
    with Store.open(together.store) as store:
        n_commits, n_met = met(store)
        told = judge(crowd.seen, store)
        assert set(keys(store).values()) == {1}
    runner.run(together, "db", "optimize")
    with Store.open(together.store) as store:
        left = store.db_check(deep=20)
        # A commit that met another is made anew; the files that it had written for the first stay until a repair.
        assert set(left.select("severity", "what").rows()) <= {("warning", "unverified file")}, left
        kinds = Counter(path.split("/")[1] for path in orphans(store))
        assert store.db_repair().left.is_empty()
        assert store.db_check().is_empty()
        assert orphans(store) == []
    assert differences(read(alone), read(together)) == []
    say(json.dumps(dict(sorted(crowd.counts.items())), indent=1))
    say(json.dumps(dict(sorted(told.items())), indent=1))
    say(f"{n_commits} commits to the tables, {n_met} of them had met another; files of no version: {dict(kinds)}")
    assert crowd.counts["ingest: done"] == 4
    assert crowd.counts["ingest: said who is at work"] > 0
    assert min(told.values()) > 0
    assert n_met > 0


def test_four_simultaneous_upgrades_happen_once(runner, files, tmp_path):
    place = FolderPlace(tmp_path)
    begin(runner, place, files)
    runner.run(place, "snapshot", "create", "then")
    expected = read(place)
    expected["sketchers"] = expected["sketchers"].filter(pl.col("name") != "adam")  # no older store has it
    refused, before = 0, {}
    for version in ["0001", "0002", "0003"] * UPGRADES:
        place.older(version)
        both = [runner.start(place, *words) for _ in range(4) for words in (["show", "-f", "json"], ["db", "upgrade"])]
        readers, upgrades = both[::2], both[1::2]
        for process in upgrades:
            assert process.wait() == 0, process.err
        for process in readers:
            if process.wait() != 0:
                assert f"has schema {version}; this lark-store needs {migrations.newest()}" in process.err
                assert "hint: upgrade it with `lark-store db upgrade`" in process.err
                refused += 1
        result = [process.err for process in upgrades if process.err != "the schema is up to date\n"]
        assert len(result) in (1, 2)  # the catalog is one piece of work, the snapshot's catalog another
        assert len(set(result)) == len(result), result  # nobody names another's backup
        before |= {f"{kind}-{version}.backup.sqlite": version for kind in ("catalog", "snapshot-then")}
        assert place.backups() == before
        assert differences(expected, read(place)) == []
    with Store.open(place.store) as store:
        assert store.db_check().rows() == []
    with Store.open(place.store, snapshot="then") as store:
        assert store.sql("SELECT count(*) FROM sketches").item() == ROWS + QUERIES
    say(f"{3 * UPGRADES} upgrades by four at once; {refused} of {12 * UPGRADES} readers were told to upgrade")
