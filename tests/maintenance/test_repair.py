"""`db repair`: derived data is rebuilt with equal values; the rest is reported and left."""

from __future__ import annotations

import json
import signal

import pytest
from helpers.corruption import (
    BREAKS,
    LOSSES,
    add_orphan_file,
    change_sketch,
    check_findings,
    damage_cases,
    lance_table,
    sketch_table_name,
)
from helpers.forked import run_forked
from helpers.program import add_source_and_kill_its_ingest, lark
from helpers.stores import read_sketches, sketch_table, store_label

from lark_store import Store
from lark_store.errors import StoreBusyError
from lark_store.schema.locks import working

CHECKPOINTS = ["base", "epoch-1"]


def rebuild(store):
    store.ingest(CHECKPOINTS, ["finetune", "test"], ["chatml"], sketcher="small")
    store.ingest(CHECKPOINTS, ["medical", "songs"], ["raw", "chatml"], sketcher="small")
    store.attribute(CHECKPOINTS, queries="test", sketcher="small")


def content(store):
    """Rows visible to readers, without run numbers; scores to four places, as sketches depend on their batch."""
    sketched = store.sql(
        "select checkpoint, source, variant, sample_id, n_tokens, round(loss, 3) from sketches where sketcher = 'small'"
        " order by all"
    )
    scored = store.sql(
        "select checkpoint, query_id, source, variant, n, round(max, 3) from source_influence order by all"
    )
    return sketched.rows(), scored.rows(), store.sql("select count(*) from influence").item()


def samples(store):
    return sorted(map(repr, lance_table(store, "samples").to_lance().to_table().to_pylist()))


@pytest.fixture(scope="module")
def whole(scored_path):
    with Store.open(scored_path) as store:
        return content(store), samples(store)


@pytest.mark.parametrize(("break_it", "_"), damage_cases(BREAKS))
def test_derived_data_is_rebuilt_with_equal_values(scored_copy, whole, break_it, _):
    break_it(scored_copy)
    before = {(severity, kind) for severity, kind, _ in check_findings(scored_copy)}
    kept = samples(scored_copy)
    report = scored_copy.db_repair()
    assert report.left.is_empty()
    assert set(report.mended.select("severity", "what").rows()) >= before
    assert check_findings(scored_copy) == []
    assert set(samples(scored_copy)) == set(kept)
    if "sea-1" not in "".join(kept):  # the sample itself was lost
        return
    rebuild(scored_copy)
    assert content(scored_copy) == whole[0]
    assert check_findings(scored_copy) == []


@pytest.mark.parametrize(("break_it", "_"), damage_cases(LOSSES))
def test_lost_data_is_left_and_reported(scored_copy, break_it, _):
    break_it(scored_copy)
    before = scored_copy.db_check()
    files = {path for path in scored_copy.path.rglob("*") if path.is_file()}
    report = scored_copy.db_repair()
    assert report.mended.is_empty()
    assert report.left.equals(before)
    assert report.left["repair"].null_count() == len(report.left)
    assert files <= {path for path in scored_copy.path.rglob("*") if path.is_file()}


def test_committed_duplicate_sketch_is_kept(scored_copy):
    store = scored_copy
    key = "row_key = 'base/finetune/chatml/q1'"
    row = lance_table(store, sketch_table_name(store)).to_lance().to_table(filter=key).to_pylist()[0]
    change_sketch(store, "q1", ingest_run=999)
    lance_table(store, sketch_table_name(store)).add([row])
    assert ("error", "duplicate key", 1) in check_findings(store)
    assert store.db_repair().left.is_empty()
    assert sketch_table(store).to_lance().to_table(filter=key).to_pylist() == [row]
    assert check_findings(store) == []


def test_recomputed_sketches_equal_the_lost_ones(scored_copy, whole):
    lance_table(scored_copy, sketch_table_name(scored_copy)).delete("true")
    assert scored_copy.db_repair().left.is_empty()
    rebuild(scored_copy)
    assert content(scored_copy) == whole[0]
    assert check_findings(scored_copy, deep=100) == []


def test_dry_run_reports_and_changes_nothing(scored_copy):
    change_sketch(scored_copy, "q1", grad_norm=0.0)
    add_orphan_file(scored_copy, "samples")
    before = scored_copy.db_check()
    report = scored_copy.db_repair(dry_run=True)
    assert report.mended.equals(before)
    assert report.left.is_empty()
    assert scored_copy.db_check().equals(before)


def test_no_repair_during_other_work(scored_copy):
    change_sketch(scored_copy, "q1", grad_norm=0.0)
    before = scored_copy.db_check()
    with (
        working(scored_copy._db.location, "some", "ingesting base · songs · raw", {"source": ["songs"]}),
        pytest.raises(StoreBusyError, match="in use: another process is ingesting base · songs · raw"),
    ):
        scored_copy.db_repair()
    assert scored_copy.db_check().equals(before)


def test_removal_of_orphans_keeps_old_versions_and_snapshots(scored_copy):
    scored_copy.snapshot_create("paper")
    scored_copy.sample_remove("songs", ["sea-1"])
    add_orphan_file(scored_copy, "samples")
    versions = len(lance_table(scored_copy, "samples").to_lance().versions())
    assert scored_copy.db_repair().left.is_empty()
    assert len(lance_table(scored_copy, "samples").to_lance().versions()) == versions
    with Store.open(scored_copy.path, snapshot="paper") as then:
        assert then.sql("select count(*) from samples where source = 'songs'").item() == 5


def test_repair_commits_a_killed_ingest_and_it_resumes(store, tmp_path):
    add_source_and_kill_its_ingest(store, tmp_path)
    add_orphan_file(store, sketch_table_name(store))
    report = store.db_repair()
    assert report.left.is_empty()
    assert {"stale run", "lock", "unverified file"} <= set(report.mended["what"])
    n = store.sql("select count(*) from sketches").item()
    assert 64 <= n < 90
    units = store.ingest(["base"], ["many"], ["raw"], sketcher="small").units
    assert (units["n_existing"].item(), units["n_sketched"].item()) == (n, 90 - n)
    assert read_sketches(store)["row_key"].is_unique().all()
    assert check_findings(store) == []


REPAIRING = """
import os, signal, sys
from lark_store import Store
from lark_store.maintenance import repair
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


def test_next_repair_completes_a_killed_one(scored_copy, whole):
    change_sketch(scored_copy, "q1", grad_norm=0.0)
    assert run_forked(REPAIRING, store_label(scored_copy.path)) == -signal.SIGKILL
    assert {kind for _, kind, _ in check_findings(scored_copy)} == {"count", "scores"}
    assert scored_copy.db_repair().left.is_empty()
    rebuild(scored_copy)
    assert content(scored_copy) == whole[0]


def test_command_reports_repairs_and_prints_the_rest(scored_copy):
    store = scored_copy.path
    add_orphan_file(scored_copy, "samples")
    dry = lark("db repair --dry-run -f json", store=store)
    assert (dry.code, dry.columns("what")) == (0, [("unverified file",)])
    assert dry.err.splitlines()[-1] == "dry run: nothing was changed"
    result = lark("db repair -f json", store=store)
    assert (result.code, result.rows) == (0, [])
    assert result.err.splitlines()[-2:] == ["unverified file: samples: remove them (1)", "no problems found"]
    LOSSES["a text that changed"][0](scored_copy)
    left = lark("db repair -f json", store=store)
    assert (left.code, [row["what"] for row in json.loads(left.out)]) == (1, ["content"])
