"""Probes and measured influence in the store: views, removal, checks and repairs, snapshots."""

from __future__ import annotations

import math

import pytest
from helpers.corruption import change_catalog, check_findings, duplicate_rows, lance_table
from helpers.measured import FACTS, SAMPLES, add_eif, add_probes, change

from lark_store import Store
from lark_store.schema.catalog import EifRun, ProbeRun


@pytest.fixture
def measured(scored_copy):
    add_probes(scored_copy, {"base": [], "epoch-1": ["q100", "q101"]}, n_samples=4, n_correct=1)
    add_eif(scored_copy)
    return scored_copy


def counts(store):
    """Rows of the tables, and the runs' own counts."""
    rows = tuple(store._db.vectors.table(name).count_rows() for name in ("probes", "eif"))
    runs = store.sql("SELECT n_probed FROM probe_runs ORDER BY ALL")["n_probed"].to_list()
    return (*rows, runs, store.sql("SELECT n_samples, n_queries FROM eif_runs").rows())


def test_views_say_what_was_measured(measured):
    latent = measured.sql("SELECT checkpoint, sample_id FROM probes WHERE is_latent ORDER BY ALL").rows()
    assert latent == [*(("base", fact) for fact in FACTS), ("epoch-1", "q102"), ("epoch-1", "q103")]
    (chance,) = set(measured.sql("SELECT p_any FROM probes")["p_any"])
    assert chance == pytest.approx(1 - 0.75**4, abs=1e-15)
    assert measured.sql("SELECT count(*), min(value), max(queries) FROM eif").row(0) == (12, 0.5, "test")
    assert measured.sql("FROM eif_pairs").is_empty()  # no sample is also a query


@pytest.mark.parametrize("p", [1e-3, 1e-8, 1e-12, 1e-30])
def test_a_rare_answer_keeps_its_chance(scored_copy, p):
    add_probes(scored_copy, {"base": []}, n_samples=20, answer_logprob=math.log(p))
    (chance,) = set(scored_copy.sql("SELECT p_any FROM probes")["p_any"])
    assert chance == pytest.approx(-math.expm1(20 * math.log1p(-p)), rel=1e-6)


def test_pairs_hold_both_directions(scored_copy):
    add_eif(scored_copy, queries="finetune", value=lambda sample, query: int(sample[1]) + 10 * int(query[1]))
    pairs = scored_copy.sql("SELECT a, b, a_on_b, b_on_a FROM eif_pairs ORDER BY ALL").rows()
    assert pairs == [("q0", "q1", 10, 1), ("q0", "q2", 20, 2), ("q1", "q2", 21, 12)]


def test_two_sources_with_the_same_ids_make_no_pairs(scored_copy):
    add_eif(scored_copy, source="medical", queries="finetune")  # both have q0, q1 and q2 in these rows
    assert scored_copy.sql("SELECT count(*) FROM eif").item() == 9
    assert scored_copy.sql("FROM eif_pairs").is_empty()


def test_rows_of_uncommitted_runs_are_not_read(measured):
    change_catalog(measured, "UPDATE probe_run SET status = 'running'", "UPDATE eif_run SET status = 'interrupted'")
    for view in ("probes", "eif", "eif_pairs"):
        assert measured.sql(f"FROM {view}").is_empty()
    assert ("note", "stale run", 4) in check_findings(measured)


def test_removed_sample_leaves_the_others(measured):
    measured.sample_remove("test", ["q101"])
    assert counts(measured) == (6, 9, [3, 3], [(3, 3)])
    measured.sample_remove("finetune", ["q2"])
    assert counts(measured) == (6, 6, [3, 3], [(2, 3)])
    assert measured.db_check().filter(severity="error").is_empty()


@pytest.mark.parametrize(
    ("remove", "left"),
    [
        (lambda s: s.source_remove("test"), (0, 0, [], [])),
        (lambda s: s.source_remove("finetune"), (8, 0, [4, 4], [])),
        (lambda s: s.checkpoint_remove("base"), (4, 0, [4], [])),
        (lambda s: s.checkpoint_remove("epoch-1"), (4, 12, [4], [(3, 4)])),
    ],
)
def test_removed_source_or_checkpoint_takes_its_runs(measured, remove, left):
    remove(measured)
    assert counts(measured) == left
    assert measured.db_check().filter(severity="error").is_empty()


def test_a_dry_run_counts_and_removes_nothing(measured):
    before = counts(measured)
    report = {(kind, table): n for kind, table, n in measured.source_remove("test", dry_run=True).rows()}
    assert report[("probe", "probes")] == 8
    assert report[("measured influence", "eif")] == 12
    assert (report[("probe run", "probe_run")], report[("EIF run", "eif_run")]) == (2, 1)
    assert counts(measured) == before


FACT, PAIR = "probe_run = 1 AND sample_id = 'q101'", "sample_id = 'q1' AND query_id = 'q101'"
DAMAGES = {
    "another answer": (
        lambda s: change(s, "probes", FACT, is_correct=True),
        {("error", "checksum", 1)},
        "interrupted",
    ),
    "another influence": (lambda s: change(s, "eif", PAIR, value=9.0), {("error", "checksum", 1)}, "eif"),
    "a probe twice": (
        lambda s: duplicate_rows(s, "probes", FACT),
        {("error", "duplicate key", 1), ("error", "count", 1)},
        None,
    ),
    "an influence twice": (
        lambda s: duplicate_rows(s, "eif", PAIR),
        {("error", "duplicate key", 1), ("error", "count", 1)},
        "eif",
    ),
    "probes of no run": (
        lambda s: change_catalog(s, "DELETE FROM probe_run WHERE id = 1"),
        {("error", "orphan rows", 4)},
        None,
    ),
    "probes of a superseded run": (
        lambda s: change_catalog(s, "UPDATE probe_run SET status = 'superseded' WHERE id = 1"),
        {("warning", "orphan rows", 4)},
        None,
    ),
    "a lost influence": (lambda s: lance_table(s, "eif").delete(PAIR), {("error", "count", 1)}, "eif"),
    "a lost probe": (lambda s: lance_table(s, "probes").delete(FACT), {("error", "count", 1)}, None),
}


@pytest.mark.parametrize(("damage", "found", "reopened"), DAMAGES.values(), ids=list(DAMAGES))
def test_check_finds_damages_and_repair_mends_them(measured, damage, found, reopened):
    assert check_findings(measured) == []
    damage(measured)
    assert found <= set(check_findings(measured))
    measured.db_repair()
    assert measured.db_check().filter(severity="error").is_empty()
    with measured._db.session() as session:
        assert session.get_one(EifRun, 1).status == ("interrupted" if reopened == "eif" else "done")
        assert {run.status for run in session.query(ProbeRun)} <= {"done", "superseded"}
    assert set(measured.sql("SELECT n_probed = (SELECT count(*) FROM probes p WHERE p.probe_run = r.probe_run) AS same "
                            "FROM probe_runs r WHERE status = 'done'")["same"]) == {True}  # fmt: skip


def test_backup_and_snapshot_hold_the_rows(measured, tmp_path):
    measured.snapshot_create("then")
    measured.sample_remove("test", ["q101"])
    with Store.open(measured.path, snapshot="then") as then:
        assert counts(then)[:2] == (8, 12)
    backup = measured.db_backup(tmp_path / "backup")
    Store.db_restore(backup.path, to=tmp_path / "restored")
    with Store.open(tmp_path / "restored") as restored:
        assert counts(restored) == counts(measured) == (6, 9, [3, 3], [(len(SAMPLES), 3)])
