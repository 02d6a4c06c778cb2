"""Several processes score the same groups, and ingest meanwhile: `n` is right in any order of their steps."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from helpers.interleaving import Stepper, boundaries
from helpers.reference_scores import assert_scores_close, score_tables, scores_from_scratch
from helpers.stores import copy_store, store_label
from helpers.texts import write_jsonl
from sqlalchemy import select

from lark_store import Store
from lark_store.schema.catalog import IngestRun, ScoreRun
from lark_store.schema.catalog_base import now

HOW = {"queries": "test", "sources": ["songs"], "sketcher": "small", "hits": 5}
GROUP = "source = 'songs' and variant = 'raw' and checkpoint = 'base' and method = 'cosine'"
SCORED, ADDED, HIDDEN = 5, 7, 3  # samples that are scored; that are ingested since; of a run that is not committed yet


def commit_ingest(store):
    """Commit the run, as the end of an ingest does."""
    with store._db.session() as session:
        for run in session.scalars(select(IngestRun).filter_by(status="running")):
            run.status = "done"


@pytest.fixture(scope="module")
def grown_path(scored_path, tmp_path_factory):
    """A store whose group `songs · raw` has 5 samples scored, 7 more ingested, and 3 in a run not committed yet."""
    root = tmp_path_factory.mktemp("grown")
    with Store.open(copy_store(scored_path, root / "lark.store")) as store:
        store.source_remove("finetune")
        store.source_remove("medical")
        store.attribute(["base"], **HOW)
        for n in (ADDED, HIDDEN):
            rows = [{"id": f"a{n}-{i}", "text": f"Number {i} of {n} about the night."} for i in range(n)]
            store.source_add("songs", write_jsonl(root / "songs.jsonl", rows), stage="pretrain")
            store.ingest(["base"], ["songs"], ["raw"], sketcher="small")
        with store._db.session() as session:
            session.scalars(select(IngestRun).order_by(IngestRun.id.desc())).first().status = "running"
        store.db_optimize(keep_versions_days=0)
    return root / "lark.store"


@pytest.fixture(scope="module")
def expected_tables(grown_path, tmp_path_factory):
    """The tables computed by one process after all ingests."""
    root = tmp_path_factory.mktemp("truth")
    with Store.open(copy_store(grown_path, root / "lark.store")) as store:
        commit_ingest(store)
        return scores_from_scratch(store, root / "whole", hits=5)


def rows_committed(store):
    """How many samples the committed run of `songs · raw` covers: by its rows, and by its ingest runs."""
    n = store.sql(f"select distinct n from source_influence where {GROUP}")["n"].to_list()
    with store._db.session() as session:
        (run,) = [
            run
            for run in session.scalars(select(ScoreRun).filter_by(status="done", method="cosine"))
            if (run.checkpoint.name, run.source.name, run.variant.name) == ("base", "songs", "raw")
        ]
        ingested = sum(session.get_one(IngestRun, number).n_sketched for number in run.recipe["ingest_runs"])
        assert run.n_samples == ingested
    assert n == [ingested]
    return ingested


def n_of(report):
    return report.filter(variant="raw")["n_samples"].item()


def check(store, reports, truth, *, whole=True):
    """Every report told a truth, none was taken back, and the next `attribute` has all; nothing is left over."""
    told = [n_of(report) for report in reports]
    assert set(told) <= {SCORED + ADDED, SCORED + ADDED + HIDDEN}
    assert rows_committed(store) == max(told)
    commit_ingest(store)
    last = score(store)
    assert n_of(last) == rows_committed(store) == SCORED + ADDED + HIDDEN
    assert_scores_close(score_tables(store), truth)
    findings = store.db_check() if whole else None
    assert findings is None or findings.is_empty(), findings.rows()


def interleaved(path, target, schedule, works):
    """Run works, each on a store of its own, in the order of a schedule of their numbers; each then to its end."""
    copy_store(path, target)
    with boundaries():
        stores = [Store.open(target) for _ in works]
        steppers = [
            Stepper(lambda work=work, store=store: work(store)) for work, store in zip(works, stores, strict=True)
        ]
        try:
            for number in schedule:
                steppers[number].step()
            results = [stepper.finish() for stepper in steppers]
        finally:
            for store in stores:
                store.close()
    return results


def score(store):
    return store.attribute(["base"], **HOW)


def ingest_and_score(store):
    commit_ingest(store)
    return score(store)


def optimize(store):
    store.db_optimize(keep_versions_days=0)


def n_steps(path, target):
    copy_store(path, target)
    with boundaries(), Store.open(target) as store:
        stepper, n = Stepper(lambda: score(store)), 0
        while stepper.step():
            n += 1
    return n


@pytest.mark.parametrize("other", [score, ingest_and_score])
def test_scorer_paused_anywhere_gives_correct_tables(grown_path, tmp_path, expected_tables, other):
    n = n_steps(grown_path, tmp_path / "count.store")
    assert n > 15
    for step in range(1, n + 1):
        path = tmp_path / f"{step}.store"
        schedule = [0] * step + [1] * 1000
        reports = interleaved(grown_path, path, schedule, [score, other])
        with Store.open(path) as store:
            check(store, reports, expected_tables, whole=step % 4 == 0)


@pytest.mark.parametrize("seed", range(3))
def test_any_interleaving_of_scorers_gives_correct_tables(grown_path, tmp_path, expected_tables, seed):
    draw = random.Random(seed)  # noqa: S311
    for number in range(6):
        works = draw.choice([[score, ingest_and_score], [score, ingest_and_score, score]])
        schedule = [item for _ in range(60) for item in [draw.randrange(len(works))] * draw.choice([1, 1, 2, 5, 15])]
        path = tmp_path / f"{number}.store"
        reports = interleaved(grown_path, path, schedule, works)
        with Store.open(path) as store:
            check(store, reports, expected_tables)


def test_old_versions_may_be_deleted_during_scoring(grown_path, tmp_path, expected_tables):
    n = n_steps(grown_path, tmp_path / "count.store")
    for step in range(1, n + 1, 3):
        path = tmp_path / f"{step}.store"
        report, _ = interleaved(grown_path, path, [0] * step + [1] * 1000, [score, optimize])
        with Store.open(path) as store:
            check(store, [report], expected_tables)


def test_scorers_with_different_hits_do_not_undo_each_other(grown_path, tmp_path):
    """Both make their own answer; the last one stands, over all samples."""
    n = n_steps(grown_path, tmp_path / "count.store")
    for step in range(1, n + 1, 6):
        path = tmp_path / f"{step}.store"
        few = lambda store: store.attribute(["base"], **HOW | {"hits": 3})  # noqa: E731
        reports = interleaved(grown_path, path, [0] * step + [1] * 1000, [score, few])
        with Store.open(path) as store:
            assert [n_of(report) for report in reports] == [SCORED + ADDED] * 2
            assert rows_committed(store) == SCORED + ADDED
            hits = dict(
                zip([report.filter(variant="raw")["score_run"].item() for report in reports], (5, 3), strict=True)
            )
            stands = store.sql(f"select score_run, max(rank) from influence where {GROUP} group by all").rows()
            assert len(stands) == 1
            assert set(stands) < set(hits.items())
            assert step > 1 or stands[0][1] == 5  # who committed later stands
            assert store.db_check()["what"].to_list() == ["stale run"]  # the uncommitted ingest


# --- the campaign --------------------------------------------------------------------------------------------------

LOOP = """
import sys, time
from pathlib import Path
from lark_store import Store
store, stop = Store.open(sys.argv[1]), Path(sys.argv[2])
while not stop.exists():
    store.attribute(["base"], queries="test", sketcher="small", hits=5)
    print("scored", flush=True)
    time.sleep(0.1)
"""
ROUNDS, PER_ROUND = 15, 4


def test_two_processes_score_while_a_third_ingests(scored_path, tmp_path):
    path, stop = copy_store(scored_path, tmp_path / "lark.store"), tmp_path / "stop"
    command = [sys.executable, "-c", LOOP, store_label(path), str(stop)]
    with Store.open(path) as store:
        scorers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        try:
            for scorer in scorers:
                assert scorer.stdout.readline() == "scored\n"
            for number in range(1, ROUNDS + 1):
                for source, stage in (("finetune", "finetune"), ("songs", "pretrain")):
                    rows = [
                        {"id": f"{number}-{i}", "text": f"Round {number}, {i} of {source}"} for i in range(PER_ROUND)
                    ]
                    store.source_add(source, write_jsonl(tmp_path / "rows.jsonl", rows), stage=stage)
                store.ingest(["base"], ["finetune", "songs"], ["chatml"], sketcher="small")
                store.attribute(["base"], queries="test", sketcher="small", hits=5)
                assert n_by_source(store) == {"finetune": 6 + number * PER_ROUND, "songs": 5 + number * PER_ROUND}
        finally:
            stop.touch()
            ended = [scorer.wait(120) for scorer in scorers]
            for scorer in scorers:
                scorer.stdout.close()
        assert ended == [0, 0]
        assert set(store.attribute(["base"], queries="test", sketcher="small", hits=5)["status"]) == {"current"}
        assert n_by_source(store) == {"finetune": 66, "songs": 65}
        findings = store.db_check()  # of two that update an index the loser leaves files, which a check finds
        assert set(findings["what"]) <= {"unverified file"}, findings.rows()
        assert_scores_close(score_tables(store), scores_from_scratch(store, tmp_path / "whole", hits=5))


def n_by_source(store):
    """Rows of `source_influence` for the growing sources."""
    query = (
        "select distinct source, n from source_influence where checkpoint = 'base' and variant = 'chatml' "
        "and method = 'cosine' and source in ('finetune', 'songs')"
    )
    rows = store.sql(query).rows()
    assert len(rows) == 2, rows
    return dict(rows)


# --- stores damaged by an old bug ----------------------------------------------------------------------------------


def lose_rows(store, group, **of):
    """Let a score run claim ingest runs which it did not read, as `attribute` once did; returns its number."""
    with store._db.session() as session:
        runs = session.scalars(select(ScoreRun).filter_by(status="done", **of))
        run = next(r for r in runs if (r.checkpoint.name, r.source.name, r.variant.name) == group)
        same = {"source_id": run.source_id, "variant_id": run.variant_id, "status": "done"}
        ingests = session.scalars(select(IngestRun).filter_by(**same).order_by(IngestRun.id)).all()
        here = [ingest.id for ingest in ingests if ingest.checkpoint_id == run.checkpoint_id]
        recipe = run.recipe | {"ingest_runs": here}
        run.finished_at = now()
        run.recipe = recipe | (
            {"with": sorted({*recipe["with"], *(e.id for e in ingests)})} if "with" in recipe else {}
        )
        return run.id


def test_run_with_lost_rows_is_reported_repaired_and_never_current(grown_path, tmp_path):
    for repair in (False, True):
        with Store.open(copy_store(grown_path, tmp_path / f"{repair}.store")) as store:
            run = lose_rows(store, ("base", "songs", "raw"), method="cosine")
            findings = store.db_check().filter(what="scores")
            assert findings["where"].str.contains(f"score run {run}:").all()
            assert "it scored 5 samples, its ingest runs have 12" in findings["detail"].item()
            if repair:
                assert store.db_repair().mended.filter(what="scores")["where"].to_list() == findings["where"].to_list()
            report = score(store).filter(variant="raw")
            n = SCORED + ADDED + (HIDDEN if repair else 0)  # a repair commits the rows of an unfinished ingest
            assert report.select("status", "n_samples").rows() == [("scored", n)]
            assert rows_committed(store) == n
            assert store.db_check().filter(what="scores").is_empty()


@pytest.mark.parametrize("repair", [False, True])
def test_sum_with_lost_rows_is_reported_repaired_and_never_current(scored_path, tmp_path, repair):
    options = {
        "queries": "test",
        "sources": ["songs"],
        "sketcher": "small",
        "method": "cosine",
        "over_checkpoints": "sum",
    }
    with Store.open(copy_store(scored_path, tmp_path / "lark.store")) as store:
        assert set(store.attribute(["base", "epoch-1"], **options)["n_samples"]) == {5}
        rows = [{"id": f"new-{i}", "text": f"Number {i} about the night."} for i in range(3)]
        store.source_add("songs", write_jsonl(tmp_path / "songs.jsonl", rows), stage="pretrain")
        for checkpoint, n in (("base", 1), ("epoch-1", 2)):  # of three new samples two have a sketch at both
            store.ingest(
                [checkpoint], ["songs"], ["raw", "chatml"], sketcher="small", limit=5 + 3 * n - 2 * (n == 2) - (n == 1)
            )
        assert store.db_check().is_empty()
        run = lose_rows(store, ("epoch-1", "songs", "raw"), method="cosine-sum")
        (detail,) = store.db_check().filter(what="scores")["detail"].to_list()
        assert "it scored 5 samples, its ingest runs have 7" in detail
        if repair:
            assert len(store.db_repair().mended) >= 1
        report = store.attribute(["base", "epoch-1"], **options)
        assert report.select("variant", "status", "n_samples").rows() == [("raw", "scored", 7), ("chatml", "scored", 7)]
        assert run not in report["score_run"].to_list()
        assert store.db_check().is_empty()
        assert set(store.attribute(["base", "epoch-1"], **options)["status"]) == {"current"}


def test_completely_lost_scores_are_recomputed(grown_path, tmp_path, expected_tables):
    """No rows of a run that counts samples: never taken for a run over no samples."""
    with Store.open(copy_store(grown_path, tmp_path / "lark.store")) as store:
        for name in ("influence", "source_influence"):
            store._db.vectors.table(name).delete("checkpoint = 'base'")
        report = score(store)
        assert n_of(report) == SCORED + ADDED
        check(store, [report], expected_tables)


def test_new_run_with_a_reused_number_is_distinguished(scored_path, tmp_path):
    """The catalog gives the number of the last run to the next. A whitened score depends on all that is searched."""
    options = {"queries": "test", "sketcher": "small", "method": "whitened"}
    with Store.open(copy_store(scored_path, tmp_path / "lark.store")) as store:

        def replace(text):
            rows = [{"id": f"o-{i}", "text": f"{text} {i}"} for i in range(4)]
            store.source_add("other", write_jsonl(tmp_path / "o.jsonl", rows), stage="pretrain")
            return store.ingest(["base"], ["other"], ["raw"], sketcher="small").units["run"].item()

        first = replace("The harbour at night")
        assert set(store.attribute(["base"], **options)["status"]) == {"scored"}
        before = store.sql(
            "select max from source_influence where method = 'whitened' and source = 'songs' order by all"
        )
        store.source_remove("other")
        assert replace("Nothing of the kind, but kidneys") == first
        assert set(store.attribute(["base"], **options)["status"]) == {"scored"}
        after = store.sql(
            "select max from source_influence where method = 'whitened' and source = 'songs' order by all"
        )
        assert not after.equals(before)
        assert set(store.attribute(["base"], **options)["status"]) == {"current"}


@pytest.mark.parametrize("method", ["hybrid", "cosine"])
def test_scores_stay_when_another_searched_source_is_removed(scored_path, tmp_path, method):
    options = {"queries": "test", "sketcher": "small", "method": method, "hits": 5}
    sums = {} if method == "hybrid" else {"over_checkpoints": "sum"}
    with Store.open(copy_store(scored_path, tmp_path / "lark.store")) as store:
        store.attribute(["base", "epoch-1"], **options, **sums)
        store.source_remove("medical")
        assert store.db_check().is_empty()
        assert set(store.attribute(["base", "epoch-1"], **options, **sums)["status"]) == {"scored"}
        assert set(store.attribute(["base", "epoch-1"], **options, **sums)["status"]) == {"current"}
        assert store.db_check().is_empty()
