"""Several processes at one ingest, started by torchrun as users do; and how samples are cut into batches."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.program import PROGRAM
from helpers.stores import read_sketches, sketch_table
from helpers.texts import qa_rows, write_jsonl
from helpers.torchrun import TIMEOUT_S, kill_launcher, launch, launched
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed

from lark_store import Store
from lark_store.errors import InputError
from lark_store.ingest import distributed as module
from lark_store.ingest.defaults import resolved
from lark_store.ingest.distributed import Ranks, joined_ranks
from lark_store.ingest.ingest_runs import locked
from lark_store.ingest.units import prepare
from lark_store.modeling.batching import WINDOW, batches, windows
from lark_store.specs import IngestSpec

N = 600  # short samples: two windows of each of two ranks
MANY = ("-c", "base", "-s", "many", "--variant", "short", "--sketcher", "small", "-f", "json")
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, checkpoints):
    """A store with many short samples, and two that are too long, one for each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    long = [{"id": f"long-{i}", "question": "why?", "answer": "because " * 100} for i in range(2)]
    samples = qa_rows(N)
    for i in (3, 4, N - 1):  # longer than the variant: of each rank, and in the last window
        samples[i]["context"] = f"Seen in {i} and in most patients. " * 5
    samples[100:100] = long  # at an even and at an odd place
    with Store.create(folder / "fresh") as store:
        store.checkpoint_add("base", checkpoints["base"])
        store.source_add("many", write_jsonl(folder / "many.jsonl", samples), stage="finetune")
        store.variant_add("short", template="chatml", max_length=64)
        store.sketcher_add("small", k=256)
    return folder / "fresh"


def copy(path: Path, name: str) -> Path:
    return Path(shutil.copytree(path, path.with_name(name)))


@pytest.fixture(scope="module")
def alone(fresh):
    """The store as one process fills it."""
    path = copy(fresh, "alone")
    with Store.open(path) as store:
        store.ingest(["base"], ["many"], ["short"], sketcher="small")
    return path


@pytest.fixture(scope="module")
def together(fresh):
    """A store filled by two processes, and their output."""
    path = copy(fresh, "together")
    return path, launch("--no-python", PROGRAM, "ingest", *MANY, "--store", path)


SCALARS = [
    "row_key",
    "checkpoint",
    "source",
    "variant",
    "sample_id",
    "ingest_run",
    "n_tokens",
    "n_loss_tokens",
    "n_cut",
]


def test_two_processes_write_the_same_rows_as_one(alone, together):
    with Store.open(alone) as one, Store.open(together[0]) as two:
        expected, actual = read_sketches(one), read_sketches(two)
    assert len(expected) == N
    assert actual.select(SCALARS).equals(expected.select(SCALARS))
    for column in ("loss", "grad_norm"):
        np.testing.assert_allclose(actual[column], expected[column], rtol=1e-4)
    ours, theirs = (np.stack(frame["vector"].to_numpy()).astype(np.float64) for frame in (actual, expected))
    cosines = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosines.min() > 0.99999


def test_each_process_writes_its_share_and_one_commits(together):
    with Store.open(together[0]) as store:
        fragments = sketch_table(store).to_lance().get_fragments()
    assert N + 2 > 2 * WINDOW
    assert sorted(fragment.count_rows() for fragment in fragments) == [45, 45, 255, 255]  # of each, one was too long


def test_processes_form_one_run_with_total_counts(together):
    with Store.open(together[0]) as store:
        runs = store.sql("select status, n_existing, n_sketched, n_failed, error from ingest_runs").rows()
    assert runs == [("done", 0, N, 2, None)]


def test_failed_samples_are_recorded_once_and_the_status_is_1(alone, together):
    path, result = together
    failures = "select sample_id, reason from failures order by all"
    with Store.open(alone) as one, Store.open(path) as two:
        expected, rows = one.sql(failures).rows(), two.sql(failures).rows()
    assert [sample_id for sample_id, _ in rows] == ["long-0", "long-1"]
    assert rows == expected
    assert result.code == 1
    assert result.err.count("2 samples failed") == 1


def test_the_report_is_printed_once(together):
    [row] = json.loads(together[1].out)
    assert (row["n_samples"], row["n_existing"], row["n_sketched"], row["n_failed"]) == (N + 2, 0, N, 2)
    with Store.open(together[0]) as store:
        assert store.sql("select count(*) from sketches where n_cut > 0").item() == row["n_truncated"] == 3
        assert store.sql("select sum(n_cut) from sketches").item() == row["n_cut"] > 3 * 20
    assert f"3 samples truncated by {row['n_cut']} tokens" in together[1].err
    assert together[1].err.count("loading the model") == 1
    assert "lark_store/" not in together[1].err  # no traceback goes through it


def test_expected_error_is_one_message_without_traceback(together):
    result = launch("--no-python", PROGRAM, "ingest", *MANY, "-s", "mani", "--store", together[0])
    assert (result.code, result.out) == (1, "")
    assert result.err.count("error: no source `mani`\n\nhint: did you mean `many`?\n") == 1
    assert "lark_store/" not in result.err


MORE = """
import contextlib, io, json, os, sys, warnings
from pathlib import Path

warnings.simplefilter("error", UserWarning)
path, rank = sys.argv[1], os.environ["RANK"]
found = {}

from torch import distributed

from lark_store import Store
from lark_store.cli import main
from lark_store.errors import StoreBusyError
from lark_store.ingest.distributed import joined_ranks


def lark(line):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["lark-store", *line.split(), "--sketcher", "small", "-f", "json", "--store", path]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        return stop.code or 0, out.getvalue(), err.getvalue()


def busy():
    raise StoreBusyError("a fact", "a hint")


def ask(ranks):
    asked = []
    once = ranks.once(lambda: asked.append(rank) or {"from": rank})
    try:
        ranks.once(busy)
    except StoreBusyError as error:
        told = [str(error), error.fact, error.hint]
    return ranks.rank, ranks.size, ranks.is_first, asked, once, told, ranks.gather(rank * 3), ranks.once(lambda: 5)


with joined_ranks() as ranks:
    found["ranks"] = ask(ranks)
found["left"] = distributed.is_initialized()
job = "ingest -c base -s many --variant raw --limit 5"
found["first"], found["again"] = lark(job), lark(job)
found["unknown"] = lark("ingest -c base -s many --variant ra")
found["busy"] = lark("ingest -c base -s many --variant chatml --limit 5")
distributed.init_process_group("gloo")  # as a training script does
before = len(distributed.distributed_c10d._world.pg_map)
with joined_ranks() as ranks:
    found["guests"] = ask(ranks)
with Store.open(path) as store:
    report = store.ingest(["base"], ["many"], ["raw"], sketcher="small", limit=9)
    found["nothing"] = store.ingest(["base"], ["many"], ["raw"], sketcher="small", limit=9).units.rows()
found["api"] = report.units.select("n_samples", "n_existing", "n_sketched").rows()
found["kept"] = distributed.is_initialized(), len(distributed.distributed_c10d._world.pg_map) - before
distributed.destroy_process_group()
Path(path, f"found-{rank}.json").write_text(json.dumps(found))
lark("ingest -c base -s more --variant raw")
"""


@pytest.fixture(scope="module")
def more(fresh):
    """Return the results of two processes which run several commands and are killed in an ingest; and the store."""
    path = copy(fresh, "more")
    script = path.with_name("more.py")
    script.write_text(MORE)
    with Store.open(path) as store:
        store.source_add("more", write_jsonl(path.with_name("more.jsonl"), qa_rows(1300)), stage="finetune")
        spec = IngestSpec(checkpoints=["base"], sources=["many"], variants=["chatml"], sketcher="small")
        plan = prepare(store._db, resolved(store._db, spec))[1][0]()
        with locked(store._db, plan.fingerprint, plan.units[0].names), launched(script, path) as process:
            wait_for(process, (path / "found-1.json").is_file)
            wait_for(process, lambda: sketch_table(store).count_rows("source = 'more'") > 0)
            kill_launcher(process)
    return [json.loads((path / f"found-{rank}.json").read_text()) for rank in range(2)], path


def wait_for(process: subprocess.Popen, come) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not come():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail("it did not come to that")
        time.sleep(0.02)


@pytest.mark.parametrize("group", ["ranks", "guests"])
def test_first_process_decides_for_all(more, group):
    told = ["a fact\n\nhint: a hint", "a fact", "a hint"]
    assert more[0][0][group] == [0, 2, True, ["0"], {"from": "0"}, told, ["000", "111"], 5]
    assert more[0][1][group] == [1, 2, False, [], {"from": "0"}, told, [], 5]


def test_ingests_group_ends_and_the_callers_stays(more):
    assert [results["left"] for results in more[0]] == [False, False]
    assert [results["kept"] for results in more[0]] == [[True, 0], [True, 0]]


def test_processes_ingest_repeatedly_and_only_the_first_prints(more):
    (first, silent), (again, silent_again) = (([result[name] for result in more[0]]) for name in ("first", "again"))
    assert silent == silent_again == [0, "", ""]
    assert (first[0], again[0]) == (0, 0)
    counts = ("n_existing", "n_sketched", "n_failed")
    assert [json.loads(item[1])[0][count] for item in (first, again) for count in counts] == [0, 5, 0, 5, 0, 0]
    assert json.loads(again[1])[0]["run"] is None


def test_report_is_equal_in_every_process(more):
    assert [results["api"] for results in more[0]] == [[[9, 5, 4]]] * 2
    assert more[0][0]["nothing"] == more[0][1]["nothing"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown", "error: no variant `ra`\n\nhint: did you mean `raw`?\n"),
        (
            "busy",
            "error: another process is ingesting base · many · chatml\n\nhint: wait for it to finish",
        ),
    ],
)
def test_error_ends_every_process_and_is_printed_once(more, case, message):
    (code, out, err), other = (result[case] for result in more[0])
    assert (code, out) == (1, "")
    assert message in err
    assert other == [1, "", ""]


def test_killed_processes_lose_nothing_and_one_resumes(more):
    with Store.open(more[1]) as store:
        written = sketch_table(store).count_rows("source = 'more'")
        assert 2 * WINDOW <= written < 1300
        assert written % (2 * WINDOW) == 0  # whole windows
        assert store.sql("select count(*) from sketches where source = 'more'").item() == 0
        report = store.ingest(["base"], ["more"], ["raw"], sketcher="small")
        assert report.units.select("n_existing", "n_sketched", "n_failed").row(0) == (written, 1300 - written, 0)
        counts = "select count(*), count(distinct sample_id) from sketches where source = 'more'"
        assert store.sql(counts).row(0) == (1300, 1300)
        runs = "select status, n_sketched, error from ingest_runs where source = 'more'"
        assert store.sql(runs).rows() == [("done", 1300, None)]


@pytest.fixture
def no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("size", [None, "1"])
def test_single_process_needs_no_group(monkeypatch, size):
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    with joined_ranks() as ranks:
        assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
        assert ranks.once(lambda: "done") == "done"
        assert ranks.gather("mine") == ["mine"]
        with pytest.raises(ZeroDivisionError):
            ranks.once(lambda: 1 / 0)
    assert not distributed.is_initialized()


def test_only_the_first_rank_commits():
    assert [Ranks(rank, 3).is_first for rank in range(3)] == [True, False, False]


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("known", [{}, {"RANK": "0"}, {"RANK": "0", "MASTER_ADDR": "127.0.0.1"}])
def test_failed_rendezvous_is_a_clear_error(monkeypatch, scored, known):
    for name, value in ({"WORLD_SIZE": "2"} | known).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"the 2 processes of this ingest can't connect: .*\n\nhint: start them"):
        scored.ingest(["base"], ["songs"], ["raw"], sketcher="small")
    assert not distributed.is_initialized()


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize(("local", "mine"), [("0", 0), ("2", 2), ("5", 1), (None, 3)])
def test_each_process_has_its_own_gpu(monkeypatch, local, mine):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(module, "_launcher", lambda: (distributed.HashStore(), 3))
    if local:
        monkeypatch.setenv("LOCAL_RANK", local)
    module._create_group(8)
    assert chosen == [mine]


SAMPLES = st.lists(st.integers(0, 60).map(lambda n: "x" * n), max_size=40)


@given(SAMPLES, st.integers(1, 12))
def test_windows_hold_every_sample_once_in_order(samples, size):
    result = list(windows(samples, size))
    assert [sample for window in result for sample in window] == samples
    assert all(len(window) == size for window in result[:-1])
    assert all(0 < len(window) <= size for window in result)


@given(SAMPLES, st.integers(1, 200))
def test_batches_hold_every_sample_once_within_the_budget(samples, budget):
    result = list(batches(samples, len, lambda: budget))
    flat = [sample for batch in result for sample in batch]
    assert flat == sorted(samples, key=len, reverse=True)
    assert all(len(batch) == 1 or len(batch) * len(batch[0]) <= budget for batch in result)
    assert all((len(batch) + 1) * max(1, len(batch[0])) > budget for batch in result[:-1])  # as many as it allows


@given(SAMPLES, st.lists(st.integers(1, 200), min_size=40, max_size=40))
def test_budget_is_read_for_every_batch(samples, budgets):
    requests = []
    stream = iter(budgets)
    result = list(batches(samples, len, lambda: requests.append(next(stream)) or requests[-1]))
    assert len(result) == len(requests)
    for batch, budget in zip(result, requests, strict=True):
        assert len(batch) == 1 or len(batch) * len(batch[0]) <= budget
    assert sorted(sample for batch in result for sample in batch) == sorted(samples)
