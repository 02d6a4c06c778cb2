"""Any order of commands, including kills, leaves the store in the state of a model in plain Python.

Nothing is faked: a tiny Llama is sketched, a killed ingest gets SIGKILL (`helpers/killed_ingest.py`), a snapshot, a
backup and a repair are real. `LARK_FUZZ=N` tries N times as many stores, of more steps each.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from golden.make import save_model
from helpers.interleaving import Stepper, boundaries
from helpers.killed_ingest import killed_ingest
from helpers.texts import write_jsonl
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lark_store import Store
from lark_store.errors import NothingToScoreError

TIMES = int(os.environ.get("LARK_FUZZ", "1"))
SKETCHER, QUERIES = "tiny", "test"
CHECKPOINTS, SOURCES, VARIANTS = ("a", "b"), (QUERIES, "songs", "facts"), ("raw", "chatml")
STAGES = {QUERIES: "query", "songs": "pretrain", "facts": "finetune"}
MUTE = "x"  # one token: raw, it has nothing to predict and fails
Unit = tuple[str, str, str]  # checkpoint, source, variant


@dataclass
class ExpectedStore:
    """Expected contents of a store. `hidden` are the rows of killed runs, invisible to readers."""

    samples: dict[str, dict[str, str]] = field(default_factory=dict)  # source to id to text
    sketches: dict[Unit, set[str]] = field(default_factory=dict)
    hidden: dict[Unit, set[str]] = field(default_factory=dict)
    scores: dict[Unit, tuple[set[str], set[str]]] = field(default_factory=dict)  # group to queries and samples

    def sketchable(self, unit: Unit) -> set[str]:
        _, source, variant = unit
        return {i for i, text in self.samples[source].items() if variant == "chatml" or text != MUTE}

    def commit(self, unit: Unit, ids: set[str]) -> None:
        self.sketches[unit] = self.sketches.get(unit, set()) | ids
        self.hidden.pop(unit, None)

    def forget(self, source: str, ids: set[str]) -> None:
        """Remove the sketches of samples, and all scores computed with one of them."""
        for unit in list(self.sketches | self.hidden):
            there = self.sketches.get(unit, set()) | self.hidden.get(unit, set())
            if unit[1] == source and there & ids:
                self.unscore(unit)
                for rows in (self.sketches, self.hidden):
                    if unit in rows:
                        rows[unit] -= ids

    def unscore(self, unit: Unit) -> None:
        checkpoint, source, variant = unit
        if source != QUERIES:
            self.scores.pop(unit, None)
        elif variant == "chatml":
            self.scores = {group: rows for group, rows in self.scores.items() if group[0] != checkpoint}

    def drop(self, place: int, name: str) -> None:
        """Remove a checkpoint (place 0) or a source (place 1)."""
        for rows in (self.sketches, self.hidden, self.scores):
            for unit in [unit for unit in rows if unit[place] == name]:
                del rows[unit]
        if name == QUERIES and place == 1:
            self.scores.clear()

    def groups(self, checkpoint: str) -> dict[Unit, set[str]]:
        return {u: ids for u, ids in self.sketches.items() if u[0] == checkpoint and u[1] != QUERIES and ids}

    def queries(self, checkpoint: str) -> set[str]:
        return self.sketches.get((checkpoint, QUERIES, "chatml"), set())

    def influence(self) -> set[tuple[str, ...]]:
        return {
            (checkpoint, query, source, variant, sample)
            for (checkpoint, source, variant), (queries, samples) in self.scores.items()
            for query in queries
            for sample in samples
        }


def visible_rows(store: Store) -> dict[str, list[tuple[str, ...]]]:
    """Rows visible to a reader; duplicates count twice."""
    return {
        "samples": store.sql("SELECT source, sample_id, text FROM samples").rows(),
        "sketches": store.sql("SELECT checkpoint, source, variant, sample_id FROM sketches").rows(),
        "influence": store.sql("SELECT checkpoint, query_id, source, variant, sample_id FROM influence").rows(),
        "sums": store.sql("SELECT checkpoint, source, variant, query_id, n FROM source_influence").rows(),
    }


def expected_rows(expected: ExpectedStore) -> dict[str, set[tuple[object, ...]]]:
    """Rows expected by a reader."""
    return {
        "samples": {(source, i, text) for source, rows in expected.samples.items() for i, text in rows.items()},
        "sketches": {(*unit, i) for unit, ids in expected.sketches.items() for i in ids},
        "influence": expected.influence(),
        "sums": {(*unit, query, len(ids)) for unit, (queries, ids) in expected.scores.items() for query in queries},
    }


def assert_agrees(store: Store, model: ExpectedStore) -> None:
    seen, expected = visible_rows(store), expected_rows(model)
    assert {name: sorted(rows) for name, rows in seen.items()} == {n: sorted(rows) for n, rows in expected.items()}


class Machine(RuleBasedStateMachine):
    """A store and its expected contents."""

    home: Path  # of this test
    models: dict[str, Path]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=self.home))
        self.store = Store.open(shutil.copytree(self.home / "fresh.store", self.folder / "0.store"))
        self.model, self.snapshots = ExpectedStore(), {}
        self.checkpoints: set[str] = set(CHECKPOINTS)
        self.number, self.killed = 0, False

    def next(self) -> int:
        self.number += 1
        return self.number

    def rows(self, rows: dict[str, str]) -> Path:
        return write_jsonl(self.folder / "rows.jsonl", [{"id": i, "text": text} for i, text in rows.items()])

    def fresh(self, n: int, *, mute: bool = False) -> dict[str, str]:
        numbers = [self.next() for _ in range(n)]
        texts = {f"s{i}": f"Song {i} of the sea" for i in numbers}
        return texts | ({f"m{self.next()}": MUTE} if mute else {})

    # --- rules ---

    @initialize(ingested=st.booleans())
    def begin(self, ingested):
        for source in SOURCES:
            self.add(source, 3, mute=False)
        if ingested:
            self.ingest([*CHECKPOINTS], [*SOURCES], [*VARIANTS])

    @rule(source=st.sampled_from(SOURCES), n=st.integers(1, 4), mute=st.booleans())
    def add(self, source, n, mute):
        rows = self.fresh(n, mute=mute)
        report = self.store.source_add(source, self.rows(rows), stage=STAGES[source])
        assert (report.n_added, report.n_existing, report.n_changed) == (len(rows), 0, 0)
        self.model.samples.setdefault(source, {}).update(rows)

    @rule(source=st.sampled_from(SOURCES), pick=st.integers(0, 9), replace=st.booleans())
    def add_again(self, source, pick, replace):
        """New samples among those that are there, one of them twice in the file, one changed."""
        there = self.model.samples.get(source, {})
        if not there:
            return
        names = sorted(there)
        changed = names[pick % len(names)]
        rows = self.fresh(2) | there | {changed: f"Song {self.next()}, another one"}
        report = self.store.source_add(source, self.rows(rows), stage=STAGES[source], replace=replace)
        assert (report.n_added, report.n_existing) == (2, len(there) - 1)
        assert (report.n_replaced, report.n_changed) == ((1, 0) if replace else (0, 1))
        if replace:
            self.model.forget(source, {changed})
        else:
            rows[changed] = there[changed]
        there.update(rows)

    @rule(
        checkpoints=st.lists(st.sampled_from(CHECKPOINTS), min_size=1, unique=True),
        sources=st.lists(st.sampled_from(SOURCES), min_size=1, unique=True),
        variants=st.lists(st.sampled_from(VARIANTS), min_size=1, unique=True),
    )
    def ingest(self, checkpoints, sources, variants):
        checkpoints = [c for c in checkpoints if c in self.checkpoints]
        sources = [s for s in sources if s in self.model.samples]
        report = self.store.ingest(checkpoints, sources, variants, sketcher=SKETCHER)
        units = [(c, s, v) for c in checkpoints for s in sources for v in variants]
        result = dict(zip(units, report.units.iter_rows(named=True), strict=True))
        for unit in units:
            expected, had = self.model.sketchable(unit), self.model.sketches.get(unit, set())
            there = had | self.model.hidden.get(unit, set())
            assert result[unit]["n_sketched"] == len(expected - there), unit
            assert result[unit]["n_failed"] == len(self.model.samples[unit[1]]) - len(expected), unit
            self.model.commit(unit, expected)

    @rule(
        checkpoint=st.sampled_from(CHECKPOINTS),
        source=st.sampled_from(SOURCES),
        variant=st.sampled_from(VARIANTS),
        step=st.integers(0, 9),
    )
    def killed_ingest(self, checkpoint, source, variant, step):
        unit = (checkpoint, source, variant)
        if checkpoint not in self.checkpoints or not self.model.samples.get(source):
            return
        committed, wrote = killed_ingest(self.store.path, unit, SKETCHER, step, self.folder / "log")
        self.killed = True
        there = self.model.hidden.get(unit, set()) | wrote
        assert there <= self.model.sketchable(unit)
        if committed:
            self.model.commit(unit, there)
        else:
            self.model.hidden[unit] = there

    @rule(checkpoint=st.sampled_from(CHECKPOINTS))
    def attribute(self, checkpoint):
        groups, queries = self.model.groups(checkpoint), self.model.queries(checkpoint)
        if checkpoint not in self.checkpoints:
            return
        if not groups or not queries:
            with pytest.raises((NothingToScoreError, LookupError)):
                self.store.attribute([checkpoint], queries=QUERIES, query_variant="chatml", sketcher=SKETCHER)
            return
        report = self.store.attribute([checkpoint], queries=QUERIES, query_variant="chatml", sketcher=SKETCHER)
        scored = {(r["checkpoint"], r["source"], r["variant"]): r["status"] for r in report.iter_rows(named=True)}
        now = {unit: (set(queries), set(ids)) for unit, ids in groups.items()}
        assert scored == {u: "current" if self.model.scores.get(u) == rows else "scored" for u, rows in now.items()}
        self.model.scores |= now
        self.same_scores(checkpoint)

    @rule(
        checkpoint=st.sampled_from(CHECKPOINTS),
        schedule=st.lists(st.tuples(st.integers(0, 1), st.sampled_from([1, 2, 5, 20])), max_size=12),
        source=st.sampled_from(SOURCES),
        moment=st.integers(0, 12),
    )
    def two_scorers(self, checkpoint, schedule, source, moment):
        """Two processes score at a time, step by step in any order, and an ingest comes in between."""
        if (
            checkpoint not in self.checkpoints
            or not self.model.groups(checkpoint)
            or not self.model.queries(checkpoint)
        ):
            return
        options = {"queries": QUERIES, "query_variant": "chatml", "sketcher": SKETCHER}
        before = self.truth(checkpoint)
        with boundaries(), Store.open(self.store.path) as first, Store.open(self.store.path) as second:
            scorers = [Stepper(partial(store.attribute, [checkpoint], **options)) for store in (first, second)]
            for number, (scorer, steps) in enumerate(schedule):
                if number == moment and source in self.model.samples:
                    self.ingest([checkpoint], [source], ["chatml"])
                for _ in range(steps):
                    scorers[scorer].step()
            reports = [scorer.finish() for scorer in scorers]
        after = self.truth(checkpoint)
        for report in reports:
            for row in report.iter_rows(named=True):
                unit = (checkpoint, row["source"], row["variant"])
                assert row["n_samples"] in {len(truth[unit][1]) for truth in (before, after) if unit in truth}
        result = self.store.attribute([checkpoint], **options)
        assert {(checkpoint, r["source"], r["variant"]): r["n_samples"] for r in result.iter_rows(named=True)} == {
            unit: len(ids) for unit, (_, ids) in after.items()
        }
        self.model.scores |= after
        self.same_scores(checkpoint)

    def truth(self, checkpoint):
        return {
            unit: (set(self.model.queries(checkpoint)), set(ids)) for unit, ids in self.model.groups(checkpoint).items()
        }

    def same_scores(self, checkpoint):
        """Stored scores equal freshly computed ones."""
        query = min(self.model.queries(checkpoint))
        hits = self.store.top(query, checkpoint=checkpoint, k=1000, query_variant="chatml", sketcher=SKETCHER).frame
        now = {tuple(key): score for *key, score in hits.select("source", "variant", "sample_id", "score").rows()}
        kept = "SELECT source, variant, sample_id, score FROM influence WHERE checkpoint = ? AND query_id = ?"
        assert {
            tuple(key): pytest.approx(s, abs=1e-5) for *key, s in self.store.sql(kept, [checkpoint, query]).rows()
        } == now

    @rule(source=st.sampled_from(SOURCES), picks=st.lists(st.integers(0, 20), min_size=1, max_size=3))
    def remove_samples(self, source, picks):
        names = sorted(self.model.samples.get(source, {}))
        if not names:
            return
        ids = {names[pick % len(names)] for pick in picks}
        self.store.sample_remove(source, sorted(ids))
        self.model.forget(source, ids)
        for name in ids:
            del self.model.samples[source][name]

    @rule(source=st.sampled_from(SOURCES))
    def remove_source(self, source):
        if source in self.model.samples:
            self.store.source_remove(source)
            self.model.drop(1, source)
            del self.model.samples[source]

    @rule(checkpoint=st.sampled_from(CHECKPOINTS))
    def remove_or_add_checkpoint(self, checkpoint):
        if checkpoint in self.checkpoints:
            self.store.checkpoint_remove(checkpoint)
            self.model.drop(0, checkpoint)
        else:
            self.store.checkpoint_add(checkpoint, self.models[checkpoint])
        self.checkpoints ^= {checkpoint}

    @precondition(lambda self: len(self.snapshots) < 2)
    @rule()
    def snapshot(self):
        name = f"n{self.next()}"
        self.store.snapshot_create(name)
        self.snapshots[name] = copy.deepcopy(self.model)

    @precondition(lambda self: self.snapshots)
    @rule(pick=st.integers(0, 9))
    def remove_snapshot(self, pick):
        name = sorted(self.snapshots)[pick % len(self.snapshots)]
        self.store.snapshot_remove(name)
        del self.snapshots[name]

    @rule(days=st.sampled_from([0, 7]))
    def optimize(self, days):
        self.store.db_optimize(keep_versions_days=days)

    @rule()
    def reopen(self):
        path = self.store.path
        self.store.close()
        self.store = Store.open(path)

    @rule()
    def check(self):
        findings = self.store.db_check()
        if self.killed:  # notes on its remains: a stale run, its lock, a table without its indices
            assert "error" not in set(findings["severity"]), findings.rows()
        else:
            assert findings.is_empty(), findings.rows()

    @rule()
    def repair(self):
        self.store.db_repair()
        for unit, ids in list(self.model.hidden.items()):
            self.model.commit(unit, ids)
        self.killed = False
        assert self.store.db_check().is_empty()

    @rule()
    def move_to_a_backup(self):
        """Continue with the restored backup."""
        n = self.next()
        self.store.db_backup(self.folder / f"{n}.backup")
        self.store.close()
        shutil.rmtree(self.store.path)
        Store.db_restore(self.folder / f"{n}.backup", to=self.folder / f"{n}.store")
        shutil.rmtree(self.folder / f"{n}.backup")
        self.store = Store.open(self.folder / f"{n}.store")

    # --- invariants ---

    @invariant()
    def the_store_holds_what_it_must(self):
        assert_agrees(self.store, self.model)

    @invariant()
    def top_answers_of_committed_rows_alone(self):
        for checkpoint in self.checkpoints:
            groups, queries = self.model.groups(checkpoint), self.model.queries(checkpoint)
            if not groups or not queries:
                continue
            hits = self.store.top(
                max(queries), checkpoint=checkpoint, k=1000, query_variant="chatml", sketcher=SKETCHER
            )
            result = sorted(hits.frame.select("source", "variant", "sample_id").rows())
            assert result == sorted((s, v, i) for (_, s, v), ids in groups.items() for i in ids)

    @invariant()
    def snapshots_show_what_they_showed(self):
        assert set(self.store.snapshot_list()["name"]) == set(self.snapshots)
        for name, expected in self.snapshots.items():
            with Store.open(self.store.path, snapshot=name) as then:
                assert_agrees(then, expected)

    def teardown(self):
        self.repair()
        assert_agrees(self.store, self.model)
        if any(self.model.sketches.values()):
            assert self.store.verify(sketches=10)["ok"].all()  # of a replaced sample it is the new text's sketch
        self.store.close()
        shutil.rmtree(self.folder)


def test_any_order_of_commands_matches_the_model(tmp_path):
    Machine.home = tmp_path
    Machine.models = {name: save_model(tmp_path / name, seed) for seed, name in enumerate(CHECKPOINTS)}
    with Store.create(tmp_path / "fresh.store") as store:
        for name, model in Machine.models.items():
            store.checkpoint_add(name, model)
        store.sketcher_add(SKETCHER, k=256)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=5 * TIMES,
            stateful_step_count=14 if TIMES == 1 else 30,
            deadline=None,
            derandomize=TIMES == 1,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )
