"""`db repair`: what can be made again is mended, and made again it is what it was; the rest is left and said."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from conftest import named, text_rows, write_jsonl
from test_check import BREAKS, LOSSES, cases, change, found, orphan, sketches, small, table
from test_cli import lark
from test_ingest import rows

from lark_store import Store
from lark_store.errors import StoreBusyError
from lark_store.schema.locks import working

CHECKPOINTS = ["base", "epoch-1"]


def make_again(store):
    store.ingest(CHECKPOINTS, ["finetune", "test"], ["chatml"], sketcher="small")
    store.ingest(CHECKPOINTS, ["medical", "songs"], ["raw", "chatml"], sketcher="small")
    store.attribute(CHECKPOINTS, queries="test", sketcher="small")


def content(store):
    """What a reader gets, but for the numbers of runs; scores to four places: sketches depend on their batch."""
    sketched = store.sql(
        "select checkpoint, source, variant, sample_id, n_tokens, round(loss, 3) from sketches where sketcher = 'small'"
        " order by all"
    )
    scored = store.sql(
        "select checkpoint, query_id, source, variant, n, round(max, 3) from source_influence order by all"
    )
    return sketched.rows(), scored.rows(), store.sql("select count(*) from influence").item()


def samples(store):
    return sorted(map(repr, table(store, "samples").to_lance().to_table().to_pylist()))


@pytest.fixture(scope="module")
def whole(scored_path):
    with Store.open(scored_path) as store:
        return content(store), samples(store)


@pytest.mark.parametrize(("break_it", "_"), cases(BREAKS))
def test_what_can_be_made_again_is_mended_and_is_then_what_it_was(scored_copy, whole, break_it, _):
    break_it(scored_copy)
    before = {(severity, what) for severity, what, _ in found(scored_copy)}
    kept = samples(scored_copy)
    report = scored_copy.db_repair()
    assert report.left.is_empty()
    assert set(report.mended.select("severity", "what").rows()) >= before
    assert found(scored_copy) == []
    assert set(samples(scored_copy)) == set(kept)
    if "sea-1" not in "".join(kept):  # the sample itself was lost
        return
    make_again(scored_copy)
    assert content(scored_copy) == whole[0]
    assert found(scored_copy) == []


@pytest.mark.parametrize(("break_it", "_"), cases(LOSSES))
def test_what_can_not_be_made_again_is_left_and_said(scored_copy, break_it, _):
    break_it(scored_copy)
    before = scored_copy.db_check()
    files = {path for path in scored_copy.path.rglob("*") if path.is_file()}
    report = scored_copy.db_repair()
    assert report.mended.is_empty()
    assert report.left.equals(before)
    assert report.left["repair"].null_count() == len(report.left)
    assert files <= {path for path in scored_copy.path.rglob("*") if path.is_file()}


def test_of_doubled_sketches_the_committed_one_is_kept(scored_copy):
    store = scored_copy
    key = "row_key = 'base/finetune/chatml/q1'"
    row = table(store, small(store)).to_lance().to_table(filter=key).to_pylist()[0]
    change(store, "q1", ingest_run=999)
    table(store, small(store)).add([row])
    assert ("error", "duplicate key", 1) in found(store)
    assert store.db_repair().left.is_empty()
    assert sketches(store).to_lance().to_table(filter=key).to_pylist() == [row]
    assert found(store) == []


def test_sketches_made_again_are_those_that_were_lost(scored_copy, whole):
    table(scored_copy, small(scored_copy)).delete("true")
    assert scored_copy.db_repair().left.is_empty()
    make_again(scored_copy)
    assert content(scored_copy) == whole[0]
    assert found(scored_copy, deep=100) == []


def test_a_dry_run_says_what_would_be_done_and_does_nothing(scored_copy):
    change(scored_copy, "q1", grad_norm=0.0)
    orphan(scored_copy, "samples")
    before = scored_copy.db_check()
    report = scored_copy.db_repair(dry_run=True)
    assert report.mended.equals(before)
    assert report.left.is_empty()
    assert scored_copy.db_check().equals(before)


def test_nothing_is_repaired_while_somebody_is_at_work(scored_copy):
    change(scored_copy, "q1", grad_norm=0.0)
    before = scored_copy.db_check()
    with (
        working(scored_copy._db.location, "some", "ingesting base · songs · raw", {"source": ["songs"]}),
        pytest.raises(StoreBusyError, match="in use: another process is ingesting base · songs · raw"),
    ):
        scored_copy.db_repair()
    assert scored_copy.db_check().equals(before)


def test_old_versions_and_snapshots_outlive_the_removal_of_orphans(scored_copy):
    scored_copy.snapshot_create("paper")
    scored_copy.sample_remove("songs", ["sea-1"])
    orphan(scored_copy, "samples")
    versions = len(table(scored_copy, "samples").to_lance().versions())
    assert scored_copy.db_repair().left.is_empty()
    assert len(table(scored_copy, "samples").to_lance().versions()) == versions
    with Store.open(scored_copy.path, snapshot="paper") as then:
        assert then.sql("select count(*) from samples where source = 'songs'").item() == 5


KILLED = """
import os, signal, sys
from lark_store import Store
def stop(progress):
    if progress.done >= 70:
        os.kill(os.getpid(), signal.SIGKILL)
with Store.open(sys.argv[1]) as store:
    store.ingest(["base"], ["many"], ["raw"], sketcher="small", batch_tokens=128, on_progress=stop)
"""


def test_a_killed_ingest_is_committed_with_what_it_has_and_goes_on(store, tmp_path):
    store.source_add("many", write_jsonl(tmp_path / "many.jsonl", text_rows(90, "many")), stage="pretrain")
    done = subprocess.run([sys.executable, "-c", KILLED, named(store.path)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    orphan(store, small(store))
    report = store.db_repair()
    assert report.left.is_empty()
    assert {"stale run", "lock", "unverified file"} <= set(report.mended["what"])
    n = store.sql("select count(*) from sketches").item()
    assert 64 <= n < 90
    units = store.ingest(["base"], ["many"], ["raw"], sketcher="small").units
    assert (units["n_existing"].item(), units["n_sketched"].item()) == (n, 90 - n)
    assert rows(store)["row_key"].is_unique().all()
    assert found(store) == []


REPAIRING = """
import os, signal, sys
from lark_store import Store
from lark_store.upkeep import repair
seen = []
original = repair.check_alone
def check(*arguments, **options):
    seen.append(1)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
repair.check_alone = check
with Store.open(sys.argv[1]) as store:
    store.db_repair()
"""


def test_a_repair_that_was_killed_is_done_by_the_next(scored_copy, whole):
    change(scored_copy, "q1", grad_norm=0.0)
    done = subprocess.run([sys.executable, "-c", REPAIRING, named(scored_copy.path)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {what for _, what, _ in found(scored_copy)} == {"count", "scores"}
    assert scored_copy.db_repair().left.is_empty()
    make_again(scored_copy)
    assert content(scored_copy) == whole[0]


def test_the_command_says_what_was_done_and_prints_what_is_left(scored_copy):
    store = scored_copy.path
    orphan(scored_copy, "samples")
    dry = lark("db repair --dry-run -f json", store=store)
    assert (dry.code, dry.columns("what")) == (0, [("unverified file",)])
    assert dry.err.splitlines()[-1] == "nothing was changed: this is what would be mended"
    done = lark("db repair -f json", store=store)
    assert (done.code, done.rows) == (0, [])
    assert done.err.splitlines()[-2:] == ["unverified file: samples: remove them (1)", "all is well"]
    LOSSES["a text that changed"][0](scored_copy)
    left = lark("db repair -f json", store=store)
    assert (left.code, [row["what"] for row in json.loads(left.out)]) == (1, ["content"])
